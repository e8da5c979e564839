// Backward engine for AMX: operands of one bf16 part (bf16; P and dS are rounded)
// or of three (fp32), fp32 sums.
//
// A block of keys and the row tile leave S^T and dP^T of 32 keys at a time in
// the L1 cache, as P^T and dS^T of the whole block, in tiles of the three
// products that use them.
#pragma once
#include "amx_exp2.h"
#include "amx_pack.h"
#include "amx_tile.h"
#include "backward.h"
#include "row_tile.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
class AmxBackward {
  static constexpr int kParts = kAmxParts<Element>;

 public:
  static constexpr int kPanelKeys = kAmxMaxChunkKeys;  // always a whole chunk
  static int64_t width(int64_t dim) { return amx_width(dim); }
  static LaneLayout lanes(int64_t width) { return amx_lanes(width); }
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
        scores_(scratch.objects<float>(kStepKeys * kTileRows)),
        dweights_(scratch.objects<float>(kStepKeys * kTileRows)),
        weights_(allocate_parts<kParts, uint32_t>(scratch, kBlockKeys * kTileRows / 2)),
        dscores_(allocate_parts<kParts, uint32_t>(scratch, kBlockKeys * kTileRows / 2)),
        dscore_pairs_(allocate_parts<kParts, uint32_t>(scratch, kBlockKeys * kTileRows / 2)),
        rows_(allocate_parts<kParts, uint16_t>(scratch, kTileRows * std::max(width_, value_width_))) {
    const int64_t row_lines = AmxPrefetch::lines(p_.shape.head_dim * sizeof(float)) +
                              AmxPrefetch::lines(p_.shape.head_dim * kElementBytes) +
                              AmxPrefetch::lines(p_.shape.value_dim * kElementBytes);
    prefetch_ = AmxPrefetch(scratch.objects<const char*>(kTileRows * row_lines));
  }

  void load_chunk(int64_t first, int64_t last) {
    const AttentionShape& shape = p_.shape;
    for (int64_t key = first; key < last; key += kAmxBlock) {
      const int64_t count = std::min<int64_t>(kAmxBlock, last - key), to = key - first;
      prefetch_key_rows<Element>(p_.k, at_, key + kAmxBlock, last, shape.head_dim);
      prefetch_key_rows<Element>(p_.v, at_, key + kAmxBlock, last, shape.value_dim);
      split_key_rows<Element>(p_.k, at_, key, count, shape.head_dim, rows_);
      for (int part = 0; part < kParts; ++part) {
        rows_to_tiles(rows_[part], width_, k_[part] + to * width_);
        keys_to_column_tiles(rows_[part], width_, k_columns_[part] + to * width_);
      }
      split_key_rows<Element>(p_.v, at_, key, count, shape.value_dim, rows_);
      for (int part = 0; part < kParts; ++part)
        rows_to_tiles(rows_[part], value_width_, v_[part] + to * value_width_);
    }
  }

  void load_rows(const RowTile& tile) {
    load_rows(p_.q, tile, p_.shape.head_dim, q_lanes_, q_pairs_);
    load_rows(p_.dout, tile, p_.shape.value_dim, do_lanes_, do_pairs_);
    prefetch_rows(tile);
  }

  // Whole blocks of kAmxBlock keys are computed; those before `begin` or from
  // `end` on are masked like any other.
  void differentiate(const BackwardTile& tile, int64_t begin, int64_t end, const Gradients& sums) {
    const int64_t last = round_up(end - sums.first_key, kAmxBlock);
    int64_t key = (begin - sums.first_key) / kAmxBlock * kAmxBlock;
    for (; key < last; key += kBlockKeys) {
      const int64_t count = std::min<int64_t>(kBlockKeys, last - key);
      for (int64_t step = 0; step < count; step += kStepKeys) weigh(tile, sums.first_key, key, step);
      add_products(key, count, sums);
    }
    products_.finish();
  }

