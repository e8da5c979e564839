// Forward engine for AMX: operands of one bf16 part (bf16; P is rounded for the second product) or of three
// (fp32), with fp32 sums.
//
// A panel of packed keys stays in the L2 cache. It is processed for 32 rows (a strip) at a time, in steps of
// keys. Three steps are in flight: while the tile unit computes the scores of the next step and adds the
// values of earlier ones, the vector units turn the scores of the current step into weights.
//
// Q, O, scores and weights must stay in the L1 cache, because stores to the L2 cache take many times as long.
// So steps are small, O is loaded and stored once for several steps, and keys and values are streamed past
// the L1 cache.
#pragma once
#include "amx_exp2.h"
#include "amx_pack.h"
#include "amx_products.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
class AmxForward {
  static constexpr int kParts = kAmxParts<Element>;

 public:
  // Prefetch distance in row tiles. Prefetching earlier would evict the next panel before it is used.
  static constexpr int kPrefetchRowTiles = 8;

  static int64_t panel_keys(const AttentionShape& shape) {
    const int64_t key_bytes =
        (amx_width(shape.head_dim) + amx_width(shape.value_dim)) * kParts * sizeof(uint16_t);
    const int64_t cached = std::max(kAmxPanelBytes / key_bytes, kAmxMinPanelKeys);
    return std::min(cached, std::max(shape.num_keys / 2, kAmxSharedPanelKeys)) / kAddedKeys * kAddedKeys;
  }
  static int64_t width(int64_t dim) { return amx_width(dim); }
  static LaneLayout lanes(int64_t width) { return amx_lanes(width); }

  static int64_t most_block_tiles(const AttentionShape& shape) {
    const int64_t row_bytes =
        amx_width(shape.head_dim) * kParts * sizeof(uint16_t) + amx_width(shape.value_dim) * sizeof(float);
    return (kParts == 1 ? kAmxBlockBytes : kAmxSplitBlockBytes) / (kTileRows * row_bytes);
  }

