// Forward engine for AMX: bf16 operands, fp32 sums; P is rounded to bf16 for
// the second product.
#pragma once
#include "amx_pack.h"
#include "amx_tile.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

class AmxForward {
 public:
  static constexpr int kPanelKeys = kAmxPanelKeys;
  static int64_t width(int64_t dim) { return amx_width(dim); }

  AmxForward(const ForwardParams& params, KeyHead at, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        width_(amx_width(params.shape.head_dim)),
        value_width_(amx_width(params.shape.value_dim)),
        q_(scratch.objects<uint32_t>(block_tiles(params.shape) * width_ / 2 * kTileRows)),
        k_(scratch.objects<uint16_t>(kPanelKeys * width_)),
        v_columns_(scratch.objects<uint16_t>(value_width_ * kColumnStride)),
        scores_(scratch.objects<float>(kPanelKeys * kTileRows)),
        weights_(scratch.objects<uint32_t>(kPanelKeys / 2 * kTileRows)),
        rows_(scratch.objects<uint16_t>(std::max<int64_t>(kPanelKeys, kTileRows) *
                                        std::max(width_, value_width_))),
        words_(scratch.objects<uint32_t>(kPanelKeys / 2 * value_width_)) {}

  void load_rows(int t, const RowTile& tile) {
    copy_tile_rows(p_.q, p_.shape.heads_per_group(), at_, tile, p_.shape.head_dim, rows_);
    rows_to_word_lanes(rows_, width_, q_ + t * width_ / 2 * kTileRows);
  }

  void load_panel(int64_t first, int64_t last) {
    copy_key_rows(p_.k, at_, first, last - first, p_.shape.head_dim, k_);
    copy_key_rows(p_.v, at_, first, last - first, p_.shape.value_dim, rows_);
    keys_to_columns(rows_, round_up(last - first, kAmxBlock), value_width_, words_, v_columns_,
                    kColumnStride);
  }

  // Whole blocks of keys are computed; those before `begin` or from `end` on
  // are masked like any other.
  void attend(int t, const RowTile& tile, SoftmaxState& state, int64_t first, int64_t begin, int64_t end,
              float* out) {
    const int64_t offset = (begin - first) / kAmxBlock * kAmxBlock;
    const int64_t num_keys = round_up(end - first, kAmxBlock) - offset;
    amx_multiply<false>({num_keys, kTileRows, width_}, k_ + offset * width_, width_,
                        q_ + t * width_ / 2 * kTileRows, kTileRows, scores_, kTileRows);
    Vec top[kMicroVecs];
    find_maximum(tile, first + offset, num_keys, top);
    SoftmaxStep step(state, top, p_.softmax_scale * kLog2E);
    make_weights(num_keys, step);
    step.finish(state);
    rescale(step, out);
    amx_multiply<true>({value_width_, kTileRows, num_keys}, v_columns_ + offset, kColumnStride, weights_,
                       kTileRows, out, kTileRows);
  }

 private:
  // One cache line more than the keys, or the rows of a tile would share few
  // cache sets.
  static constexpr int64_t kColumnStride = kPanelKeys + 32;

  void find_maximum(const RowTile& tile, int64_t first, int64_t num_keys, Vec (&top)[kMicroVecs]) {
#pragma GCC unroll 8
    for (int x = 0; x < kMicroVecs; ++x) top[x] = splat(-kInfinity);
    if (tile.needs_mask(first, first + num_keys)) {
      for (int64_t r = 0; r < num_keys; ++r) {
        for (int x = 0; x < kMicroVecs; ++x) {
          float* at = scores_ + r * kTileRows + x * kLanes;
          store(at, mask_scores(tile, first + r, x, load(at)));
        }
      }
    }
    for (int64_t r = 0; r < num_keys; ++r) {
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) top[x] = max(load(scores_ + r * kTileRows + x * kLanes), top[x]);
    }
  }

  // weights[key / 2][row] = the pair of P^T for keys (key, key + 1)
  void make_weights(int64_t num_keys, SoftmaxStep& step) {
    for (int64_t r = 0; r < num_keys; r += 2) {
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) {
        const float* at = scores_ + r * kTileRows + x * kLanes;
        const Vec even = step.weight(x, load(at)), odd = step.weight(x, load(at + kTileRows));
        store_words(weights_ + r / 2 * kTileRows + x * kLanes, pair_words(even, odd));
      }
    }
  }

  // O^T *= rescale; once the maxima have settled, which is soon, every factor
  // is 1.
  void rescale(const SoftmaxStep& step, float* out) {
    bool settled = true;
    for (int x = 0; x < kMicroVecs; ++x) settled = settled && all_equal(step.rescale[x], splat(1.0f));
    if (settled) return;
    for (int64_t d = 0; d < value_width_; ++d) {
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) {
        float* at = out + d * kTileRows + x * kLanes;
        store(at, load(at) * step.rescale[x]);
      }
    }
  }

  static MLS_INLINE bool all_equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_EQ_OQ) == 0xffff;
  }

  const ForwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  uint32_t* const q_;          // per row tile: [width / 2][kTileRows]
  uint16_t* const k_;          // [kPanelKeys][width]
  uint16_t* const v_columns_;  // V^T: [value_width][kColumnStride]
  float* const scores_;        // S^T: [kPanelKeys][kTileRows]
  uint32_t* const weights_;    // P^T: [kPanelKeys / 2][kTileRows]
  uint16_t* const rows_;       // staging
  uint32_t* const words_;      // staging
};

}  // namespace mls::cpu::MLS_VARIANT
