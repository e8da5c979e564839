// Backward engine for vector units: fp32 panels (bf16 is widened when keys are loaded) and the micro-kernel.
#pragma once
#include "backward.h"
#include "key_segments.h"
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// All that works on fp32, whatever the element type.
class BackwardProducts {
 public:
  static constexpr int kPanelKeys = kVectorPanelKeys * kMaxPanelsPerChunk;  // all of a chunk: cut by segments
  static int64_t width(int64_t dim) { return padded(dim); }
  static LaneLayout lanes(int64_t) { return kRowsOfLanes; }

  // Keys of a chunk. The shape alone decides, so that results do not depend on the number of threads.
  static int64_t chunk_keys(const AttentionShape& shape) {
    const int64_t panel_bytes = kVectorPanelKeys * 2 * (padded(shape.head_dim) + padded(shape.value_dim)) *
                                static_cast<int64_t>(sizeof(float));
    const int64_t task_keys = shape.batch * shape.num_kv_heads * shape.num_keys / kWantedBackwardTasks;
    const int64_t panels = std::min<int64_t>(kChunkBytes / panel_bytes, task_keys / kVectorPanelKeys);
    return kVectorPanelKeys * std::clamp<int64_t>(panels, kPanelsPerChunk, kMaxPanelsPerChunk);
  }

  BackwardProducts(const BackwardParams& params, ScratchCursor& scratch)
      : dim_(params.shape.head_dim),
        value_dim_(params.shape.value_dim),
        log2_scale_(params.softmax_scale * kLog2E),
        chunk_keys_(chunk_keys(params.shape)),
        k_(scratch.objects<float>(chunk_keys_ * padded(dim_))),
        k_copy_(scratch.objects<float>(chunk_keys_ * round_up(dim_, kMicroRows))),
        v_(scratch.objects<float>(chunk_keys_ * padded(value_dim_))),
        q_rows_(scratch.objects<float>(kTileRows * padded(dim_))),
        q_lanes_(scratch.objects<float>(kTileRows * padded(dim_))),
        do_rows_(scratch.objects<float>(kTileRows * padded(value_dim_))),
        do_lanes_(scratch.objects<float>(kTileRows * padded(value_dim_))),
        weights_(scratch.objects<float>(kVectorPanelKeys * kTileRows)),
        dscores_(scratch.objects<float>(kVectorPanelKeys * kTileRows)) {}

  void differentiate(const BackwardTile& tile, int64_t begin, int64_t end, const Gradients& sums) {
    for (const KeySegment& segment : KeySegments(tile.rows, begin, end)) {
      for_panels(segment, [&](const KeySegment& keys) {
        with_count<kMicroVecs>(keys.num_vecs, [&]<int V>() { differentiate_panel<V>(tile, keys, sums); });
      });
    }
  }

 protected:
  const int64_t dim_, value_dim_;
  const float log2_scale_;
  const int64_t chunk_keys_;
  float* const k_;                          // [chunk keys][padded(D)]
  float* const k_copy_;                     // the same in the order of copy_columns
  PanelColumns k_columns_{};                // one of the two
  float* const v_;                          // [chunk keys][padded(Dv)]
  float *const q_rows_, *const q_lanes_;    // [kTileRows][padded(D)], [padded(D)][kTileRows]
  float *const do_rows_, *const do_lanes_;  // the same of dO, with Dv
  float *const weights_, *const dscores_;   // P^T, dS^T: [kVectorPanelKeys][kTileRows]

 private:
  template <int V>
  void differentiate_panel(const BackwardTile& tile, const KeySegment& keys, const Gradients& sums) {
    const int64_t first = keys.begin - sums.first_key, count = keys.num_keys(), row = keys.first_row();
    const int64_t width = padded(dim_), value_width = padded(value_dim_);
    const int64_t num_rows = std::min<int64_t>(V * kLanes, tile.rows.num_rows - row);
    const float* const k = k_ + first * width;
    probabilities<V>(tile, keys, k);
    score_gradients<V>(tile, keys, v_ + first * value_width);
    add_product(weights_, do_rows_ + row * value_width, value_width, num_rows, count,
                sums.dv + first * value_width);
    add_product(dscores_, q_rows_ + row * width, width, num_rows, count, sums.dk + first * width);
    add_query_gradients<V>(k_columns_.from_key(first), count, sums.dq_lanes + row);
  }

