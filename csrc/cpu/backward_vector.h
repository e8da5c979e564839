// Backward engine for vector units, on the micro-kernel. Panels hold fp32 (bf16 is widened when keys are
// loaded) or bf16 pairs.
#pragma once
#include "backward.h"
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
class BackwardProducts {
 public:
  // A whole chunk: segments cut it into panels.
  static constexpr int kPanelKeys = kVectorPanelKeys * kMaxPanelsPerChunk;
  static int64_t width(int64_t dim) { return padded(dim); }
  static LaneLayout lanes(int64_t) { return kRowsOfLanes; }
  static int64_t sum_at(int64_t width, int64_t key, int64_t dim) { return key * width + dim; }

  // Depends only on the shape, so that results do not depend on the number of threads.
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
        softcap_(params.softmax_scale, params.softcap),
        chunk_keys_(chunk_keys(params.shape)),
        width_(padded(words<Words>(dim_))),
        value_width_(padded(words<Words>(value_dim_))),
        k_(scratch.objects<float>(chunk_keys_ * width_)),
        k_copy_(scratch.objects<float>(words<Words>(chunk_keys_) * round_up(dim_, kMicroRows))),
        v_(scratch.objects<float>(chunk_keys_ * value_width_)),
        q_lanes_(scratch.objects<float>(kTileRows * width_)),
        do_lanes_(scratch.objects<float>(kTileRows * value_width_)),
        weights_(scratch.objects<float>(kVectorPanelKeys * kTileRows)),
        weight_rows_(panel_of_words(scratch, weights_)),
        dscore_rows_(scratch.objects<float>(kVectorPanelKeys * kRowWords)),
        dscore_keys_(panel_of_words(scratch, dscore_rows_)),
        slopes_(scratch.objects<float>(softcap_.is_on() ? kVectorPanelKeys * kTileRows : 0)) {}

  void differentiate(const BackwardTile& tile, int64_t begin, int64_t end, const Gradients& sums) {
    for (const KeySegment& segment : KeySegments(tile.rows, begin, end, Words::kValues)) {
      for_panels(segment, [&](const KeySegment& keys) {
        with_count<kMicroVecs>(keys.num_vecs, [&]<int V>() { differentiate_panel<V>(tile, keys, sums); });
      });
    }
  }

  bool has_extreme_keys() const { return has_extreme_keys_; }
  bool has_extreme_rows() const { return has_extreme_rows_; }

 protected:
  const int64_t dim_, value_dim_;
  const float log2_scale_;
  const Softcap softcap_;
  const int64_t chunk_keys_;
  bool has_extreme_keys_ = false, has_extreme_values_ = false, has_extreme_rows_ = false;
  const int64_t width_, value_width_;  // padded(words of D), padded(words of Dv)
  float* const k_;                     // [chunk keys][width]
  float* const k_copy_;                // K in the order of copy_columns
  PanelColumns k_columns_{};           // K in k_copy_ or where it was loaded; its "keys" are words of keys
  float* const v_;                     // [chunk keys][value width]
  float* const q_lanes_;               // [width][kTileRows]
  float* const do_lanes_;              // [value width][kTileRows]
  const float* q_rows_ = nullptr;      // [words of kTileRows][padded(D)]
  const float* do_rows_ = nullptr;     // [words of kTileRows][padded(Dv)]

 private:
  static constexpr int64_t kRowWords = kTileRows / Words::kValues;

  // Memory for a panel's values in another kind of words, or `values` where both kinds are the same.
  static float* panel_of_words(ScratchCursor& scratch, float* values) {
    return Words::kValues == 1 ? values : scratch.objects<float>(kVectorPanelKeys * kRowWords);
  }

  template <int V>
  void differentiate_panel(const BackwardTile& tile, const KeySegment& keys, const Gradients& sums) {
    const int64_t first = keys.begin - sums.first_key, count = keys.num_keys(), row = keys.first_row();
    const int64_t num_rows = std::min<int64_t>(V * kLanes, tile.rows.num_rows - row);
    probabilities<V>(tile, keys, k_ + first * width_);
    score_gradients<V>(tile, keys, v_ + first * value_width_);
    const int64_t row_word = words<Words>(row), dim = padded(dim_), value_dim = padded(value_dim_);
    add_product(weight_rows_, do_rows_ + row_word * value_dim, value_dim, num_rows, count,
                sums.dv + first * value_dim);
    add_product(dscore_rows_, q_rows_ + row_word * dim, dim, num_rows, count, sums.dk + first * dim);
    add_query_gradients<V>(k_columns_.from_key(words<Words>(first)), count, sums.dq_lanes + row);
  }