 private:
  static constexpr int kStepKeys = kAmxBlock;  // of S^T and dP^T at a time
  static constexpr int kBlockKeys = 128;  // of P^T and dS^T at a time; each block loads and stores dQ once
  static constexpr int kStrips = kTileRows / kAmxBlock;
  static constexpr int64_t kElementBytes = sizeof(typename Element::Storage);

  void load_rows(const TokenTensor<const void>& tensor, const RowTile& tile, int64_t dim,
                 AmxParts<uint32_t> lanes, AmxParts<uint32_t> pairs) {
    split_tile_rows<Element>(tensor, p_.shape.heads_per_group(), at_, tile, dim, rows_);
    for (int part = 0; part < kParts; ++part) {
      rows_to_word_tiles(rows_[part], kTileRows, amx_width(dim), lanes[part]);
      rows_to_pair_tiles(rows_[part], kTileRows, amx_width(dim), pairs[part]);
    }
  }

  // What the end of this row tile, and the start of the next, will need from
  // memory: rows of one head lie far apart, and no processor fetches them by
  // itself.
  void prefetch_rows(const RowTile& tile) {
    prefetch_.clear();
    for (int64_t row = tile.first_row; row < tile.first_row + tile.num_rows; ++row) {
      prefetch_.add(row_pointer(p_.dq, p_.shape.heads_per_group(), at_, row),
                    p_.shape.head_dim * sizeof(float));
      if (row < kTileRows) continue;
      prefetch_.add(element_row(p_.q, row - kTileRows), p_.shape.head_dim * kElementBytes);
      prefetch_.add(element_row(p_.dout, row - kTileRows), p_.shape.value_dim * kElementBytes);
    }
  }
  MLS_INLINE const void* element_row(const TokenTensor<const void>& tensor, int64_t row) {
    return row_pointer(typed<Element>(tensor), p_.shape.heads_per_group(), at_, row);
  }

  // P^T and dS^T of keys [key + step, key + step + kStepKeys) of the chunk.
  void weigh(const BackwardTile& tile, int64_t first_key, int64_t key, int64_t step) {
    const int64_t at = key + step;
    products_.multiply({kStepKeys, kTileRows, width_},
                       packed_operand(k_.from(at * width_), width_ / kAmxDepth),
                       packed_operand(q_lanes_, kMicroVecs), packed_tiles(scores_, kMicroVecs), prefetch_);
    alignas(MLS_VEC_BYTES) float minus_delta[kTileRows];
    for (int x = 0; x < kTileRows; x += kLanes) store(minus_delta + x, -load(tile.delta + x));
    products_.multiply({kStepKeys, kTileRows, value_width_},
                       packed_operand(v_.from(at * value_width_), value_width_ / kAmxDepth),
                       packed_operand(do_lanes_, kMicroVecs), {minus_delta, 0, 0, kAmxTile},
                       packed_tiles(dweights_, kMicroVecs), prefetch_);
    products_.finish();
    const bool masked = tile.rows.needs_mask(first_key + at, first_key + at + kStepKeys);
    masked ? differentiate_softmax<true>(tile, first_key + at, step)
           : differentiate_softmax<false>(tile, first_key + at, step);
  }

