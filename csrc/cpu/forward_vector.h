// Forward engine for vector units: fp32 panels (bf16 is widened when keys are loaded) and the micro-kernel.
#pragma once
#include "key_segments.h"
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// All that works on fp32, whatever the element type.
class ForwardProducts {
 public:
  // Keys loaded at a time: every row tile then meets several panels in a row and keeps its Q and O in the L1
  // cache.
  static constexpr int kPanelKeys = kVectorPanelKeys * kPanelsPerChunk;
  static int64_t width(int64_t dim) { return padded(dim); }
  static LaneLayout lanes(int64_t) { return kRowsOfLanes; }

  // Q and O of a block leave half of the L2 cache.
  static int64_t most_block_tiles(const AttentionShape& shape) {
    const int64_t dims = padded(shape.head_dim) + padded(shape.value_dim);
    return kBlockBytes / (kTileRows * dims * static_cast<int64_t>(sizeof(float)));
  }

  ForwardProducts(const ForwardParams& params, int64_t block_tiles, ScratchCursor& scratch)
      : dim_(params.shape.head_dim),
        value_dim_(params.shape.value_dim),
        log2_scale_(params.softmax_scale * kLog2E),
        q_(scratch.objects<float>(block_tiles * padded(dim_) * kTileRows)),
        k_(scratch.objects<float>(kPanelKeys * padded(dim_))),
        v_(scratch.objects<float>(kPanelKeys * padded(value_dim_))),
        v_copy_(scratch.objects<float>(kPanelKeys * round_up(value_dim_, kMicroRows))),
        scores_(scratch.objects<float>(kVectorPanelKeys * kTileRows)) {}

  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t first, int64_t begin, int64_t end,
              float* out) {
    const float* const q = q_ + t * padded(dim_) * kTileRows;
    for (const KeySegment& segment : KeySegments(tile, begin, end)) {
      for_panels(segment, [&](const KeySegment& keys) {
        const float* const k = k_ + (keys.begin - first) * padded(dim_);
        const PanelColumns v = v_columns_.from_key(keys.begin - first);
        with_count<kMicroVecs>(keys.num_vecs, [&]<int V>() {
          Vec top[V];
          score_keys<V>(tile, keys, k, q + keys.first_row(), top);
          SoftmaxStep<V> step(state, top, log2_scale_, keys.first_row());
          weigh_keys<V>(keys.num_keys(), step);
          step.finish(state, keys.first_row());
          add_values<V>(step, v, keys.num_keys(), out + keys.first_row());
        });
      });
    }
  }

 protected:
  const int64_t dim_, value_dim_;
  const float log2_scale_;
  float* const q_;            // per row tile: Q^T, [padded(D)][kTileRows]
  float* const k_;            // [kPanelKeys][padded(D)]
  float* const v_;            // [kPanelKeys][padded(Dv)]
  float* const v_copy_;       // the same in the order of copy_columns
  PanelColumns v_columns_{};  // one of the two
  float* const scores_;       // S^T, then P^T: [kVectorPanelKeys][kTileRows]

 private:
  // scores = S^T, -inf where masked; top = their maximum.
  template <int V>
  void score_keys(const RowTile& tile, const KeySegment& keys, const float* k, const float* q,
                  Vec (&top)[V]) {
    const bool masked = needs_mask(tile, keys);
    float* const scores = scores_;
    const int64_t dim = dim_, stride = padded(dim);
#pragma GCC unroll 8
    for (int x = 0; x < V; ++x) top[x] = splat(-kInfinity);
    for_row_groups(keys.num_keys(), [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Order::kRowMajor>(k + r * stride, stride, q, kTileRows, dim, acc);
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile, keys.begin + r + i, keys.first_vec + x, score);
        });
      }
      Vec highest[V];  // `top` itself would be written to memory after every score, which it might alias
#pragma GCC unroll 8
      for (int x = 0; x < V; ++x) highest[x] = top[x];
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        highest[x] = max(score, highest[x]);
        store(scores + (r + i) * kTileRows + x * kLanes, score);
      });
#pragma GCC unroll 8
      for (int x = 0; x < V; ++x) top[x] = highest[x];
    });
  }

  // P^T in place of S^T
  template <int V>
  void weigh_keys(int64_t num_keys, SoftmaxStep<V>& result) {
    SoftmaxStep<V> step = result;
    float* const scores = scores_;
    for (int64_t r = 0; r < num_keys; ++r) {
#pragma GCC unroll 8
      for (int x = 0; x < V; ++x) {
        float* const at = scores + r * kTileRows + x * kLanes;
        store(at, step.weight(x, load(at)));
      }
    }
    result = step;
  }

  // O^T = rescale * O^T + V^T P^T
  template <int V>
  void add_values(const SoftmaxStep<V>& step, const PanelColumns& v, int64_t num_keys, float* out) {
    const float* const weights = scores_;
    for_row_groups(value_dim_, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      float* const tile = out + d * kTileRows;
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        value = load(tile + i * kTileRows + x * kLanes) * step.rescale[x];
      });
      multiply_add<Order::kColumnMajor>(v.at_dim(d), v.key_stride, weights, kTileRows, num_keys, acc);
      acc.for_each([&](int i, int x, Vec& value)
                       __attribute__((always_inline)) { store(tile + i * kTileRows + x * kLanes, value); });
    });
  }
};

template <class Element>
class VectorForward : public ForwardProducts {
 public:
  VectorForward(const ForwardParams& params, KeyHead at, int64_t block_tiles, ScratchCursor& scratch)
      : ForwardProducts(params, block_tiles, scratch),
        p_(params),
        at_(at),
        rows_(scratch.objects<float>(kTileRows * padded(dim_))) {}

  void load_rows(int t, const RowTile& tile) {
    load_tile_rows<Element>(p_.q, p_.shape.heads_per_group(), at_, tile, dim_, rows_);
    rows_to_lanes(rows_, dim_, q_ + t * padded(dim_) * kTileRows);
  }

  void load_panel(int64_t first, int64_t last) {
    load_key_panel<Element>(p_.k, at_, first, last - first, dim_, k_);
    load_key_panel<Element>(p_.v, at_, first, last - first, value_dim_, v_);
    v_columns_ = is_narrow(p_.shape, p_.mask)
                     ? columns_in_place(v_, value_dim_)
                     : copy_columns(v_, last - first, value_dim_, kPanelKeys, v_copy_);
  }

 private:
  const ForwardParams& p_;
  const KeyHead at_;
  float* const rows_;  // staging: [kTileRows][padded(D)]
};

}  // namespace mls::cpu::MLS_VARIANT