  // P^T = 2^(S^T * scale * log2(e) - lse * log2(e)), zero where masked
  template <int V>
  void probabilities(const BackwardTile& tile, const KeySegment& keys, const float* k) {
    const Vec scale = splat(log2_scale_);
    const bool masked = needs_mask(tile.rows, keys), isolated = masked && needs_isolation(tile);
    const float *const q = q_lanes_ + keys.first_row(), *const lse = tile.lse_log2 + keys.first_row();
    float *const weights = weights_, *const weight_rows = weight_rows_, *const slopes = slopes_;
    const int64_t depth = words<Words>(dim_), stride = width_;
    const Softcap softcap = softcap_;
    for_row_groups<Words::kValues>(keys.num_keys(), [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Words, Order::kRowMajor>(k + r * stride, stride, q, kTileRows, depth, acc);
      if (softcap.is_on()) {  // before the mask: -inf would become a finite score
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          const Vec tanh = softcap.tanh_of(score);
          store(slopes + (r + i) * kTileRows + x * kLanes, 1.0f - tanh * tanh);
          score = tanh * softcap.outer;
        });
      }
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile.rows, keys.begin + r + i, keys.first_vec + x, score);
        });
      }
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        score = exp2(score * scale - load(lse + x * kLanes));
        store(weights + (r + i) * kTileRows + x * kLanes, score);
      });
      if (isolated) {
        clear_masked(tile.rows, keys, r, acc);
        acc.for_each([&](int i, int x, Vec& weight) __attribute__((always_inline)) {
          store(weights + (r + i) * kTileRows + x * kLanes, weight);
        });
      }
      if constexpr (Words::kValues > 1) Words::store_row_words(acc, weight_rows + r * kRowWords);
    });
  }

  // Whether masked P and dS may be NaN.
  bool needs_isolation(const BackwardTile& tile) const {
    return tile.has_nan || has_extreme_rows_ || has_extreme_values_;
  }

  // Sets values to zero where rows may not see keys, which count from r in the segment.
  template <int R, int V>
  static MLS_INLINE void clear_masked(const RowTile& tile, const KeySegment& keys, int64_t r,
                                      Accumulator<R, V>& acc) {
    acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
      value = select(sees(tile, keys.begin + r + i, keys.first_vec + x), value, Vec{});
    });
  }

  // dS^T = P^T (V dO^T - delta), times the slopes of a softcap, zero where masked
  template <int V>
  void score_gradients(const BackwardTile& tile, const KeySegment& keys, const float* v) {
    const bool isolated = needs_isolation(tile) && needs_mask(tile.rows, keys);
    const float *const dout = do_lanes_ + keys.first_row(), *const delta = tile.delta + keys.first_row();
    const float *const weights = weights_, *const slopes = slopes_;
    const bool has_slopes = softcap_.is_on();
    float *const dscore_rows = dscore_rows_, *const dscore_keys = dscore_keys_;
    const int64_t depth = words<Words>(value_dim_), stride = value_width_;
    for_row_groups<Words::kValues>(keys.num_keys(), [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Words, Order::kRowMajor>(v + r * stride, stride, dout, kTileRows, depth, acc);
      acc.for_each([&](int i, int x, Vec& dp) __attribute__((always_inline)) {
        dp = load(weights + (r + i) * kTileRows + x * kLanes) * (dp - load(delta + x * kLanes));
      });
      if (has_slopes) {
        acc.for_each([&](int i, int x, Vec& dscore) __attribute__((always_inline)) {
          dscore *= load(slopes + (r + i) * kTileRows + x * kLanes);
        });
      }
      if (isolated) clear_masked(tile.rows, keys, r, acc);
      Words::store_row_words(acc, dscore_rows + r * kRowWords);
      Words::store_key_words(acc, dscore_keys + words<Words>(r) * kTileRows);
    });
  }

  // sum[key][d] += weights[key][row] * rows[row][d]. Here d runs along the lanes, and words hold values of
  // several rows.
  void add_product(const float* weights, const float* rows, int64_t width, int64_t num_rows, int64_t num_keys,
                   float* sum) {
    for_column_groups(width, [&]<int V>(int64_t d) __attribute__((always_inline)) {
      for_row_groups(num_keys, [&]<int R>(int64_t r) __attribute__((always_inline)) {
        Accumulator<R, V> acc;
        multiply<Words, Order::kRowMajor>(weights + r * kRowWords, kRowWords, rows + d, width,
                                          words<Words>(num_rows), acc);
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
    const float* const dscores = dscore_keys_;
    for_row_groups(dim_, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, V> acc;
      multiply<Words, Order::kColumnMajor>(k.at_dim(d), k.key_stride, dscores, kTileRows,
                                           words<Words>(num_keys), acc);
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        float* const at = dq_lanes + (d + i) * kTileRows + x * kLanes;
        store(at, load(at) + value);
      });
    });
  }

  float* const weights_;      // P^T: [kVectorPanelKeys][kTileRows]
  float* const weight_rows_;  // P^T in words of rows: [kVectorPanelKeys][kRowWords]
  float* const dscore_rows_;  // dS^T in words of rows, the same shape
  float* const dscore_keys_;  // dS^T in words of keys: [words of kVectorPanelKeys][kTileRows]
  float* const slopes_;       // with a softcap, the derivative of S^T: [kVectorPanelKeys][kTileRows]
};

