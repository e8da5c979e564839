// Backward engine for AMX: operands of one bf16 part (bf16; P and dS are rounded) or of three (fp32), with
// fp32 sums.
//
// Keys are processed in steps. In fp32, three steps are in flight: while the vector units turn S^T and dP^T
// of the current step into P^T and dS^T, the tile unit computes S^T and dP^T of the next step and adds the
// previous step to dV, dK and dQ.
#pragma once
#include "amx_exp2.h"
#include "amx_pack.h"
#include "amx_products.h"
#include "backward.h"
#include "row_tile.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
class AmxBackward {
  static constexpr int kParts = kAmxParts<Element>;

 public:
  static constexpr int kPanelKeys = kAmxMaxChunkKeys;  // at least a whole chunk
  static int64_t width(int64_t dim) { return amx_width(dim); }
  static LaneLayout lanes(int64_t width) { return amx_lanes(width); }
  static int64_t sum_at(int64_t width, int64_t key, int64_t dim) {
    return key / kAmxTile * kAmxTile * width + dim / kAmxRow * kAmxTileWords + key % kAmxTile * kAmxRow;
  }
  static int64_t chunk_keys(const AttentionShape& shape) {
    const int64_t key_bytes = amx_width(shape.head_dim) * (2 * kParts * sizeof(uint16_t) + sizeof(float)) +
                              amx_width(shape.value_dim) * (kParts * sizeof(uint16_t) + sizeof(float));
    const int64_t task_keys = shape.batch * shape.num_kv_heads * shape.num_keys / kWantedBackwardTasks;
    const int64_t keys = std::clamp<int64_t>(task_keys, kAmxMinChunkKeys, kAmxMaxChunkKeys);
    return std::max<int64_t>(kAmxBlock, std::min(keys, kAmxChunkBytes / key_bytes) / kAmxBlock * kAmxBlock);
  }

