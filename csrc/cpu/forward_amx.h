// Forward engine for AMX: operands of one bf16 part (bf16; P is rounded for the
// second product) or of three (fp32), fp32 sums.
//
// A panel of packed keys stays in the L2 cache. Rows meet it 32 at a time and a
// step of keys at a time, so that Q, O, scores and weights stay in the L1
// cache: tiles are stored as fast there as they are computed, but many times
// slower to the L2.
#pragma once
#include "amx_exp2.h"
#include "amx_pack.h"
#include "amx_tile.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
class AmxForward {
  static constexpr int kParts = kAmxParts<Element>;

 public:
  static constexpr int kPanelKeys = kAmxForwardPanelKeys;
  static int64_t width(int64_t dim) { return amx_width(dim); }

  AmxForward(const ForwardParams& params, KeyHead at, int64_t block_tiles, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        width_(amx_width(params.shape.head_dim)),
        value_width_(amx_width(params.shape.value_dim)),
        log2_scale_(params.softmax_scale * kLog2E),
        strips_(scratch.objects<Strip>(block_tiles * kStripsPerTile)),
        q_(allocate_parts<kParts, uint32_t>(scratch, block_tiles * kTileRows * width_ / 2)),
        k_(allocate_parts<kParts, uint16_t>(scratch, kPanelKeys * width_)),
        v_columns_(allocate_parts<kParts, uint16_t>(scratch, kPanelKeys * value_width_)),
        scores_(scratch.objects<float>(kMaxStepKeys * kStripRows)),
        weights_(allocate_parts<kParts, uint32_t>(scratch, kMaxStepKeys / 2 * kStripRows)),
        rows_(allocate_parts<kParts, uint16_t>(scratch, kTileRows * std::max(width_, value_width_))) {}

  void load_rows(int t, const RowTile& tile) {
    split_tile_rows<Element>(p_.q, p_.shape.heads_per_group(), at_, tile, p_.shape.head_dim, rows_);
    for (int i = 0; i < kStripsPerTile; ++i) {
      strip(t, i) = Strip(tile, i * kStripVecs);
      for (int part = 0; part < kParts; ++part)
        rows_to_word_tiles(rows_[part] + i * kStripRows * width_, kStripRows, width_,
                           strip_queries(t, i)[part]);
    }
  }

  void load_panel(int64_t first, int64_t last) {
    const AttentionShape& shape = p_.shape;
    for (int64_t key = first; key < last; key += kAmxBlock) {
      const int64_t count = std::min<int64_t>(kAmxBlock, last - key), to = key - first;
      prefetch_key_rows<Element>(p_.k, at_, key + kAmxBlock, shape.num_keys, shape.head_dim);
      prefetch_key_rows<Element>(p_.v, at_, key + kAmxBlock, shape.num_keys, shape.value_dim);
      split_key_rows<Element>(p_.k, at_, key, count, shape.head_dim, rows_);
      for (int part = 0; part < kParts; ++part) rows_to_tiles(rows_[part], width_, k_[part] + to * width_);
      split_key_rows<Element>(p_.v, at_, key, count, shape.value_dim, rows_);
      for (int part = 0; part < kParts; ++part)
        keys_to_column_tiles(rows_[part], value_width_, v_columns_[part] + to * value_width_);
    }
  }

  // Whole blocks of keys are computed; those before `begin` or from `end` on
  // are masked like any other.
  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t first, int64_t begin, int64_t end,
              float* out) {
    const int64_t step_keys = width_ + value_width_ > 2 * 64 ? kMaxStepKeys : kMaxStepKeys / 2;
    for (int i = 0; i < kStripsPerTile; ++i) {
      const Strip& rows = strip(t, i);
      const int64_t from = (std::max(begin, rows.begin) - first) / kAmxBlock * kAmxBlock;
      const int64_t to = round_up(std::min(end, rows.end) - first, kAmxBlock);
      for (int64_t key = from; key < to; key += step_keys) {
        const Step step{tile,
                        rows,
                        state,
                        first,
                        key,
                        std::min(step_keys, to - key),
                        strip_queries(t, i),
                        out + i * kStripRows};
        rows.needs_mask(first + key, first + key + step.num_keys) ? attend<true>(step) : attend<false>(step);
      }
    }
    products_.finish();
  }