  AmxForward(const ForwardParams& params, KeyHead at, int64_t block_tiles, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        width_(amx_width(params.shape.head_dim)),
        value_width_(amx_width(params.shape.value_dim)),
        log2_scale_(params.softmax_scale * kLog2E),
        step_keys_(std::clamp<int64_t>(kStepValues / width_ / kAmxBlock * kAmxBlock, kAmxBlock, kAddedKeys)),
        blocks_per_step_(ceil_div(value_width_ / kAmxBlock, kAddedKeys / step_keys_)),
        panel_keys_(panel_keys(params.shape)),
        strips_(scratch.objects<Strip>(block_tiles * kStripsPerTile)),
        q_(allocate_parts<kParts, uint32_t>(scratch, block_tiles * kTileRows * width_ / 2)),
        k_(allocate_parts<kParts, uint16_t>(scratch, panel_keys_ * width_)),
        v_columns_(allocate_parts<kParts, uint16_t>(scratch, panel_keys_ * value_width_)),
        rows_(allocate_parts<kParts, uint16_t>(scratch, kTileRows * std::max(width_, value_width_))),
        scores_(scratch.objects<float>(step_keys_ * kStripRows + kSkew)),
        next_scores_(scratch.objects<float>(step_keys_ * kStripRows + kSkew)),
        new_weights_{allocate_parts<kParts, uint32_t>(scratch, kAddedKeys / 2 * kStripRows + kSkew)},
        old_weights_{allocate_parts<kParts, uint32_t>(scratch, kAddedKeys / 2 * kStripRows)} {}

  void load_rows(int t, const RowTile& tile) {
    const AmxPartRows rows =
        tile_rows<Element>(p_.q, p_.shape.heads_per_group(), at_, tile, p_.shape.head_dim, rows_);
    for (int i = 0; i < kStripsPerTile; ++i) {
      strip(t, i) = Strip(tile, i * kStripVecs);
      for (int part = 0; part < kParts; ++part)
        rows_to_word_tiles(rows[part].from(i * kStripRows), kStripRows, width_, strip_queries(t, i)[part]);
    }
  }

  // Zeros need not be written: the first product that adds to O starts from zero.
  void clear(int t, float*) {
    for (int i = 0; i < kStripsPerTile; ++i) strip(t, i).is_clear = true;
  }
  void complete(int t, float* out) {
    for (int i = 0; i < kStripsPerTile; ++i) {
      if (strip(t, i).is_clear) std::memset(strip_out(out, i), 0, kStripRows * value_width_ * sizeof(float));
      strip(t, i).is_clear = false;
    }
  }

  void load_panel(int64_t first, int64_t begin, int64_t last) {
    const AttentionShape& shape = p_.shape;
    has_extreme_values_ = false;
    for (int64_t key = first + (begin - first) / kAmxBlock * kAmxBlock; key < last; key += kAmxBlock) {
      const int64_t count = std::min<int64_t>(kAmxBlock, last - key), to = key - first;
      prefetch_keys(key + kAmxBlock, std::min(key + 2 * kAmxBlock, shape.num_keys));
      const AmxPartRows k = key_rows<Element>(p_.k, at_, key, count, shape.head_dim, rows_);
      for (int part = 0; part < kParts; ++part) rows_to_tiles(k[part], width_, k_[part] + to * width_);
      const AmxPartRows v =
          finite_rows<kParts>(key_rows<Element>(p_.v, at_, key, count, shape.value_dim, rows_), kAmxBlock,
                              value_width_, rows_, has_extreme_values_);
      for (int part = 0; part < kParts; ++part)
        keys_to_column_tiles(v[part], value_width_, v_columns_[part] + to * value_width_);
    }
  }

  // Computes whole blocks of keys; keys outside [begin, end) are masked like any other.
  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t first, int64_t begin, int64_t end,
              float* out) {
    for (int i = 0; i < kStripsPerTile; ++i) {
      Strip& rows = strip(t, i);
      const int64_t from = (std::max(begin, rows.begin) - first) / kAmxBlock * kAmxBlock;
      const int64_t to = round_up(std::min(end, rows.end) - first, kAmxBlock);
      for (int64_t key = from; key < to; key += step_keys_) {
        const int64_t num_keys = std::min<int64_t>(step_keys_, to - key);
        const Step step{&tile, &rows, &state, first, key, num_keys, strip_queries(t, i), strip_out(out, i)};
        prefetch_coming_keys();
        prefetch_coming_rows(step, (key - from) / step_keys_);
        advance(step);
      }
    }
  }

  bool has_extreme_values() const { return has_extreme_values_; }

  void prefetch_keys_later(int64_t begin, int64_t end) { coming_key_ = begin, coming_end_ = end; }

  // Before this, steps of any row tile may still be in flight.
  void finish_panel() {
    advance({});
    add_all_values();
    products_.finish();
  }

 private:
  static constexpr int kStripRows = kAmxBlock;
  static constexpr int kStripVecs = kStripRows / kLanes;
  static constexpr int kStripsPerTile = kTileRows / kStripRows;
  // Keys whose values are added to O in one product, and elements of K per step.
  static constexpr int kAddedKeys = kParts == 1 ? kAmxAddedKeys : kAmxSplitAddedKeys;
  static constexpr int64_t kStepValues = kParts == 1 ? kAmxStepValues : kAmxSplitStepValues;
  // Calls of do_some() per key pair that is exponentiated. Tuned. With one part, half of the pairs of a short
  // step are left until after its products; exponentiating more of them earlier would only delay the
  // products.
  static constexpr unsigned kCallsPerPair = kParts == 1 ? 1 : 3;
  // Padding after buffers of whole pages. Without it, addresses being written would be equal to addresses
  // being read modulo the page size, and loads would wait for unrelated stores (4K aliasing).
  static constexpr int kSkew = 16 * kLanes;
  // The reference of a row is the score that is subtracted before exponentiating: an earlier running maximum.
  // It is raised only when the weights of a step sum to more than this. Weights above 1 lose no precision in
  // floating point.
  static constexpr float kMaxStepSum = 4096.0f;

  // Rows of a tile that are processed together, and the keys they see.
  struct Strip : VectorKeys {
    int first_vector;
    bool is_clear = false;  // O is zero, but the zeros are not in memory yet