  // P^T = 2^(S^T * scale * log2(e) - lse), dS^T = P^T (dP^T - delta).
  template <bool kMasked>
  [[gnu::noinline]] void differentiate_softmax(const BackwardTile& tile, int64_t first_key, int64_t step) {
    const Vec scale = splat(log2_scale_);
    Vec lse[kMicroVecs];
#pragma GCC unroll 8
    for (int x = 0; x < kMicroVecs; ++x) lse[x] = load(tile.lse_log2 + x * kLanes);
    for (int64_t r = 0; r < kStepKeys; r += 2) {
      const int64_t row = r / kAmxTile * kMicroVecs * kAmxTileWords + r % kAmxTile * kAmxRow;
      const int64_t strip_row = (step + r) / kAmxTile * kStrips * kAmxTileWords + r % kAmxTile * kAmxRow;
      Bf16Parts<kParts> p[2][kMicroVecs], ds[2][kMicroVecs];
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t at = row + x * kAmxTileWords + i * kAmxRow;
          Vec score = load(scores_ + at);
          if constexpr (kMasked) score = mask_scores(tile.rows, first_key + r + i, x, score);
          const Vec weight = weight_exp2<kParts>(score * scale - lse[x]);
          p[i][x] = split<kParts>(weight);
          ds[i][x] = split<kParts>(weight * load(dweights_ + at));
        }
        store_pairs(dscore_pairs_.from(step / 2 * kTileRows + x * kAmxTileWords + r / 2 * kAmxRow), ds[0][x],
                    ds[1][x]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 8
        for (int x = 0; x < kMicroVecs; x += 2) {
          const int64_t at = strip_row + x / 2 * kAmxTileWords + i * kAmxRow;
          store_pairs(weights_.from(at), p[i][x], p[i][x + 1]);
          store_pairs(dscores_.from(at), ds[i][x], ds[i][x + 1]);
        }
      }
    }
  }

  // What a block of keys adds to dV, dK and dQ.
  void add_products(int64_t key, int64_t count, const Gradients& sums) {
    products_.multiply_add({count, value_width_, kTileRows}, packed_pairs(weights_),
                           packed_operand(do_pairs_, value_width_ / kAmxTile),
                           strided_tiles(sums.dv + key * value_width_, value_width_), prefetch_);
    products_.multiply_add({count, width_, kTileRows}, packed_pairs(dscores_),
                           packed_operand(q_pairs_, width_ / kAmxTile),
                           strided_tiles(sums.dk + key * width_, width_), prefetch_);
    constexpr int64_t kColumnTile = kAmxTile * kAmxDepth;
    const AmxTiles<const uint16_t> k{k_columns_.data + key * width_, kAmxTileBytes, kColumnTile,
                                     width_ / kAmxTile * kColumnTile, k_columns_.size};
    products_.multiply_add({width_, kTileRows, count}, k, packed_operand(dscore_pairs_, kMicroVecs),
                           lane_tiles(sums.dq_lanes, width_), prefetch_);
  }
  // Pairs of rows, the depth of an A operand.
  static MLS_INLINE AmxTiles<const uint16_t> packed_pairs(AmxParts<uint32_t> pairs) {
    return packed_tiles(reinterpret_cast<const uint16_t*>(pairs.data), kStrips, 2 * pairs.size);
  }

  const BackwardParams& p_;
  const KeyHead at_;
  const int64_t width_, value_width_;
  const float log2_scale_;
  AmxProducts<kParts> products_;
  AmxPrefetch prefetch_;  // beside the products
  // All in tiles:
  const AmxParts<uint16_t> k_, k_columns_;        // [chunk keys][width], and for each 32 keys [width][32]
  const AmxParts<uint16_t> v_;                    // [chunk keys][value_width]
  const AmxParts<uint32_t> q_lanes_, q_pairs_;    // [width / 2][kTileRows], [kTileRows / 2][width]
  const AmxParts<uint32_t> do_lanes_, do_pairs_;  // the same of dO, with value_width
  float *const scores_, *const dweights_;         // S^T, dP^T - delta: [kStepKeys][kTileRows]
  const AmxParts<uint32_t> weights_, dscores_;    // P^T, dS^T: [kBlockKeys][kTileRows / 2], pairs of rows
  const AmxParts<uint32_t> dscore_pairs_;         // dS^T: [kBlockKeys / 2][kTileRows], pairs of keys
  const AmxParts<uint16_t> rows_;                 // staging
};

}  // namespace mls::cpu::MLS_VARIANT
