// Forward engine for vector units: fp32 panels (bf16 is widened when a panel is
// loaded) and the micro-kernel.
#pragma once
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
class VectorForward {
 public:
  static constexpr int kPanelKeys = kVectorPanelKeys;
  static int64_t width(int64_t dim) { return padded(dim); }

  VectorForward(const ForwardParams& params, KeyHead at, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        dim_(params.shape.head_dim),
        value_dim_(params.shape.value_dim),
        log2_scale_(params.softmax_scale * kLog2E),
        q_(scratch.objects<float>(block_tiles(params.shape) * padded(dim_) * kTileRows)),
        k_(scratch.objects<float>(kPanelKeys * padded(dim_))),
        v_(scratch.objects<float>(kPanelKeys * padded(value_dim_))),
        scores_(scratch.objects<float>(kPanelKeys * kTileRows)),
        rows_(scratch.objects<float>(kTileRows * padded(dim_))) {}

  void load_rows(int t, const RowTile& tile) {
    load_tile_rows<Element>(p_.q, p_.shape.heads_per_group(), at_, tile, dim_, rows_);
    rows_to_lanes(rows_, dim_, q_ + t * padded(dim_) * kTileRows);
  }

  void load_panel(int64_t first, int64_t last) {
    load_key_panel<Element>(p_.k, at_, first, last - first, dim_, k_);
    load_key_panel<Element>(p_.v, at_, first, last - first, value_dim_, v_);
  }

  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t first, int64_t begin, int64_t end,
              float* out) {
    Vec top[kMicroVecs];
    score_keys(t, tile, first, begin, end, top);
    SoftmaxStep step(state, top, log2_scale_);
    for (int64_t r = 0; r < end - begin; ++r) {
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) {
        float* at = scores_ + r * kTileRows + x * kLanes;
        store(at, step.weight(x, load(at)));
      }
    }
    step.finish(state);
    add_values(step, v_ + (begin - first) * padded(value_dim_), end - begin, out);
  }

 private:
  // scores = S^T, -inf where masked; top = their maximum.
  void score_keys(int t, const RowTile& tile, int64_t first, int64_t begin, int64_t end,
                  Vec (&top)[kMicroVecs]) {
    const float* k = k_ + (begin - first) * padded(dim_);
    const float* q = q_ + t * padded(dim_) * kTileRows;
    const bool masked = tile.needs_mask(begin, end);
#pragma GCC unroll 8
    for (int x = 0; x < kMicroVecs; ++x) top[x] = splat(-kInfinity);
    for_row_groups(end - begin, [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kRowMajor>(k + r * padded(dim_), padded(dim_), q, kTileRows, dim_, acc);
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile, begin + r + i, x, score);
        });
      }
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        top[x] = max(score, top[x]);
        store(scores_ + (r + i) * kTileRows + x * kLanes, score);
      });
    });
  }

  // O^T = rescale * O^T + V^T P^T
  void add_values(const SoftmaxStep& step, const float* v, int64_t num_keys, float* out) {
    for_row_groups(value_dim_, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      float* tile = out + d * kTileRows;
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        value = load(tile + i * kTileRows + x * kLanes) * step.rescale[x];
      });
      multiply_add<Order::kColumnMajor>(v + d, padded(value_dim_), scores_, kTileRows, num_keys, acc);
      acc.for_each([&](int i, int x, Vec& value)
                       __attribute__((always_inline)) { store(tile + i * kTileRows + x * kLanes, value); });
    });
  }

  const ForwardParams& p_;
  const KeyHead at_;
  const int64_t dim_, value_dim_;
  const float log2_scale_;
  float* const q_;       // per row tile: Q^T, [padded(D)][kTileRows]
  float* const k_;       // [kPanelKeys][padded(D)]
  float* const v_;       // [kPanelKeys][padded(Dv)]
  float* const scores_;  // S^T, then P^T: [kPanelKeys][kTileRows]
  float* const rows_;    // staging: [kTileRows][padded(D)]
};

}  // namespace mls::cpu::MLS_VARIANT