    Strip(const RowTile& tile, int vector) : VectorKeys(tile.vectors[vector]), first_vector(vector) {
      for (int x = vector + 1; x < vector + kStripVecs; ++x) {
        const VectorKeys& more = tile.vectors[x];
        begin = std::min(begin, more.begin), end = std::max(end, more.end);
        all_begin = std::max(all_begin, more.all_begin), all_end = std::min(all_end, more.all_end);
      }
    }
    bool needs_mask(int64_t first, int64_t last) const { return first < all_begin || last > all_end; }
  };

  // One strip against keys [key, key + num_keys) of the panel that starts at `first`.
  struct Step {
    const RowTile* tile = nullptr;
    Strip* rows = nullptr;
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
    constexpr int64_t kKeysPerStep = 4;
    const int64_t last = std::min(coming_key_ + kKeysPerStep, coming_end_);
    prefetch_keys(coming_key_, last);
    coming_key_ = std::max(coming_key_, last);
  }

  // During step n of a strip, prefetches one row's worth of the next strip's Q and O, which follow this
  // strip's in memory. In a large block they may be in the L3 cache only.
  void prefetch_coming_rows(const Step& step, int64_t n) const {
    if (n >= kStripRows) return;
    const int64_t q_bytes = width_ * sizeof(uint16_t), out_bytes = value_width_ * sizeof(float);
    for (int part = 0; part < kParts; ++part)
      prefetch_row(reinterpret_cast<const char*>(step.q[part]) + (kStripRows + n) * q_bytes, q_bytes);
    prefetch_row(reinterpret_cast<const char*>(step.out) + (kStripRows + n) * out_bytes, out_bytes);
  }

  Strip& strip(int t, int i) const { return strips_[t * kStripsPerTile + i]; }
  float* strip_out(float* out, int i) const { return out + i * kStripRows * value_width_; }
  AmxParts<uint32_t> strip_queries(int t, int i) const {
    return q_.from((t * kStripsPerTile + i) * kStripRows * width_ / 2);
  }

  // Lanes of a strip's rows.
  struct Lanes {
    __mmask16 of[kStripVecs];

