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
  static LaneLayout lanes(int64_t width) { return amx_lanes(width); }

  static int64_t most_block_tiles(const AttentionShape& shape) {
    const int64_t row_bytes =
        amx_width(shape.head_dim) * kParts * sizeof(uint16_t) + amx_width(shape.value_dim) * sizeof(float);
    return (kParts == 1 ? kBlockBytes : kSplitBlockBytes) / (kTileRows * row_bytes);
  }

  AmxForward(const ForwardParams& params, KeyHead at, int64_t block_tiles, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        width_(amx_width(params.shape.head_dim)),
        value_width_(amx_width(params.shape.value_dim)),
        log2_scale_(params.softmax_scale * kLog2E),
        step_keys_(step_keys(width_ + value_width_)),
        block_tiles_(block_tiles),
        strips_(scratch.objects<Strip>(block_tiles * kStripsPerTile)),
        q_(allocate_parts<kParts, uint32_t>(scratch, block_tiles * kTileRows * width_ / 2)),
        k_(allocate_parts<kParts, uint16_t>(scratch, kPanelKeys * width_)),
        v_columns_(allocate_parts<kParts, uint16_t>(scratch, kPanelKeys * value_width_)),
        rows_(allocate_parts<kParts, uint16_t>(scratch, kTileRows * std::max(width_, value_width_))),
        scores_(scratch.objects<float>(kMaxStepKeys * kStripRows)),
        other_scores_(scratch.objects<float>(kWeighBesideProducts ? kMaxStepKeys * kStripRows : 0)),
        weights_(allocate_parts<kParts, uint32_t>(scratch, kMaxStepKeys / 2 * kStripRows)),
        other_weights_(allocate_parts<kParts, uint32_t>(
            scratch, kWeighBesideProducts ? kMaxStepKeys / 2 * kStripRows : 0)) {}

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
      prefetch_keys(key + kAmxBlock, std::min(key + 2 * kAmxBlock, shape.num_keys));
      split_key_rows<Element>(p_.k, at_, key, count, shape.head_dim, rows_);
      for (int part = 0; part < kParts; ++part) rows_to_tiles(rows_[part], width_, k_[part] + to * width_);
      split_key_rows<Element>(p_.v, at_, key, count, shape.value_dim, rows_);
      for (int part = 0; part < kParts; ++part)
        keys_to_column_tiles(rows_[part], value_width_, v_columns_[part] + to * value_width_);
    }
    coming_key_ = coming_end_ = last;
  }

  // Whole blocks of keys are computed; those before `begin` or from `end` on
  // are masked like any other.
  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t first, int64_t begin, int64_t end,
              float* out) {
    if (t >= block_tiles_ - kLastTiles) coming_end_ = std::min(first + 2 * kPanelKeys, p_.shape.num_keys);
    for (int i = 0; i < kStripsPerTile; ++i) {
      const Strip& rows = strip(t, i);
      const int64_t from = (std::max(begin, rows.begin) - first) / kAmxBlock * kAmxBlock;
      const int64_t to = round_up(std::min(end, rows.end) - first, kAmxBlock);
      for (int64_t key = from; key < to; key += step_keys_) {
        const int64_t num_keys = std::min<int64_t>(step_keys_, to - key);
        const Step step{&tile,
                        &rows,
                        &state,
                        first,
                        key,
                        num_keys,
                        strip_queries(t, i),
                        out + i * kStripRows * value_width_};
        prefetch_coming_keys();
        kWeighBesideProducts ? advance(step) : attend_step(step);
      }
    }
    if (kWeighBesideProducts) advance({}), advance({});
    products_.finish();
  }

 private:
  static constexpr int kStripRows = kAmxBlock;
  static constexpr int kStripVecs = kStripRows / kLanes;
  static constexpr int kStripsPerTile = kTileRows / kStripRows;
  // In one part, the products are too short: weighing between them is faster, and so are steps that leave
  // more of the L1 cache where rows are short. Long ones want few loads and stores of O.
  static constexpr bool kWeighBesideProducts = kParts > 1;
  static constexpr int kMaxStepKeys = 128;
  static int64_t step_keys(int64_t widths) {
    return kWeighBesideProducts || widths > 2 * 64 ? kMaxStepKeys : kMaxStepKeys / 2;
  }
  // The next panel is fetched beside the last tiles of a block: earlier, it would leave the cache again.
  static constexpr int kLastTiles = 8;
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
    const RowTile* tile = nullptr;
    const Strip* rows = nullptr;
    SoftmaxState* state = nullptr;
    int64_t first = 0, key = 0, num_keys = 0;  // 0: no step
    AmxParts<uint32_t> q{};
    float* out = nullptr;

    MLS_INLINE float* maxima(int x) const { return state->max_log2 + (rows->first_vector + x) * kLanes; }
    MLS_INLINE float* sums(int x) const { return state->sum + (rows->first_vector + x) * kLanes; }
    bool needs_mask() const { return rows->needs_mask(first + key, first + key + num_keys); }
  };

  void prefetch_keys(int64_t first, int64_t last) {
    prefetch_key_rows<Element>(p_.k, at_, first, last, p_.shape.head_dim);
    prefetch_key_rows<Element>(p_.v, at_, first, last, p_.shape.value_dim);
  }
  void prefetch_coming_keys() {
    constexpr int64_t kKeysAtOnce = 8;
    const int64_t last = std::min(coming_key_ + kKeysAtOnce, coming_end_);
    prefetch_keys(coming_key_, last);
    coming_key_ = std::max(coming_key_, last);
  }

  Strip& strip(int t, int i) const { return strips_[t * kStripsPerTile + i]; }
  AmxParts<uint32_t> strip_queries(int t, int i) const {
    return q_.from((t * kStripsPerTile + i) * kStripRows * width_ / 2);
  }

  // Lanes of a strip's rows.
  struct Lanes {
    __mmask16 of[kStripVecs];

    bool any() const {
      return std::any_of(of, of + kStripVecs, [](__mmask16 lanes) { return lanes != 0; });
    }
  };

  // One step after the other.
  void attend_step(const Step& step) {
    NothingBeside nothing;
    score_keys(step, scores_, nothing);
    products_.finish();
    current_ = step;
    const auto no_products = [](auto&) {};
    step.needs_mask() ? weigh<true>({}, no_products) : weigh<false>({}, no_products);
    add_values(step, weights_, nothing);
  }

  // Three steps are under way: while the tile unit computes the scores of the next and adds the values of the
  // previous, the vector units turn the scores of the current one into weights.
  void advance(const Step& next) {
    const auto products = [&](auto& beside) { multiply(next, beside); };
    if (current_.num_keys == 0) {
      NothingBeside nothing;
      products(nothing);
    } else {
      current_.needs_mask() ? weigh<true>(next, products) : weigh<false>(next, products);
    }
    previous_ = current_, current_ = next;
    std::swap(scores_, other_scores_), std::swap(weights_, other_weights_);
  }

  // The weights of the current step, beside products.
  template <bool kMasked, class Products>
  void weigh(const Step& next, Products multiply_beside) {
    if (const Lanes lacking = lanes_without_reference(); lacking.any()) {
      NothingBeside nothing;
      multiply({}, nothing);
      previous_ = {};
      products_.finish();
      raise_reference<kMasked>(lacking);
    }
    Weighing<kMasked> weighing(*this, calls_beside(next));
    multiply_beside(weighing);
    weighing.rest();
    if (const Lanes above = weighing.lanes_above(kMaxStepSum); above.any()) {
      products_.finish();
      raise_reference<kMasked>(above);
      weighing = Weighing<kMasked>(*this, 0);
      weighing.rest();
    }
    weighing.add_sums();
  }

  // The scores of `next`, and the values of the previous step.
  template <class Beside>
  void multiply(const Step& next, Beside& beside) {
    if (next.num_keys > 0) score_keys(next, other_scores_, beside);
    if (previous_.num_keys > 0) {
      add_values(previous_, other_weights_, beside);
    } else {
      products_.finish();
    }
  }

  // S^T = K Q^T
  template <class Beside>
  void score_keys(const Step& step, float* scores, Beside& beside) {
    products_.multiply({step.num_keys, kStripRows, width_},
                       packed_operand(k_.from(step.key * width_), width_ / kAmxDepth),
                       packed_operand(step.q, kStripVecs), packed_tiles(scores, kStripVecs), beside);
  }

  // O^T += V^T P^T
  template <class Beside>
  void add_values(const Step& step, AmxParts<uint32_t> weights, Beside& beside) {
    constexpr int64_t kColumnTile = kAmxTile * kAmxDepth;
    const AmxTiles<const uint16_t> v{v_columns_.data + step.key * value_width_, kAmxTileBytes, kColumnTile,
                                     value_width_ / kAmxTile * kColumnTile, v_columns_.size};
    products_.multiply_add({value_width_, kStripRows, step.num_keys}, v, packed_operand(weights, kStripVecs),
                           lane_tiles(step.out, value_width_), beside);
  }

  // Calls from the products of `next` and of the previous step.
  int64_t calls_beside(const Step& next) const {
    const int64_t products = next.num_keys * width_ + previous_.num_keys * value_width_;
    return products / (kAmxBlock * kAmxDepth) * AmxProducts<kParts>::kNumPairs;
  }

  // Where the first vector of a row of S^T lies, and of a pair of rows of P^T. (Of unsigned numbers: signed
  // ones take longer to divide.)
  static MLS_INLINE uint64_t score_offset(uint64_t row) {
    return row / kAmxTile * kStripVecs * kAmxTileWords + row % kAmxTile * kAmxRow;
  }
  static MLS_INLINE uint64_t weight_offset(uint64_t row) {
    return row / kAmxBlock * kStripVecs * kAmxTileWords + row % kAmxBlock / 2 * kAmxRow;
  }
  template <bool kMasked>
  static MLS_INLINE Vec score(const Step& step, const float* scores, uint64_t row, int x) {
    const Vec loaded = load(scores + score_offset(row) + x * kAmxTileWords);
    if constexpr (!kMasked) return loaded;
    const int64_t key = step.first + step.key + static_cast<int64_t>(row);
    return mask_scores(*step.tile, key, step.rows->first_vector + x, loaded);
  }

  // P^T in pairs of keys. Any reference of the exponentials is right that the
  // sum shares, if nothing overflows: the largest score of earlier keys does,
  // and the new scores need not be looked through first.
  template <bool kMasked>
  class Weighing {
   public:
    Weighing(const AmxForward& engine, int64_t calls)
        : step_(engine.current_),
          scores_(engine.scores_),
          weights_(engine.weights_),
          calls_(calls),
          num_pairs_(engine.current_.num_keys / 2),
          scale_(splat(engine.log2_scale_)) {
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) reference_[x] = finite_max(load(step_.maxima(x))), sum_[x] = Vec{};
    }

    // As many pairs as keep pace with the products: more at a time than the processor looks ahead would keep
    // the tile unit waiting.
    MLS_INLINE void some() {
      for (credit_ += num_pairs_; credit_ >= calls_; credit_ -= calls_) weigh_pair();
    }
    void rest() {
      Weighing local = *this;
      while (local.pair_ < num_pairs_) local.weigh_pair();
      *this = local;
    }

    Lanes lanes_above(float limit) const {
      Lanes above;
      for (int x = 0; x < kStripVecs; ++x) above.of[x] = greater(sum_[x], splat(limit));
      return above;
    }
    void add_sums() const {
      for (int x = 0; x < kStripVecs; ++x) store(step_.sums(x), load(step_.sums(x)) + sum_[x]);
    }

   private:
    MLS_INLINE void weigh_pair() {
      const uint64_t row = 2 * pair_++;
      const AmxParts<uint32_t> pairs = weights_.from(weight_offset(row));
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) {
        const Vec even = score<kMasked>(step_, scores_, row, x);
        const Vec odd = score<kMasked>(step_, scores_, row + 1, x);
        const Vec p = summed_exp2<kParts>(even * scale_ - reference_[x]);
        const Vec next = summed_exp2<kParts>(odd * scale_ - reference_[x]);
        sum_[x] = sum_[x] + p + next;
        store_pairs(pairs.from(x * kAmxTileWords), split<kParts>(p), split<kParts>(next));
      }
    }

    Step step_;
    const float* scores_;
    AmxParts<uint32_t> weights_;
    uint64_t calls_, num_pairs_, credit_ = 0, pair_ = 0;
    Vec scale_, reference_[kStripVecs], sum_[kStripVecs];
  };

  // The maximum of all scores so far becomes the reference of these rows.
  template <bool kMasked>
  [[gnu::noinline]] void raise_reference(const Lanes& lanes) {
    const Step& step = current_;
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) {
      Vec top = splat(-kInfinity);
      for (int64_t row = 0; row < step.num_keys; ++row) top = max(score<kMasked>(step, scores_, row, x), top);
      const Vec old = load(step.maxima(x)), highest = max(top * log2_scale_, old);
      const Vec updated = chosen(lanes.of[x], highest, old);
      const Vec rescale = chosen(lanes.of[x], exp2(old - finite_max(updated)), splat(1.0f));
      store(step.maxima(x), updated);
      store(step.sums(x), load(step.sums(x)) * rescale);
      for (int64_t d = 0; d < value_width_; ++d) {
        float* const at = step.out + (x * value_width_ + d) * kLanes;
        store(at, load(at) * rescale);
      }
    }
  }

  // Rows that have seen no key yet.
  Lanes lanes_without_reference() const {
    Lanes lacking;
    for (int x = 0; x < kStripVecs; ++x)
      lacking.of[x] = ~greater(load(current_.maxima(x)), splat(-kInfinity)) & 0xffff;
    return lacking;
  }
  static MLS_INLINE __mmask16 greater(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
  }
  static MLS_INLINE Vec chosen(__mmask16 lanes, Vec yes, Vec no) {
    return reinterpret_cast<Vec>(
        _mm512_mask_mov_ps(reinterpret_cast<__m512>(no), lanes, reinterpret_cast<__m512>(yes)));
  }

  const ForwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  const float log2_scale_;
  const int64_t step_keys_, block_tiles_;
  AmxProducts<kParts> products_;
  Strip* const strips_;                 // of each row tile
  const AmxParts<uint32_t> q_;          // of each strip: [width / 2][kStripRows], in tiles
  const AmxParts<uint16_t> k_;          // [kPanelKeys][width], in tiles
  const AmxParts<uint16_t> v_columns_;  // V^T of each 32 keys: [value_width][32], in tiles
  const AmxParts<uint16_t> rows_;       // staging
  // Of the current step, and of the two beside it:
  float *scores_, *other_scores_;               // S^T: [keys][kStripRows], in tiles
  AmxParts<uint32_t> weights_, other_weights_;  // P^T: [keys / 2][kStripRows], in tiles
  Step previous_, current_;
  int64_t coming_key_ = 0, coming_end_ = 0;  // keys of the next panel that are still to be fetched
};

}  // namespace mls::cpu::MLS_VARIANT
