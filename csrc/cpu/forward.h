// Forward: O = softmax(Q K^T) V, one block of row tiles against all keys it sees.
//
// Everything is transposed: S^T[key][row] = K Q^T and O^T[d][row] += V^T P^T, query rows in the SIMD lanes,
// so maximum, sum and rescaling of the online softmax are lane-wise and K, V are read in their natural
// layout.
#pragma once
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

struct ForwardTile {
  RowTile rows;
  alignas(MLS_VEC_BYTES) float max_log2[kTileRows];  // running maximum of score * scale * log2(e)
  alignas(MLS_VEC_BYTES) float sum[kTileRows];       // of 2^(score - maximum)
};

struct ForwardScratch {
  ForwardTile* tiles;
  float* q_lanes;    // per tile: [padded(D)][kTileRows]
  float* out_lanes;  // per tile: [padded(Dv)][kTileRows], not yet divided by the sum
  float* scores;     // S^T, then P^T: [kPanelKeys][kTileRows]
  float* k_panel;    // [kPanelKeys][padded(D)]
  float* v_panel;    // [kPanelKeys][padded(Dv)]
  float* rows;       // staging: [kTileRows][padded(max(D, Dv))]
  size_t bytes;

  ForwardScratch(const AttentionShape& shape, void* base) {
    ScratchCursor cursor(base);
    const int64_t dim = padded(shape.head_dim), value_dim = padded(shape.value_dim);
    tiles = cursor.objects<ForwardTile>(kTilesPerBlock);
    q_lanes = cursor.objects<float>(kTilesPerBlock * dim * kTileRows);
    out_lanes = cursor.objects<float>(kTilesPerBlock * value_dim * kTileRows);
    scores = cursor.objects<float>(kPanelKeys * kTileRows);
    k_panel = cursor.objects<float>(kPanelKeys * dim);
    v_panel = cursor.objects<float>(kPanelKeys * value_dim);
    rows = cursor.objects<float>(kTileRows * std::max(dim, value_dim));
    bytes = cursor.used();
  }
};

// One worker's view of one forward task.
template <class Element>
class ForwardBlock {
 public:
  ForwardBlock(const ForwardParams& params, KeyHead at, void* scratch)
      : p_(params),
        shape_(params.shape),
        at_(at),
        group_(params.shape.heads_per_group()),
        log2_scale_(params.softmax_scale * kLog2E),
        s_(params.shape, scratch) {}

  void run(int64_t first_row) {
    const int64_t remaining = rows_per_kv_head(shape_) - first_row;
    const int num_tiles = static_cast<int>(std::min<int64_t>(kTilesPerBlock, ceil_div(remaining, kTileRows)));
    int64_t key_begin = shape_.num_keys, key_end = 0;
    for (int t = 0; t < num_tiles; ++t) {
      begin_tile(t, first_row + t * kTileRows);
      key_begin = std::min(key_begin, s_.tiles[t].rows.key_begin);
      key_end = std::max(key_end, s_.tiles[t].rows.key_end);
    }
    for (int64_t key = key_begin; key < key_end; key += kPanelKeys) {
      process_panel(num_tiles, key, std::min<int64_t>(key + kPanelKeys, key_end));
    }
    for (int t = 0; t < num_tiles; ++t) finish_tile(t);
  }

 private:
  float* q_lanes(int t) const { return s_.q_lanes + t * padded(shape_.head_dim) * kTileRows; }
  float* out_lanes(int t) const { return s_.out_lanes + t * padded(shape_.value_dim) * kTileRows; }

  void begin_tile(int t, int64_t first_row) {
    ForwardTile& tile = s_.tiles[t];
    fill_row_tile(shape_, p_.mask, first_row, tile.rows);
    load_tile_rows<Element>(p_.q, group_, at_, tile.rows, shape_.head_dim, s_.rows);
    rows_to_lanes(s_.rows, shape_.head_dim, q_lanes(t));
    std::fill_n(tile.max_log2, kTileRows, -kInfinity);
    std::fill_n(tile.sum, kTileRows, 0.0f);
    if (p_.accumulate) {
      load_partial_result(t);
    } else {
      std::memset(out_lanes(t), 0, padded(shape_.value_dim) * kTileRows * sizeof(float));
    }
  }

  // A normalised partial (out, lse) is the state of an online softmax with maximum lse and sum 1.
  void load_partial_result(int t) {
    ForwardTile& tile = s_.tiles[t];
    const TokenTensor<const void> out{p_.out.data, p_.out.token_stride, p_.out.batch_stride,
                                      p_.out.head_stride};
    load_tile_rows<Float32>(out, group_, at_, tile.rows, shape_.value_dim, s_.rows);
    rows_to_lanes(s_.rows, shape_.value_dim, out_lanes(t));
    for (int i = 0; i < tile.rows.num_rows; ++i) {
      const float lse = row_value(p_.lse, group_, at_, tile.rows.first_row + i);
      tile.max_log2[i] = lse * kLog2E;
      tile.sum[i] = lse == -kInfinity ? 0.0f : 1.0f;
    }
  }

  void process_panel(int num_tiles, int64_t first, int64_t last) {
    bool loaded = false;
    for (int t = 0; t < num_tiles; ++t) {
      const RowTile& rows = s_.tiles[t].rows;
      const int64_t begin = std::max(first, rows.key_begin), end = std::min(last, rows.key_end);
      if (begin >= end) continue;
      if (!loaded) {
        load_key_panel<Element>(p_.k, at_, first, last - first, shape_.head_dim, s_.k_panel);
        load_key_panel<Element>(p_.v, at_, first, last - first, shape_.value_dim, s_.v_panel);
        loaded = true;
      }
      attend(t, first, begin, end);
    }
  }