    MLS_INLINE bool any() const {
      unsigned lanes = 0;
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) lanes |= of[x];
      return lanes != 0;
    }
  };

  // P^T of consecutive keys of a strip, in pairs of keys: for each vector of rows [kAddedKeys / 2][kLanes].
  struct Weights {
    AmxParts<uint32_t> words{};
    Strip* rows = nullptr;
    float* out = nullptr;    // O^T of the rows
    bool from_zero = false;  // O is zero, whatever its memory holds
    int64_t key = 0, num_keys = 0;
    int64_t dims_left = 0;  // dimensions of O whose product with V is still to be computed
  };

  void advance(const Step& next) {
    if (current_.num_keys == 0) {
      NoInterleavedWork nothing;
      multiply(next, nothing);
    } else {
      current_.needs_mask() ? exponentiate<true>(next) : exponentiate<false>(next);
      if (new_weights_.num_keys + step_keys_ > kAddedKeys || next.out != current_.out) begin_adding();
    }
    current_ = next;
    std::swap(scores_, next_scores_);
  }

  // Exponentiates the current step, interleaved with the products of other steps.
  template <bool kMasked>
  [[gnu::noinline]] void exponentiate(const Step& next) {
    if (new_weights_.num_keys == 0) begin_weights();
    // For rows without a reference, sums and O are still zero: nothing to rescale.
    if (const Lanes without_reference = lanes_without_reference(); without_reference.any())
      raise_reference<kMasked>(without_reference);
    Exponentiation<kMasked> exponentiation(*this);
    multiply(next, exponentiation);
    exponentiation.rest();
    if (const Lanes above = exponentiation.lanes_above(kMaxStepSum); above.any()) {
      exponentiate_again<kMasked>(above);
    } else {
      exponentiation.add_sums();
    }
    new_weights_.num_keys += current_.num_keys;
  }

  void begin_weights() {
    new_weights_.key = current_.key;
    new_weights_.rows = current_.rows, new_weights_.out = current_.out;
  }

  // Repeats the step with a higher reference, after adding all values weighted with the lower one.
  template <bool kMasked>
  [[gnu::noinline]] void exponentiate_again(const Lanes& above) {
    begin_adding();
    add_all_values();
    products_.finish();
    rescale(raise_reference<kMasked>(above));
    begin_weights();
    Exponentiation<kMasked> exponentiation(*this);
    exponentiation.rest();
    exponentiation.add_sums();
  }

  // Computes the scores of `next`, and adds some of the values of earlier steps.
  template <class Work>
  MLS_INLINE void multiply(const Step& next, Work& work) {
    for (int64_t key = 0; key < next.num_keys; key += kAmxBlock) score_block(next, key, work);
    if (old_weights_.dims_left == 0) return products_.finish();
    for (int64_t i = 0; i < blocks_per_step_ && old_weights_.dims_left > 0; ++i) add_block(work);
  }

  void begin_adding() {
    add_all_values();
    std::swap(new_weights_, old_weights_);
    new_weights_.num_keys = 0;
    if (old_weights_.num_keys == 0) return;
    old_weights_.dims_left = value_width_;
    old_weights_.from_zero = std::exchange(old_weights_.rows->is_clear, false);
  }
  [[gnu::noinline]] void add_all_values() {
    NoInterleavedWork nothing;
    while (old_weights_.dims_left > 0) add_block(nothing);
  }

  // S^T = K Q^T
  template <class Work>
  MLS_INLINE void score_block(const Step& step, int64_t key, Work& work) {
    const int64_t depth = width_ / kAmxDepth;
    const AmxPairs<uint16_t> k{k_.data + (step.key + key) * width_, depth * kAmxTileHalves, kAmxTileHalves,
                               k_.size};
    const AmxPairs<uint32_t> q{step.q.data, kAmxTileWords, kStripVecs * kAmxTileWords, step.q.size};
    products_.template block<AmxReuse::kStreamed>(
        k, q, depth, {next_scores_ + key * kLanes, kAmxTileWords, step_keys_ * kLanes}, work);
  }

  // O^T += V^T P^T for the next 32 dimensions.
  template <class Work>
  MLS_INLINE void add_block(Work& work) {
    const int64_t dim = value_width_ - old_weights_.dims_left;
    old_weights_.dims_left -= kAmxBlock;
    const AmxPairs<uint16_t> v{v_columns_.data + old_weights_.key * value_width_ + dim * kAmxDepth,
                               kAmxTileHalves, value_width_ * kAmxDepth, v_columns_.size};
    const AmxPairs<uint32_t> p{old_weights_.words.data, kAddedKeys / 2 * kLanes, kAmxTileWords,
                               old_weights_.words.size};
    const AmxTiles<float> out{old_weights_.out + dim * kLanes, kAmxTileWords, value_width_ * kLanes};
    const AmxTiles<const float> start =
        old_weights_.from_zero ? kAmxZeroTiles : AmxTiles<const float>{out.data, out.down, out.right};
    products_.template block<AmxReuse::kStreamed>(v, p, old_weights_.num_keys / kAmxDepth, start, out, work);
  }

  template <bool kMasked>
  static MLS_INLINE Vec masked(const Step& step, int64_t row, int x, Vec score) {
    if constexpr (!kMasked) return score;
    return mask_scores(*step.tile, step.first + step.key + row, step.rows->first_vector + x, score);
  }

  // Computes P^T in pairs of keys. Any reference is correct as long as weights and their sum share it and
  // nothing overflows. So this uses the maximum of earlier keys, and need not find the maximum of the new
  // scores first.
  template <bool kMasked>
  class Exponentiation {
   public:
    MLS_INLINE explicit Exponentiation(const AmxForward& engine)
        : step_(engine.current_),
          scores_(engine.scores_),
          next_vector_(engine.step_keys_ * kLanes),
          weights_(engine.new_weights_.words.from(engine.new_weights_.num_keys / 2 * kLanes)),
          scale_(splat(engine.log2_scale_)) {
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) reference_[x] = finite_max(load(step_.maxima(x))), sum_[x] = Vec{};
    }

    MLS_INLINE void do_some() {
      if (++calls_ % kCallsPerPair == 0 && row_ < step_.num_keys) exponentiate_pair();
    }
    MLS_INLINE void rest() {
      while (row_ < step_.num_keys) exponentiate_pair();
    }

    MLS_INLINE Lanes lanes_above(float limit) const {
      Lanes above;
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) above.of[x] = greater(sum_[x], splat(limit));
      return above;
    }
    MLS_INLINE void add_sums() const {
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) store(step_.sums(x), load(step_.sums(x)) + sum_[x]);
    }

   private:
    MLS_INLINE Vec weight(int64_t row, int x) const {
      const Vec score = load(scores_ + x * next_vector_ + row * kLanes);
      return summed_exp2<kParts>(masked<kMasked>(step_, row, x, score) * scale_ - reference_[x]);
    }
    MLS_INLINE void exponentiate_pair() {
#pragma GCC unroll 8
      for (int x = 0; x < kStripVecs; ++x) {
        const Vec even = weight(row_, x), odd = weight(row_ + 1, x);
        sum_[x] = sum_[x] + even + odd;
        store_pairs(weights_.from(x * kAddedKeys / 2 * kLanes + row_ / 2 * kLanes), split<kParts>(even),
                    split<kParts>(odd));
      }
      row_ += 2;
    }

    const Step& step_;
    const float* const scores_;
    const int64_t next_vector_;
    const AmxParts<uint32_t> weights_;
    int64_t row_ = 0;  // key of the step
    unsigned calls_ = 0;
    const Vec scale_;
    Vec reference_[kStripVecs], sum_[kStripVecs];
  };

  struct Factors {
    Vec of[kStripVecs];
  };

  // Makes the maximum of all scores so far the reference of the rows in `lanes`. Returns the factors by which
  // everything summed so far must be multiplied.
  template <bool kMasked>
  [[gnu::noinline]] Factors raise_reference(const Lanes& lanes) const {
    Factors factors;
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) {
      const float* const scores = scores_ + x * step_keys_ * kLanes;
      Vec top = splat(-kInfinity);
      for (int64_t row = 0; row < current_.num_keys; ++row)
        top = max(masked<kMasked>(current_, row, x, load(scores + row * kLanes)), top);
      const Vec old = load(current_.maxima(x)), highest = max(top * log2_scale_, old);
      const Vec updated = blend(lanes.of[x], highest, old);
      store(current_.maxima(x), updated);
      factors.of[x] = blend(lanes.of[x], exp2(old - finite_max(updated)), splat(1.0f));
    }
    return factors;
  }
  void rescale(const Factors& factors) const {
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x) {
      store(current_.sums(x), load(current_.sums(x)) * factors.of[x]);
      if (current_.rows->is_clear) continue;
      for (int64_t d = 0; d < value_width_; ++d) {
        float* const at = current_.out + (x * value_width_ + d) * kLanes;
        store(at, load(at) * factors.of[x]);
      }
    }
  }

  // Rows that have seen no key yet.
  MLS_INLINE Lanes lanes_without_reference() const {
    Lanes without_reference;
#pragma GCC unroll 8
    for (int x = 0; x < kStripVecs; ++x)
      without_reference.of[x] = ~greater(load(current_.maxima(x)), splat(-kInfinity)) & 0xffff;
    return without_reference;
  }
  static MLS_INLINE __mmask16 greater(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
  }
  static MLS_INLINE Vec blend(__mmask16 lanes, Vec yes, Vec no) {
    return reinterpret_cast<Vec>(
        _mm512_mask_mov_ps(reinterpret_cast<__m512>(no), lanes, reinterpret_cast<__m512>(yes)));
  }

  const ForwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  const float log2_scale_;
  const int64_t step_keys_, blocks_per_step_, panel_keys_;
  AmxProducts<kParts> products_;
  Strip* const strips_;                 // kStripsPerTile per row tile
  const AmxParts<uint32_t> q_;          // per strip: [width / 2][kStripRows], in tiles
  const AmxParts<uint16_t> k_;          // [panel_keys_][width], in tiles
  const AmxParts<uint16_t> v_columns_;  // V^T of every 32 keys: [value_width][32], in tiles
  const AmxParts<uint16_t> rows_;       // staging
  float *scores_, *next_scores_;        // S^T of a step: for each vector of rows [keys][kLanes]
  Weights new_weights_, old_weights_;   // being computed by recent steps; being multiplied with V
  Step current_;
  bool has_extreme_values_ = false;          // of the panel
  int64_t coming_key_ = 0, coming_end_ = 0;  // keys of the next panel that are still to be prefetched
};

}  // namespace mls::cpu::MLS_VARIANT
