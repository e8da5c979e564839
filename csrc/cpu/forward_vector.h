// Forward engine for vector units, on the micro-kernel. Panels hold fp32 (bf16 is widened when keys are
// loaded) or bf16 pairs.
#pragma once
#include "isolation.h"
#include "key_segments.h"
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// The part of the engine that does not depend on how words are loaded.
template <class Words>
class ForwardProducts {
 public:
  // Keys loaded together: several panels, so that a row tile attends to all of them while its Q and O are in
  // the L1 cache.
  static constexpr int kPanelKeys = kVectorPanelKeys * kPanelsPerChunk;
  static int64_t panel_keys(const AttentionShape&) { return kPanelKeys; }
  static int64_t width(int64_t dim) { return padded(dim); }
  static LaneLayout lanes(int64_t) { return kRowsOfLanes; }

  // Q and O of a block take at most half of the L2 cache.
  static int64_t most_block_tiles(const AttentionShape& shape) {
    const int64_t words_of_row = padded(words<Words>(shape.head_dim)) + padded(shape.value_dim);
    return kBlockBytes / (kTileRows * words_of_row * static_cast<int64_t>(sizeof(float)));
  }

  ForwardProducts(const ForwardParams& params, int64_t block_tiles, ScratchCursor& scratch)
      : dim_(params.shape.head_dim),
        value_dim_(params.shape.value_dim),
        log2_scale_(params.softmax_scale * kLog2E),
        softcap_(params.softmax_scale, params.softcap),
        width_(padded(words<Words>(dim_))),
        value_width_(padded(value_dim_)),
        q_(scratch.objects<float>(block_tiles * width_ * kTileRows)),
        k_(scratch.objects<float>(kPanelKeys * width_)),
        v_copy_(scratch.objects<float>(words<Words>(kPanelKeys) * round_up(value_dim_, kMicroRows))),
        scores_(scratch.objects<float>(kVectorPanelKeys * kTileRows)) {}

  void clear(int, float* out) { std::memset(out, 0, value_width_ * kTileRows * sizeof(float)); }
  void complete(int, float*) {}
  void finish_panel() {}
  bool has_extreme_values() const { return has_extreme_values_; }
  static constexpr int kPrefetchRowTiles = 0;  // no prefetching
  void prefetch_keys_later(int64_t, int64_t) {}

  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t, int64_t begin, int64_t end,
              float* out) {
    const float* const q = q_ + t * width_ * kTileRows;
    for (const KeySegment& segment : KeySegments(tile, begin, end, Words::kValues)) {
      for_panels(segment, [&](const KeySegment& keys) {
        const float* const k = k_ + (keys.begin - first_key_) * width_;
        const PanelColumns v = v_columns_.from_key(words<Words>(keys.begin - first_key_));
        with_count<kMicroVecs>(keys.num_vecs, [&]<int V>() {
          Vec top[V];
          score_keys<V>(tile, keys, k, q + keys.first_row(), top);
          SoftmaxStep<V> step(state, top, log2_scale_, keys.first_row());
          exponentiate<V>(keys.num_keys(), step);
          step.finish(state, keys.first_row());
          add_values<V>(step, v, keys.num_keys(), out + keys.first_row());
        });
      });
    }
  }

 protected:
  const int64_t dim_, value_dim_;
  const float log2_scale_;
  const Softcap softcap_;
  const int64_t width_;  // of Q and K: padded(words of D)
  const int64_t value_width_;
  float* const q_;            // per row tile: Q^T, [width][kTileRows]
  int64_t first_key_ = 0;     // the first of the loaded keys
  float* const k_;            // [kPanelKeys][width]
  float* const v_copy_;       // V in the order of copy_columns
  PanelColumns v_columns_{};  // V in v_copy_ or where it was loaded; its "keys" are words of keys
  bool has_extreme_values_ = false;
  float* const scores_;  // S^T, then P^T in words of keys: [kVectorPanelKeys][kTileRows]

 private:
  // scores = S^T, -inf where masked; top = their maximum.
  template <int V>
  void score_keys(const RowTile& tile, const KeySegment& keys, const float* k, const float* q,
                  Vec (&top)[V]) {
    const bool masked = needs_mask(tile, keys);
    float* const scores = scores_;
    const int64_t depth = words<Words>(dim_), stride = width_;
    const Softcap softcap = softcap_;
#pragma GCC unroll 8
    for (int x = 0; x < V; ++x) top[x] = splat(-kInfinity);
    for_row_groups(keys.num_keys(), [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Words, Order::kRowMajor>(k + r * stride, stride, q, kTileRows, depth, acc);
      if (softcap.is_on()) {  // before the mask: -inf would become a finite score
        acc.for_each([&](int, int, Vec& score)
                         __attribute__((always_inline)) { score = softcap.tanh_of(score) * softcap.outer; });
      }
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile, keys.begin + r + i, keys.first_vec + x, score);
        });
      }
      Vec highest[V];  // a copy: `top` might alias the scores, and would be stored after each of them
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

  // Replaces S^T by P^T.
  template <int V>
  void exponentiate(int64_t num_keys, SoftmaxStep<V>& result) {
    SoftmaxStep<V> step = result;
    float* const scores = scores_;
    for (int64_t r = 0; r < num_keys; r += Words::kValues) {
#pragma GCC unroll 8
      for (int x = 0; x < V; ++x) {
        Vec weights[Words::kValues];
#pragma GCC unroll 2
        for (int i = 0; i < Words::kValues; ++i)
          weights[i] = step.weight(x, load(scores + (r + i) * kTileRows + x * kLanes));
        store(scores + r / Words::kValues * kTileRows + x * kLanes, Words::join(weights));
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
      multiply_add<Words, Order::kColumnMajor>(v.at_dim(d), v.key_stride, weights, kTileRows,
                                               words<Words>(num_keys), acc);
      acc.for_each([&](int i, int x, Vec& value)
                       __attribute__((always_inline)) { store(tile + i * kTileRows + x * kLanes, value); });
    });
  }
};