 private:
  static constexpr int kStripRows = kAmxBlock;
  static constexpr int kStripVecs = kStripRows / kLanes;
  static constexpr int kStripsPerTile = kTileRows / kStripRows;
  // Half of it for short rows, where all fits into the L1 cache; long ones are
  // faster with few loads and stores of O.
  static constexpr int kMaxStepKeys = 128;
  // What the weights of a step may sum to before the reference of the
  // exponentials is raised. Weights above 1 lose nothing: fp32 and bf16 have
  // their digits at any size.
  static constexpr float kMaxStepSum = 4096.0f;

  // Rows of a tile that meet keys together, and the keys they see.
  struct Strip : VectorKeys {
    int first_vector;

    Strip(const RowTile& tile, int vector) : VectorKeys(tile.vectors[vector]), first_vector(vector) {
      for (int x = vector + 1; x < vector + kStripVecs; ++x) {
        const VectorKeys& more = tile.vectors[x];
        begin = std::min(begin, more.begin), end = std::max(end, more.end);
        all_begin = std::max(all_begin, more.all_begin), all_end = std::min(all_end, more.all_end);
      }
    }
    bool needs_mask(int64_t first, int64_t last) const { return first < all_begin || last > all_end; }
  };

  // Keys [key, key + num_keys) of the panel at `first`, against a strip.
  struct Step {
    const RowTile& tile;
    const Strip& rows;
    SoftmaxState& state;
    int64_t first, key, num_keys;
    AmxParts<uint32_t> q;
    float* out;

    MLS_INLINE float* maxima(int x) const { return state.max_log2 + (rows.first_vector + x) * kLanes; }
    MLS_INLINE float* sums(int x) const { return state.sum + (rows.first_vector + x) * kLanes; }
  };

  Strip& strip(int t, int i) const { return strips_[t * kStripsPerTile + i]; }
  AmxParts<uint32_t> strip_queries(int t, int i) const {
    return q_.from((t * kStripsPerTile + i) * kStripRows * width_ / 2);
  }

  template <bool kMasked>
  void attend(const Step& step) {
    products_.multiply({step.num_keys, kStripRows, width_},
                       packed_operand(k_.from(step.key * width_), width_ / kAmxDepth),
                       packed_operand(step.q, kStripVecs), packed_tiles(scores_, kStripVecs));
    products_.finish();
    if (lacks_reference(step) || !weigh<kMasked>(step, kMaxStepSum)) {
      raise_reference<kMasked>(step);
      weigh<kMasked>(step, kInfinity);
    }
    const int64_t column_tiles = value_width_ / kAmxTile;
    const AmxTiles<const uint16_t> v{v_columns_.data + step.key * value_width_, kAmxTileBytes,
                                     kAmxTile * kAmxDepth, column_tiles * kAmxTile * kAmxDepth,
                                     v_columns_.size};
    products_.multiply_add({value_width_, kStripRows, step.num_keys}, v, packed_operand(weights_, kStripVecs),
                           strided_tiles(step.out, kTileRows));
  }

  // The row of S^T that is key `key + r`, and the row of P^T for it and the next
  // (r is even there); `key` starts a tile.
  template <bool kMasked>
  MLS_INLINE Vec score(const Step& step, int64_t key, int r, int x) const {
    const Vec scores = load(scores_ + key * kStripRows + x * kAmxTileWords + r * kAmxRow);
    if constexpr (!kMasked) return scores;
    return mask_scores(step.tile, step.first + step.key + key + r, step.rows.first_vector + x, scores);
  }
  MLS_INLINE AmxParts<uint32_t> weight_pair(int64_t key, int r, int x) const {
    const int64_t block = key / kAmxBlock, half = key / kAmxTile % 2;
    return weights_.from((block * kStripVecs + x) * kAmxTileWords + (half * kAmxTile + r) / 2 * kAmxRow);
  }