  AmxBackward(const BackwardParams& params, KeyHead at, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        width_(amx_width(params.shape.head_dim)),
        value_width_(amx_width(params.shape.value_dim)),
        log2_scale_(params.softmax_scale * kLog2E),
        k_(allocate_parts<kParts, uint16_t>(scratch, chunk_keys(params.shape) * width_)),
        k_columns_(allocate_parts<kParts, uint16_t>(scratch, chunk_keys(params.shape) * width_)),
        v_(allocate_parts<kParts, uint16_t>(scratch, chunk_keys(params.shape) * value_width_)),
        q_lanes_(allocate_parts<kParts, uint32_t>(scratch, kTileRows * width_ / 2)),
        q_pairs_(allocate_parts<kParts, uint32_t>(scratch, kTileRows * width_ / 2)),
        do_lanes_(allocate_parts<kParts, uint32_t>(scratch, kTileRows * value_width_ / 2)),
        do_pairs_(allocate_parts<kParts, uint32_t>(scratch, kTileRows * value_width_ / 2)),
        scores_(scratch.objects<Scores>(kStepsInFlight)),
        rows_(allocate_parts<kParts, uint16_t>(scratch, kTileRows * std::max(width_, value_width_))) {
    const int64_t row_lines = AmxPrefetch::lines(p_.shape.head_dim * sizeof(float)) +
                              AmxPrefetch::lines(p_.shape.head_dim * kElementBytes) +
                              AmxPrefetch::lines(p_.shape.value_dim * kElementBytes);
    prefetch_ = AmxPrefetch(scratch.objects<const char*>(kTileRows * row_lines));
  }

  void load_chunk(int64_t first, int64_t last) {
    const AttentionShape& shape = p_.shape;
    has_extreme_keys_ = has_extreme_values_ = false;
    for (int64_t key = first; key < last; key += kAmxBlock) {
      const int64_t count = std::min<int64_t>(kAmxBlock, last - key), to = key - first;
      const int64_t next = key + kAmxBlock, next_end = std::min(next + kAmxBlock, last);
      prefetch_key_rows<Element>(p_.k, at_, next, next_end, shape.head_dim);
      prefetch_key_rows<Element>(p_.v, at_, next, next_end, shape.value_dim);
      const AmxPartRows k = key_rows<Element>(p_.k, at_, key, count, shape.head_dim, rows_);
      for (int part = 0; part < kParts; ++part) rows_to_tiles(k[part], width_, k_[part] + to * width_);
      const AmxPartRows finite = finite_rows<kParts>(k, kAmxBlock, width_, rows_, has_extreme_keys_);
      for (int part = 0; part < kParts; ++part)
        keys_to_column_tiles(finite[part], width_, k_columns_[part] + to * width_);
      const AmxPartRows v = key_rows<Element>(p_.v, at_, key, count, shape.value_dim, rows_);
      for (int part = 0; part < kParts; ++part)
        rows_to_tiles(v[part], value_width_, v_[part] + to * value_width_);
      has_extreme_values_ |= any_extreme(v[0], kAmxBlock, value_width_);
    }
  }

  void load_rows(const RowTile& tile) {
    has_extreme_rows_ = false;
    load_rows(p_.q, tile, p_.shape.head_dim, q_lanes_, q_pairs_);
    load_rows(p_.dout, tile, p_.shape.value_dim, do_lanes_, do_pairs_);
    prefetch_rows(tile);
  }

  // Computes whole blocks of kAmxBlock keys; keys outside [begin, end) are masked like any other.
  void differentiate(const BackwardTile& tile, int64_t begin, int64_t end, const Gradients& sums) {
    for (int x = 0; x < kTileRows; x += kLanes) store(minus_delta_ + x, -load(tile.delta + x));
    const int64_t last = round_up(end - sums.first_key, kAmxBlock);
    int64_t key = (begin - sums.first_key) / kAmxBlock * kAmxBlock;
    Step older, current;
    for (int n = 0; key < last; key += kStepKeys, ++n) {
      const Step next{key, std::min<int64_t>(kStepKeys, last - key), scores_ + n % kStepsInFlight};
      advance(older, current, next, tile, sums);
      older = current, current = next;
    }
    advance(older, current, {}, tile, sums);
    advance(current, {}, {}, tile, sums);
    products_.finish();
  }

  bool has_extreme_keys() const { return has_extreme_keys_; }
  bool has_extreme_rows() const { return has_extreme_rows_; }

 private:
  // With one part, there are too few products to interleave the other work with.
  static constexpr bool kPipelined = kParts > 1;
  static constexpr int kStepsInFlight = kPipelined ? 3 : 1;
  static constexpr int kStepKeys = kPipelined ? kAmxBlock : 128;
  static constexpr int kStrips = kTileRows / kAmxBlock;
  // Words per step and vector of rows. Four cache lines are left unused, so that the vectors and parts of a
  // key are not all at the same offset within a page: 3 % faster.
  static constexpr int kVectorWords = (kStepKeys + 4) * kAmxRow;
  static constexpr int kStepWords = kMicroVecs * kVectorWords / 2;  // per part of dS^T in pairs of keys
  static constexpr int64_t kElementBytes = sizeof(typename Element::Storage);

  // S^T and dP^T - delta of a step; the tiles of a vector of rows are consecutive. P^T and dS^T in pairs of
  // rows replace them: vectors x and x + kStrips become the first parts of a strip, and a third part follows.
  struct alignas(kAmxTileBytes) Scores {
    static constexpr int kVectors = std::max(kMicroVecs, kParts* kStrips);
    float s[kVectors * kVectorWords], dp[kVectors * kVectorWords];
    uint32_t key_pairs[kParts * kStepWords];  // dS^T in pairs of keys
  };

  // What is masked: nothing, the scores, or also P and dS (isolation.h).
  enum class Masking { kNone, kScores, kIsolated };

  // Keys [key, key + num_keys) of the chunk.
  struct Step {
    int64_t key = 0, num_keys = 0;  // 0: no step
    Scores* scores = nullptr;

    bool exists() const { return num_keys > 0; }
  };

  void load_rows(const TokenTensor<const void>& tensor, const RowTile& tile, int64_t dim,
                 AmxParts<uint32_t> lanes, AmxParts<uint32_t> pairs) {
    const AmxPartRows rows = tile_rows<Element>(tensor, p_.shape.heads_per_group(), at_, tile, dim, rows_);
    for (int part = 0; part < kParts; ++part)
      rows_to_word_tiles(rows[part], kTileRows, amx_width(dim), lanes[part]);
    const AmxPartRows finite = finite_rows<kParts>(rows, kTileRows, amx_width(dim), rows_, has_extreme_rows_);
    for (int part = 0; part < kParts; ++part)
      rows_to_pair_tiles(finite[part], kTileRows, amx_width(dim), pairs[part]);
  }

  // Prefetches what the end of this row tile and the start of the next need from memory: rows of one head are
  // far apart, so hardware prefetchers do not fetch them.
  void prefetch_rows(const RowTile& tile) {
    prefetch_.clear();
    for (int64_t row = tile.first_row; row < tile.first_row + tile.num_rows; ++row) {
      if (p_.dq.data != nullptr) {
        prefetch_.add(row_pointer(p_.dq, p_.shape.heads_per_group(), at_, row),
                      p_.shape.head_dim * sizeof(float));
      }
      if (row < kTileRows) continue;
      prefetch_.add(element_row(p_.q, row - kTileRows), p_.shape.head_dim * kElementBytes);
      prefetch_.add(element_row(p_.dout, row - kTileRows), p_.shape.value_dim * kElementBytes);
    }
  }
  MLS_INLINE const void* element_row(const TokenTensor<const void>& tensor, int64_t row) {
    return row_pointer(typed<Element>(tensor), p_.shape.heads_per_group(), at_, row);
  }

  void advance(const Step& older, const Step& current, const Step& next, const BackwardTile& tile,
               const Gradients& sums) {
    if constexpr (!kPipelined) {
      score_keys(next, prefetch_);
      products_.finish();
      differentiate_interleaved(next, 0, tile, sums, [](auto&) {});
      add_products(next, sums, prefetch_);
    } else if (current.exists()) {
      differentiate_interleaved(current, products(older, next), tile, sums, [&](auto& work) {
        score_keys(next, work);
        add_products(older, sums, work);
      });
    } else {
      score_keys(next, prefetch_);
      add_products(older, sums, prefetch_);
      products_.finish();
    }
  }

  // Turns S^T and dP^T of a step into P^T and dS^T while multiply(work) calls work.do_some() `calls` times.
  template <class F>
  void differentiate_interleaved(const Step& step, int64_t calls, const BackwardTile& tile,
                                 const Gradients& sums, F multiply) {
    const int64_t first = sums.first_key + step.key;
    const auto differentiate = [&](auto work) {
      multiply(work);
      work.rest();
    };
    if (!tile.rows.needs_mask(first, first + step.num_keys)) {
      differentiate(Differentiation<Masking::kNone>(*this, tile, step, first, calls));
    } else if (tile.has_nan || has_extreme_rows_ || has_extreme_values_) {
      differentiate(Differentiation<Masking::kIsolated>(*this, tile, step, first, calls));
    } else {
      differentiate(Differentiation<Masking::kScores>(*this, tile, step, first, calls));
    }
  }

  // Computes S^T and dP^T of a step.
  template <class Work>
  void score_keys(const Step& step, Work& work) {
    if (!step.exists()) return;
    products_.multiply({step.num_keys, kTileRows, width_},
                       packed_operand(k_.from(step.key * width_), width_ / kAmxDepth),
                       packed_operand(q_lanes_, kMicroVecs), score_tiles(step.scores->s), work);
    products_.multiply({step.num_keys, kTileRows, value_width_},
                       packed_operand(v_.from(step.key * value_width_), value_width_ / kAmxDepth),
                       packed_operand(do_lanes_, kMicroVecs), {minus_delta_, 0, kAmxTile, 0, 0},
                       score_tiles(step.scores->dp), work);
  }
  static AmxTiles<float> score_tiles(float* data) { return {data, kAmxTileWords, kVectorWords}; }

  // Adds a step to dV, dK and dQ.
  template <class Work>
  void add_products(const Step& step, const Gradients& sums, Work& work) {
    if (!step.exists()) return;
    const int64_t key = step.key;
    products_.multiply_add({step.num_keys, value_width_, kTileRows}, row_pairs(step.scores->s),
                           packed_operand(do_pairs_, value_width_ / kAmxTile),
                           packed_tiles(sums.dv + key * value_width_, value_width_ / kAmxTile), work);
    products_.multiply_add({step.num_keys, width_, kTileRows}, row_pairs(step.scores->dp),
                           packed_operand(q_pairs_, width_ / kAmxTile),
                           packed_tiles(sums.dk + key * width_, width_ / kAmxTile), work);
    constexpr int64_t kColumnTile = kAmxTile * kAmxDepth;
    const AmxTiles<const uint16_t> k{k_columns_.data + key * width_, kColumnTile,
                                     width_ / kAmxTile * kColumnTile, k_columns_.size};
    const AmxTiles<const uint32_t> ds{step.scores->key_pairs, kAmxTileWords, kVectorWords / 2, kStepWords};
    products_.multiply_add({width_, kTileRows, step.num_keys}, k, ds, lane_tiles(sums.dq_lanes, width_),
                           work);
  }

  // An A operand whose depth is pairs of rows.
  static AmxTiles<const uint16_t> row_pairs(const float* words) {
    return {reinterpret_cast<const uint16_t*>(words), 2 * kAmxTileWords, 2 * kVectorWords,
            2 * kStrips * kVectorWords};
  }

  // Number of calls of do_some() by the products of two steps.
  int64_t products(const Step& older, const Step& next) const {
    const int64_t columns =
        next.num_keys * (width_ + value_width_) + older.num_keys * (2 * width_ + value_width_);
    return columns * kTileRows / (kAmxBlock * kAmxBlock * kAmxDepth) * AmxProducts<kParts>::kCallsPerStep;
  }

  // Computes P^T = 2^(S^T * scale * log2(e) - lse) and dS^T = P^T (dP^T - delta), in units of two keys and
  // two vectors.
  template <Masking kMask>
  class Differentiation {
   public:
    Differentiation(AmxBackward& engine, const BackwardTile& tile, const Step& step, int64_t first_key,
                    int64_t calls)
        : tile_(&tile),
          prefetch_(&engine.prefetch_),
          scores_(step.scores),
          first_key_(first_key),
          calls_(calls),
          num_units_(step.num_keys / 2 * kStrips),
          scale_(splat(engine.log2_scale_)) {}

    // Computes as many units as keep pace with the products.
    MLS_INLINE void do_some() {
      prefetch_->do_some();
      for (credit_ += num_units_; credit_ >= calls_; credit_ -= calls_) differentiate_unit();
    }
    void rest() {
      Differentiation local = *this;
      while (local.unit_ < num_units_) local.differentiate_unit();
    }

   private:
    MLS_INLINE void differentiate_unit() {
      constexpr uint64_t kRight = kStrips * kVectorWords;  // from a vector to its partner in a pair
      const uint64_t strip = unit_ % kStrips, pair = unit_ / kStrips;
      const uint64_t at = strip * kVectorWords + 2 * pair * kAmxRow;
      float *const s = scores_->s + at, *const dp = scores_->dp + at;
      uint32_t* const key_pairs = scores_->key_pairs + strip * kVectorWords / 2 + pair * kAmxRow;
      Bf16Parts<kParts> p[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        const uint64_t vector = strip + x * kStrips;
        const Vec lse = load(tile_->lse_log2 + vector * kLanes);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const uint64_t from = i * kAmxRow + x * kRight;
          Vec score = load(s + from);
          const auto key = first_key_ + 2 * pair + i;
          if constexpr (kMask != Masking::kNone) score = mask_scores(tile_->rows, key, vector, score);
          Vec weight = weight_exp2<kParts>(score * scale_ - lse), dscore = weight * load(dp + from);
          if constexpr (kMask == Masking::kIsolated) {
            const IntVec seen = sees(tile_->rows, key, vector);
            weight = select(seen, weight, Vec{}), dscore = select(seen, dscore, Vec{});
          }
          p[i][x] = split<kParts>(weight);
          ds[i][x] = split<kParts>(dscore);
        }
        store_pairs(AmxParts<uint32_t>{key_pairs + x * kRight / 2, kStepWords}, ds[0][x], ds[1][x]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        store_pairs(words(s + i * kAmxRow), p[i][0], p[i][1]);
        store_pairs(words(dp + i * kAmxRow), ds[i][0], ds[i][1]);
      }
      ++unit_;
    }
    static MLS_INLINE AmxParts<uint32_t> words(float* to) {
      return {reinterpret_cast<uint32_t*>(to), kStrips * kVectorWords};
    }

    const BackwardTile* tile_;
    AmxPrefetch* prefetch_;
    Scores* scores_;
    uint64_t first_key_, calls_, num_units_, credit_ = 0, unit_ = 0;
    Vec scale_;
  };

  const BackwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  const float log2_scale_;
  AmxProducts<kParts> products_;
  AmxPrefetch prefetch_;  // interleaved with the products
  // All in tiles:
  const AmxParts<uint16_t> k_, k_columns_;        // [chunk keys][width], and for each 32 keys [width][32]
  const AmxParts<uint16_t> v_;                    // [chunk keys][value_width]
  const AmxParts<uint32_t> q_lanes_, q_pairs_;    // [width / 2][kTileRows], [kTileRows / 2][width]
  const AmxParts<uint32_t> do_lanes_, do_pairs_;  // the same for dO, with value_width
  Scores* const scores_;                          // of the steps in flight
  const AmxParts<uint16_t> rows_;                 // staging
  bool has_extreme_keys_ = false, has_extreme_values_ = false, has_extreme_rows_ = false;
  alignas(MLS_VEC_BYTES) float minus_delta_[kTileRows];
};

}  // namespace mls::cpu::MLS_VARIANT