  // P^T = 2^(S^T * scale * log2(e) - lse * log2(e)), zero where masked
  template <int V>
  void probabilities(const BackwardTile& tile, const KeySegment& keys, const float* k) {
    const Vec scale = splat(log2_scale_);
    const bool masked = needs_mask(tile.rows, keys);
    const float *const q = q_lanes_ + keys.first_row(), *const lse = tile.lse_log2 + keys.first_row();
    float* const weights = weights_;
    const int64_t dim = dim_, stride = padded(dim);
    for_row_groups(keys.num_keys(), [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Order::kRowMajor>(k + r * stride, stride, q, kTileRows, dim, acc);
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile.rows, keys.begin + r + i, keys.first_vec + x, score);
        });
      }
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        store(weights + (r + i) * kTileRows + x * kLanes, exp2(score * scale - load(lse + x * kLanes)));
      });
    });
  }

  // dS^T = P^T (V dO^T - delta)
  template <int V>
  void score_gradients(const BackwardTile& tile, const KeySegment& keys, const float* v) {
    const float *const dout = do_lanes_ + keys.first_row(), *const delta = tile.delta + keys.first_row();
    const float* const weights = weights_;
    float* const dscores = dscores_;
    const int64_t dim = value_dim_, stride = padded(dim);
    for_row_groups(keys.num_keys(), [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Order::kRowMajor>(v + r * stride, stride, dout, kTileRows, dim, acc);
      acc.for_each([&](int i, int x, Vec& dp) __attribute__((always_inline)) {
        const int64_t at = (r + i) * kTileRows + x * kLanes;
        store(dscores + at, load(weights + at) * (dp - load(delta + x * kLanes)));
      });
    });
  }

  // sum[key][d] += weights[key][row] * rows[row][d]; here d runs along the lanes.
  void add_product(const float* weights, const float* rows, int64_t width, int64_t num_rows, int64_t num_keys,
                   float* sum) {
    for_column_groups(width, [&]<int V>(int64_t d) __attribute__((always_inline)) {
      for_row_groups(num_keys, [&]<int R>(int64_t r) __attribute__((always_inline)) {
        Accumulator<R, V> acc;
        multiply<Order::kRowMajor>(weights + r * kTileRows, kTileRows, rows + d, width, num_rows, acc);
        acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
          float* const at = sum + (r + i) * width + d + x * kLanes;
          store(at, load(at) + value);
        });
      });
    });
  }

  // dQ^T += K^T dS^T
  template <int V>
  void add_query_gradients(const PanelColumns& k, int64_t num_keys, float* dq_lanes) {
    const float* const dscores = dscores_;
    for_row_groups(dim_, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Order::kColumnMajor>(k.at_dim(d), k.key_stride, dscores, kTileRows, num_keys, acc);
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        float* const at = dq_lanes + (d + i) * kTileRows + x * kLanes;
        store(at, load(at) + value);
      });
    });
  }
};

template <class Element>
class VectorBackward : public BackwardProducts {
 public:
  VectorBackward(const BackwardParams& params, KeyHead at, ScratchCursor& scratch)
      : BackwardProducts(params, scratch), p_(params), at_(at) {}

  void load_chunk(int64_t first, int64_t last) {
    load_key_panel<Element>(p_.k, at_, first, last - first, dim_, k_);
    k_columns_ = is_narrow(p_.shape, p_.mask) ? columns_in_place(k_, dim_)
                                              : copy_columns(k_, last - first, dim_, chunk_keys_, k_copy_);
    load_key_panel<Element>(p_.v, at_, first, last - first, value_dim_, v_);
  }

  void load_rows(const RowTile& tile) {
    const int64_t group = p_.shape.heads_per_group();
    load_tile_rows<Element>(p_.q, group, at_, tile, dim_, q_rows_);
    load_tile_rows<Element>(p_.dout, group, at_, tile, value_dim_, do_rows_);
    rows_to_lanes(q_rows_, dim_, q_lanes_);
    rows_to_lanes(do_rows_, value_dim_, do_lanes_);
  }

 private:
  const BackwardParams& p_;
  const KeyHead at_;
};

}  // namespace mls::cpu::MLS_VARIANT