template <class Operands>
class VectorForward : public ForwardProducts<typename Operands::Words> {
 public:
  using Words = typename Operands::Words;
  using Products = ForwardProducts<Words>;
  using Products::kPanelKeys;

  VectorForward(const ForwardParams& params, KeyHead at, int64_t block_tiles, ScratchCursor& scratch)
      : Products(params, block_tiles, scratch),
        p_(params),
        at_(at),
        rows_(scratch.objects<float>(kTileRows * width_)),
        v_rows_(scratch.objects<float>(kPanelKeys * padded(words<Words>(value_dim_)))),
        v_joined_(scratch.objects<float>(Words::joined_words(kPanelKeys, value_dim_))) {}

  void load_rows(int t, const RowTile& tile) {
    Operands::load_rows(p_.q, p_.shape.heads_per_group(), at_, tile, dim_, rows_);
    rows_to_lanes(rows_, words<Words>(dim_), q_ + t * width_ * kTileRows);
  }

  void load_panel(int64_t, int64_t begin, int64_t end) {
    first_key_ = begin / Words::kValues * Words::kValues;
    const int64_t count = end - first_key_;
    Operands::load_keys(p_.k, at_, first_key_, count, dim_, k_);
    Operands::load_keys(p_.v, at_, first_key_, count, value_dim_, v_rows_);
    const int64_t loaded = round_up(count, Words::kValues) * padded(words<Words>(value_dim_));
    has_extreme_values_ = clear_if_extreme<Words>(v_rows_, loaded);
    const float* const v = Words::join_rows(v_rows_, count, value_dim_, v_joined_);
    v_columns_ = is_narrow(p_.shape, p_.mask)
                     ? columns_in_place(v, value_dim_)
                     : copy_columns(v, words<Words>(count), value_dim_, words<Words>(kPanelKeys), v_copy_);
  }

 private:
  using Products::dim_, Products::value_dim_, Products::width_, Products::q_, Products::first_key_,
      Products::k_, Products::v_copy_, Products::v_columns_, Products::has_extreme_values_;

  const ForwardParams& p_;
  const KeyHead at_;
  float* const rows_;      // staging: [kTileRows][width]
  float* const v_rows_;    // [kPanelKeys][padded(words of Dv)]
  float* const v_joined_;  // V in words of keys, if that differs from v_rows_
};

}  // namespace mls::cpu::MLS_VARIANT
