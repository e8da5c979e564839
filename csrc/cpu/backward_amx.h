// Backward engine for AMX: bf16 operands (P and dS are rounded to bf16), fp32
// sums.
#pragma once
#include "amx_pack.h"
#include "amx_tile.h"
#include "backward.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

class AmxBackward {
 public:
  static constexpr int kPanelKeys = kAmxPanelKeys;
  static constexpr int kChunkKeys = kPanelKeys * kPanelsPerChunk;
  static int64_t width(int64_t dim) { return amx_width(dim); }
  static int64_t chunk_keys(const AttentionShape&) { return kChunkKeys; }

  AmxBackward(const BackwardParams& params, KeyHead at, ScratchCursor& scratch)
      : p_(params),
        at_(at),
        width_(amx_width(params.shape.head_dim)),
        value_width_(amx_width(params.shape.value_dim)),
        k_(scratch.objects<uint16_t>(kChunkKeys * width_)),
        v_(scratch.objects<uint16_t>(kChunkKeys * value_width_)),
        k_columns_(scratch.objects<uint16_t>(width_ * kColumnStride)),
        q_lanes_(scratch.objects<uint32_t>(width_ / 2 * kTileRows)),
        q_pairs_(scratch.objects<uint32_t>(kTileRows / 2 * width_)),
        do_lanes_(scratch.objects<uint32_t>(value_width_ / 2 * kTileRows)),
        do_pairs_(scratch.objects<uint32_t>(kTileRows / 2 * value_width_)),
        scores_(scratch.objects<float>(kPanelKeys * kTileRows)),
        dweights_(scratch.objects<float>(kPanelKeys * kTileRows)),
        weight_rows_(scratch.objects<uint16_t>(kPanelKeys * kTileRows)),
        dscore_rows_(scratch.objects<uint16_t>(kPanelKeys * kTileRows)),
        dscore_pairs_(scratch.objects<uint32_t>(kPanelKeys / 2 * kTileRows)),
        rows_(scratch.objects<uint16_t>(kTileRows * std::max(width_, value_width_))),
        words_(scratch.objects<uint32_t>(kChunkKeys / 2 * width_)) {}

  void load_chunk(int64_t first, int64_t last) {
    copy_key_rows(p_.k, at_, first, last - first, p_.shape.head_dim, k_);
    copy_key_rows(p_.v, at_, first, last - first, p_.shape.value_dim, v_);
    keys_to_columns(k_, round_up(last - first, kAmxBlock), width_, words_, k_columns_, kColumnStride);
  }

  void load_rows(const RowTile& tile) {
    const int64_t group = p_.shape.heads_per_group();
    copy_tile_rows(p_.q, group, at_, tile, p_.shape.head_dim, rows_);
    rows_to_word_lanes(rows_, width_, q_lanes_);
    interleave_rows(rows_, kTileRows, width_, q_pairs_);
    copy_tile_rows(p_.dout, group, at_, tile, p_.shape.value_dim, rows_);
    rows_to_word_lanes(rows_, value_width_, do_lanes_);
    interleave_rows(rows_, kTileRows, value_width_, do_pairs_);
  }

  // Whole blocks of keys are computed; those before `begin` or from `end` on
  // are masked like any other.
  void differentiate(const BackwardTile& tile, int64_t begin, int64_t end, const Gradients& sums) {
    const int64_t first = (begin - sums.first_key) / kAmxBlock * kAmxBlock;
    const int64_t count = round_up(end - sums.first_key, kAmxBlock) - first;
    const uint16_t* k = k_ + first * width_;
    const uint16_t* v = v_ + first * value_width_;
    amx_multiply<false>({count, kTileRows, width_}, k, width_, q_lanes_, kTileRows, scores_, kTileRows);
    amx_multiply<false>({count, kTileRows, value_width_}, v, value_width_, do_lanes_, kTileRows, dweights_,
                        kTileRows);
    if (tile.rows.needs_mask(sums.first_key + first, sums.first_key + first + count)) {
      mask(tile.rows, sums.first_key + first, count);
    }
    differentiate_softmax(tile, count);
    amx_multiply<true>({count, value_width_, kTileRows}, weight_rows_, kTileRows, do_pairs_, value_width_,
                       sums.dv + first * value_width_, value_width_);
    amx_multiply<true>({count, width_, kTileRows}, dscore_rows_, kTileRows, q_pairs_, width_,
                       sums.dk + first * width_, width_);
    amx_multiply<true>({width_, kTileRows, count}, k_columns_ + first, kColumnStride, dscore_pairs_,
                       kTileRows, sums.dq_lanes, kTileRows);
  }

 private:
  // One cache line more than the keys, or the rows of a tile would share few
  // cache sets.
  static constexpr int64_t kColumnStride = kChunkKeys + 32;

  void mask(const RowTile& tile, int64_t first, int64_t num_keys) {
    for (int64_t r = 0; r < num_keys; ++r) {
      for (int x = 0; x < kMicroVecs; ++x) {
        float* at = scores_ + r * kTileRows + x * kLanes;
        store(at, mask_scores(tile, first + r, x, load(at)));
      }
    }
  }

  // P^T = 2^(S^T * scale * log2(e) - lse), dS^T = P^T (dP^T - delta), in the
  // layouts of the three products.
  void differentiate_softmax(const BackwardTile& tile, int64_t num_keys) {
    const Vec scale = splat(p_.softmax_scale * kLog2E);
    for (int64_t r = 0; r < num_keys; r += 2) {
      Vec p[2][kMicroVecs], ds[2][kMicroVecs];
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) {
        const Vec lse = load(tile.lse_log2 + x * kLanes), delta = load(tile.delta + x * kLanes);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t at = (r + i) * kTileRows + x * kLanes;
          p[i][x] = exp2(load(scores_ + at) * scale - lse);
          ds[i][x] = p[i][x] * (load(dweights_ + at) - delta);
        }
        store_words(dscore_pairs_ + r / 2 * kTileRows + x * kLanes, pair_words(ds[0][x], ds[1][x]));
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 8
        for (int x = 0; x < kMicroVecs; x += 2) {
          const int64_t at = (r + i) * kTileRows + x * kLanes;
          store_words(reinterpret_cast<uint32_t*>(weight_rows_ + at), neighbour_words(p[i][x], p[i][x + 1]));
          store_words(reinterpret_cast<uint32_t*>(dscore_rows_ + at),
                      neighbour_words(ds[i][x], ds[i][x + 1]));
        }
      }
    }
  }

  const BackwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  uint16_t *const k_,
      *const v_;               // [kChunkKeys][width], [kChunkKeys][value_width]
  uint16_t* const k_columns_;  // K^T: [width][kColumnStride]
  uint32_t *const q_lanes_,
      *const q_pairs_;  // [width / 2][kTileRows], [kTileRows / 2][width]
  uint32_t *const do_lanes_,
      *const do_pairs_;                    // the same of dO, with value_width
  float *const scores_, *const dweights_;  // S^T, dP^T: [kPanelKeys][kTileRows]
  uint16_t *const weight_rows_,
      *const dscore_rows_;        // P^T, dS^T: [kPanelKeys][kTileRows]
  uint32_t* const dscore_pairs_;  // dS^T: [kPanelKeys / 2][kTileRows]
  uint16_t* const rows_;          // staging
  uint32_t* const words_;         // staging
};

}  // namespace mls::cpu::MLS_VARIANT