template <class Operands>
class VectorBackward : public BackwardProducts<typename Operands::Words> {
 public:
  using Words = typename Operands::Words;
  using Products = BackwardProducts<Words>;

  VectorBackward(const BackwardParams& params, KeyHead at, ScratchCursor& scratch)
      : Products(params, scratch),
        p_(params),
        at_(at),
        k_joined_(scratch.objects<float>(Words::joined_words(chunk_keys_, dim_))),
        q_loaded_(scratch.objects<float>(kTileRows * width_)),
        q_joined_(scratch.objects<float>(Words::joined_words(kTileRows, dim_))),
        do_loaded_(scratch.objects<float>(kTileRows * value_width_)),
        do_joined_(scratch.objects<float>(Words::joined_words(kTileRows, value_dim_))) {}

  void load_chunk(int64_t first, int64_t last) {
    const int64_t count = last - first;
    Operands::load_keys(p_.k, at_, first, count, dim_, k_);
    const float* const k = Words::join_rows(k_, count, dim_, k_joined_);
    has_extreme_keys_ = any_extreme<Words>(k, words<Words>(count) * padded(dim_));
    if (!has_extreme_keys_ && is_narrow(p_.shape, p_.mask)) {
      k_columns_ = columns_in_place(k, dim_);
    } else {
      k_columns_ = copy_columns(k, words<Words>(count), dim_, words<Words>(chunk_keys_), k_copy_);
    }
    // Only in the copy: the scores need the original values of k_.
    if (has_extreme_keys_) {
      clear_non_finite<Words>(k_copy_, words<Words>(chunk_keys_) * round_up(dim_, kMicroRows));
    }
    Operands::load_keys(p_.v, at_, first, count, value_dim_, v_);
    has_extreme_values_ = any_extreme<Words>(v_, count * value_width_);
  }

  void load_rows(const RowTile& tile) {
    has_extreme_rows_ = false;
    q_rows_ = load_rows(p_.q, tile, dim_, q_loaded_, q_joined_, q_lanes_);
    do_rows_ = load_rows(p_.dout, tile, value_dim_, do_loaded_, do_joined_, do_lanes_);
  }

 private:
  using Products::dim_, Products::value_dim_, Products::chunk_keys_, Products::width_, Products::value_width_,
      Products::k_, Products::k_copy_, Products::k_columns_, Products::v_, Products::q_lanes_,
      Products::do_lanes_, Products::q_rows_, Products::do_rows_, Products::has_extreme_keys_,
      Products::has_extreme_values_, Products::has_extreme_rows_;

  // Fills `lanes`; returns the rows in words of rows, `loaded` or `joined`, with zeros instead of non-finite
  // values.
  const float* load_rows(const TokenTensor<const void>& tensor, const RowTile& tile, int64_t dim,
                         float* loaded, float* joined, float* lanes) {
    Operands::load_rows(tensor, p_.shape.heads_per_group(), at_, tile, dim, loaded);
    rows_to_lanes(loaded, words<Words>(dim), lanes);
    float* const rows = Words::join_rows(loaded, kTileRows, dim, joined);
    has_extreme_rows_ |= clear_if_extreme<Words>(rows, words<Words>(kTileRows) * padded(dim));
    return rows;
  }

  const BackwardParams& p_;
  const KeyHead at_;
  // Rows as they were loaded, and as join_rows() joins them:
  float* const k_joined_;                      // [words of chunk keys][padded(D)]
  float *const q_loaded_, *const q_joined_;    // [kTileRows][width], [words of kTileRows][padded(D)]
  float *const do_loaded_, *const do_joined_;  // the same for dO, with Dv
};

}  // namespace mls::cpu::MLS_VARIANT
