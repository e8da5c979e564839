// Backward engine for vector units: fp32 panels (bf16 is widened when a chunk
// is loaded) and the micro-kernel.
#pragma once
#include "backward.h"
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
class VectorBackward {
 public:
  static constexpr int kPanelKeys = kVectorPanelKeys;
  static constexpr int kChunkKeys = kPanelKeys * kPanelsPerChunk;
  static int64_t width(int64_t dim) { return padded(dim); }

  VectorBackward(const BackwardParams& params, KeyHead at, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        dim_(params.shape.head_dim),
        value_dim_(params.shape.value_dim),
        k_(scratch.objects<float>(kChunkKeys * padded(dim_))),
        v_(scratch.objects<float>(kChunkKeys * padded(value_dim_))),
        q_rows_(scratch.objects<float>(kTileRows * padded(dim_))),
        q_lanes_(scratch.objects<float>(kTileRows * padded(dim_))),
        do_rows_(scratch.objects<float>(kTileRows * padded(value_dim_))),
        do_lanes_(scratch.objects<float>(kTileRows * padded(value_dim_))),
        weights_(scratch.objects<float>(kPanelKeys * kTileRows)),
        dscores_(scratch.objects<float>(kPanelKeys * kTileRows)) {}

  void load_chunk(int64_t first, int64_t last) {
    load_key_panel<Element>(p_.k, at_, first, last - first, dim_, k_);
    load_key_panel<Element>(p_.v, at_, first, last - first, value_dim_, v_);
  }

  void load_rows(const RowTile& tile) {
    const int64_t group = p_.shape.heads_per_group();
    load_tile_rows<Element>(p_.q, group, at_, tile, dim_, q_rows_);
    load_tile_rows<Element>(p_.dout, group, at_, tile, value_dim_, do_rows_);
    rows_to_lanes(q_rows_, dim_, q_lanes_);
    rows_to_lanes(do_rows_, value_dim_, do_lanes_);
  }

  void differentiate(const BackwardTile& tile, int64_t begin, int64_t end, const Gradients& sums) {
    const int64_t first = begin - sums.first_key, count = end - begin;
    const float* k = k_ + first * padded(dim_);
    probabilities(tile, k, begin, count);
    score_gradients(tile, v_ + first * padded(value_dim_), count);
    add_product(weights_, do_rows_, padded(value_dim_), tile.rows.num_rows, count,
                sums.dv + first * padded(value_dim_));
    add_product(dscores_, q_rows_, padded(dim_), tile.rows.num_rows, count, sums.dk + first * padded(dim_));
    add_query_gradients(k, count, sums.dq_lanes);
  }

 private:
  // P^T = 2^(S^T * scale * log2(e) - lse * log2(e)), zero where masked
  void probabilities(const BackwardTile& tile, const float* k, int64_t begin, int64_t num_keys) {
    const Vec scale = splat(p_.softmax_scale * kLog2E);
    const bool masked = tile.rows.needs_mask(begin, begin + num_keys);
    for_row_groups(num_keys, [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kRowMajor>(k + r * padded(dim_), padded(dim_), q_lanes_, kTileRows, dim_, acc);
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile.rows, begin + r + i, x, score);
        });
      }
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        store(weights_ + (r + i) * kTileRows + x * kLanes,
              exp2(score * scale - load(tile.lse_log2 + x * kLanes)));
      });
    });
  }

  // dS^T = P^T (V dO^T - delta)
  void score_gradients(const BackwardTile& tile, const float* v, int64_t num_keys) {
    for_row_groups(num_keys, [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kRowMajor>(v + r * padded(value_dim_), padded(value_dim_), do_lanes_, kTileRows,
                                     value_dim_, acc);
      acc.for_each([&](int i, int x, Vec& dp) __attribute__((always_inline)) {
        const int64_t at = (r + i) * kTileRows + x * kLanes;
        store(dscores_ + at, load(weights_ + at) * (dp - load(tile.delta + x * kLanes)));
      });
    });
  }

  // sum[key][d] += weights[key][row] * rows[row][d]; here d runs along the
  // lanes.
  void add_product(const float* weights, const float* rows, int64_t width, int64_t num_rows, int64_t num_keys,
                   float* sum) {
    for_column_groups(width, [&]<int V>(int64_t d) __attribute__((always_inline)) {
      for_row_groups(num_keys, [&]<int R>(int64_t r) __attribute__((always_inline)) {
        Accumulator<R, V> acc;
        acc.zero();
        multiply_add<Order::kRowMajor>(weights + r * kTileRows, kTileRows, rows + d, width, num_rows, acc);
        acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
          float* at = sum + (r + i) * width + d + x * kLanes;
          store(at, load(at) + value);
        });
      });
    });
  }

  // dQ^T += K^T dS^T
  void add_query_gradients(const float* k, int64_t num_keys, float* dq_lanes) {
    for_row_groups(dim_, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kColumnMajor>(k + d, padded(dim_), dscores_, kTileRows, num_keys, acc);
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        float* at = dq_lanes + (d + i) * kTileRows + x * kLanes;
        store(at, load(at) + value);
      });
    });
  }

  const BackwardParams& p_;
  const KeyHead at_;
  const int64_t dim_, value_dim_;
  float *const k_,
      *const v_;  // [kChunkKeys][padded(D)], [kChunkKeys][padded(Dv)]
  float *const q_rows_,
      *const q_lanes_;                      // [kTileRows][padded(D)], [padded(D)][kTileRows]
  float *const do_rows_, *const do_lanes_;  // the same of dO, with Dv
  float *const weights_, *const dscores_;   // P^T, dS^T: [kPanelKeys][kTileRows]
};

}  // namespace mls::cpu::MLS_VARIANT