  // Keys [begin, end) of the panel that starts at key `first`, for one row tile.
  void attend(int t, int64_t first, int64_t begin, int64_t end) {
    Accumulator<1, kMicroVecs> rescale;
    score_keys(t, first, begin, end, rescale);
    const float* v = s_.v_panel + (begin - first) * padded(shape_.value_dim);
    float* out = out_lanes(t);
    const float* p = s_.scores;
    const int64_t ldv = padded(shape_.value_dim);
    for_row_groups(shape_.value_dim, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      float* tile = out + d * kTileRows;
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        value = load(tile + i * kTileRows + x * kLanes) * rescale.at[0][x];
      });
      multiply_add<Order::kColumnMajor>(v + d, ldv, p, kTileRows, end - begin, acc);
      acc.for_each([&](int i, int x, Vec& value)
                       __attribute__((always_inline)) { store(tile + i * kTileRows + x * kLanes, value); });
    });
  }

  // scores = P^T of these keys against the updated maximum; rescale = what older sums must be multiplied by.
  void score_keys(int t, int64_t first, int64_t begin, int64_t end, Accumulator<1, kMicroVecs>& rescale) {
    ForwardTile& tile = s_.tiles[t];
    const float* k = s_.k_panel + (begin - first) * padded(shape_.head_dim);
    const float* q = q_lanes(t);
    float* scores = s_.scores;
    const int64_t dim = shape_.head_dim;
    const bool masked = tile.rows.needs_mask(begin, end);
    Accumulator<1, kMicroVecs> top;
    top.for_each([](int, int, Vec& x) __attribute__((always_inline)) { x = splat(-kInfinity); });
    for_row_groups(end - begin, [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kRowMajor>(k + r * padded(dim), padded(dim), q, kTileRows, dim, acc);
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile.rows, begin + r + i, x, score);
        });
      }
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        top.at[0][x] = max(score, top.at[0][x]);
        store(scores + (r + i) * kTileRows + x * kLanes, score);
      });
    });
    exponentiate(tile, end - begin, top, rescale);
  }

  void exponentiate(ForwardTile& tile, int64_t num_keys, const Accumulator<1, kMicroVecs>& top,
                    Accumulator<1, kMicroVecs>& rescale) {
    const Vec scale = splat(log2_scale_);
    Vec offset[kMicroVecs], sum[kMicroVecs];
#pragma GCC unroll 8
    for (int x = 0; x < kMicroVecs; ++x) {
      const Vec old = load(tile.max_log2 + x * kLanes);
      const Vec updated = max(top.at[0][x] * scale, old);
      offset[x] = finite_max(updated);
      rescale.at[0][x] = exp2(old - offset[x]);
      sum[x] = load(tile.sum + x * kLanes) * rescale.at[0][x];
      store(tile.max_log2 + x * kLanes, updated);
    }
    for (int64_t r = 0; r < num_keys; ++r) {
#pragma GCC unroll 8
      for (int x = 0; x < kMicroVecs; ++x) {
        float* at = s_.scores + r * kTileRows + x * kLanes;
        const Vec p = exp2(load(at) * scale - offset[x]);
        sum[x] += p;
        store(at, p);
      }
    }
#pragma GCC unroll 8
    for (int x = 0; x < kMicroVecs; ++x) store(tile.sum + x * kLanes, sum[x]);
  }

  void finish_tile(int t) {
    const ForwardTile& tile = s_.tiles[t];
    if (p_.accumulate && tile.rows.key_begin >= tile.rows.key_end) return;  // nothing was merged
    alignas(MLS_VEC_BYTES) float inverse[kTileRows];
    for (int i = 0; i < kTileRows; ++i) inverse[i] = tile.sum[i] == 0.0f ? 0.0f : 1.0f / tile.sum[i];
    lanes_to_rows(out_lanes(t), shape_.value_dim, inverse, s_.rows);
    for (int i = 0; i < tile.rows.num_rows; ++i) {
      const int64_t row = tile.rows.first_row + i;
      std::memcpy(row_pointer(p_.out, group_, at_, row), s_.rows + i * padded(shape_.value_dim),
                  shape_.value_dim * sizeof(float));
      row_value(p_.lse, group_, at_, row) =
          tile.sum[i] == 0.0f ? -kInfinity : tile.max_log2[i] * kLn2 + std::log(tile.sum[i]);
    }
  }

  const ForwardParams& p_;
  const AttentionShape& shape_;
  const KeyHead at_;
  const int64_t group_;
  const float log2_scale_;
  const ForwardScratch s_;
};

inline int64_t row_blocks(const AttentionShape& shape) {
  return ceil_div(rows_per_kv_head(shape), int64_t{kTileRows} * kTilesPerBlock);
}

inline Workload forward_workload(const ForwardParams& p) {
  return {p.shape.batch * p.shape.num_kv_heads * row_blocks(p.shape), ForwardScratch(p.shape, nullptr).bytes,
          0};
}

// Last rows first: under a causal mask they see most keys, and the big tasks should not come last.
inline void forward_task(const ForwardParams& p, int64_t task, void* scratch) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  const KeyHead at{task % heads / p.shape.num_kv_heads, task % heads % p.shape.num_kv_heads};
  const int64_t first_row = (row_blocks(p.shape) - 1 - task / heads) * kTileRows * kTilesPerBlock;
  if (p.element_type == ElementType::kFloat32) {
    ForwardBlock<Float32>(p, at, scratch).run(first_row);
  } else {
    ForwardBlock<BFloat16>(p, at, scratch).run(first_row);
  }
}

}  // namespace mls::cpu::MLS_VARIANT