  // P^T in pairs of keys. Any reference of the exponentials is right that the
  // sum shares, if nothing overflows: the largest score of earlier keys does,
  // and the new scores need not be looked through first. False, and no sum
  // changed, if the weights of a row sum to more than `limit`.
  template <bool kMasked>
  [[gnu::noinline]] bool weigh(const Step& step, float limit) {
    const Vec scale = splat(log2_scale_);
    Vec reference[kStripVecs], sum[kStripVecs];
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) reference[x] = finite_max(load(step.maxima(x))), sum[x] = Vec{};
    for (int64_t key = 0; key < step.num_keys; key += kAmxTile) {
#pragma GCC unroll 2
      for (int r = 0; r < kAmxTile; r += 2) {
#pragma GCC unroll 8
        for (int x = 0; x < kStripVecs; ++x) {
          const Vec even = score<kMasked>(step, key, r, x), odd = score<kMasked>(step, key, r + 1, x);
          const Vec p = summed_exp2<kParts>(even * scale - reference[x]);
          const Vec next = summed_exp2<kParts>(odd * scale - reference[x]);
          sum[x] = sum[x] + p + next;
          store_pairs(weight_pair(key, r, x), split<kParts>(p), split<kParts>(next));
        }
      }
    }
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) {
      if (not_above(0xffff, sum[x], splat(limit)) != 0xffff) return false;
    }
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) store(step.sums(x), load(step.sums(x)) + sum[x]);
    return true;
  }

  // The maximum of all scores so far becomes the reference.
  template <bool kMasked>
  [[gnu::noinline]] void raise_reference(const Step& step) {
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) {
      Vec top = splat(-kInfinity);
      for (int64_t key = 0; key < step.num_keys; key += kAmxTile) {
        for (int r = 0; r < kAmxTile; ++r) top = max(score<kMasked>(step, key, r, x), top);
      }
      const Vec old = load(step.maxima(x)), updated = max(top * log2_scale_, old);
      const Vec rescale = exp2(old - finite_max(updated));
      store(step.maxima(x), updated);
      store(step.sums(x), load(step.sums(x)) * rescale);
      for (int64_t d = 0; d < value_width_; ++d) {
        float* const at = step.out + d * kTileRows + x * kLanes;
        store(at, load(at) * rescale);
      }
    }
  }

  // Does a row have seen no key yet?
  static MLS_INLINE bool lacks_reference(const Step& step) {
    bool lacks = false;
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) {
      lacks = lacks || not_above(0xffff, load(step.maxima(x)), splat(-kInfinity)) != 0;
    }
    return lacks;
  }
  static MLS_INLINE __mmask16 not_above(__mmask16 before, Vec a, Vec b) {
    return _mm512_mask_cmp_ps_mask(before, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                   _CMP_NGT_UQ);
  }

  const ForwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  const float log2_scale_;
  AmxProducts<kParts> products_;
  Strip* const strips_;                 // of each row tile
  const AmxParts<uint32_t> q_;          // of each strip: [width / 2][kStripRows], in tiles
  const AmxParts<uint16_t> k_;          // [kPanelKeys][width], in tiles
  const AmxParts<uint16_t> v_columns_;  // V^T of each 32 keys: [value_width][32], in tiles
  float* const scores_;                 // S^T: [keys][kStripRows], in tiles
  const AmxParts<uint32_t> weights_;    // P^T: [keys / 2][kStripRows], in tiles
  const AmxParts<uint16_t> rows_;       // staging
};

}  // namespace mls::cpu::MLS_VARIANT
