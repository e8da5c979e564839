// Backward: one chunk of keys against all query rows that see it.
//
// dK and dV of the chunk stay with the worker; dQ of a row tile is summed over chunks in memory, always in
// the order of the chunks: workers take turns, so the sum is the same bit for bit on any number of cores and
// no worker needs a dQ buffer of its own. Per (row tile, key panel), with P from the final lse:
//   P^T = 2^(K Q^T - lse)   dP^T = V dO^T   dS^T = P^T (dP^T - delta)
//   dV += P^T dO            dK += dS^T Q    dQ^T += K^T dS^T        (softmax_scale: once, at the end)
// Tile sums start from zero and are added to memory once: three times less fp32 error than one running sum.
#pragma once
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

struct BackwardScratch {
  RowTile* tile;
  float *k_chunk, *dk_chunk;  // [kChunkKeys][padded(D)]
  float *v_chunk, *dv_chunk;  // [kChunkKeys][padded(Dv)]
  float *q_rows, *q_lanes;    // [kTileRows][padded(D)], [padded(D)][kTileRows]
  float *do_rows, *do_lanes;  // the same of dO, with Dv
  float *p, *ds;              // P^T, dS^T: [kPanelKeys][kTileRows]
  float* dq_lanes;            // [padded(D)][kTileRows]
  float* dq_rows;             // [kTileRows][padded(D)]
  float *lse_log2, *delta;    // [kTileRows]
  size_t bytes;

  BackwardScratch(const AttentionShape& shape, void* base) {
    ScratchCursor cursor(base);
    const int64_t dim = padded(shape.head_dim), value_dim = padded(shape.value_dim);
    tile = cursor.objects<RowTile>(1);
    k_chunk = cursor.objects<float>(kChunkKeys * dim), dk_chunk = cursor.objects<float>(kChunkKeys * dim);
    v_chunk = cursor.objects<float>(kChunkKeys * value_dim);
    dv_chunk = cursor.objects<float>(kChunkKeys * value_dim);
    q_rows = cursor.objects<float>(kTileRows * dim), q_lanes = cursor.objects<float>(kTileRows * dim);
    do_rows = cursor.objects<float>(kTileRows * value_dim);
    do_lanes = cursor.objects<float>(kTileRows * value_dim);
    p = cursor.objects<float>(kPanelKeys * kTileRows), ds = cursor.objects<float>(kPanelKeys * kTileRows);
    dq_lanes = cursor.objects<float>(kTileRows * dim), dq_rows = cursor.objects<float>(kTileRows * dim);
    lse_log2 = cursor.objects<float>(kTileRows), delta = cursor.objects<float>(kTileRows);
    bytes = cursor.used();
  }
};

// Chunks [first, last) hold the keys that a row tile sees; they add to its dQ in this order.
struct ChunkRange {
  int64_t first, last;
};

inline ChunkRange chunks_of(const RowTile& tile) {
  if (tile.key_begin >= tile.key_end) return {0, 0};
  return {tile.key_begin / kChunkKeys, ceil_div(tile.key_end, kChunkKeys)};
}

inline int64_t row_tiles(const AttentionShape& shape) {
  return ceil_div(rows_per_kv_head(shape), kTileRows);
}

template <class Element>
class BackwardChunk {
 public:
  // turns: one counter per row tile of this kv head, holding the chunk whose turn it is.
  BackwardChunk(const BackwardParams& params, KeyHead at, int64_t chunk, void* scratch, TurnCounter* turns)
      : p_(params),
        shape_(params.shape),
        at_(at),
        group_(params.shape.heads_per_group()),
        chunk_(chunk),
        first_key_(chunk * kChunkKeys),
        num_keys_(std::min<int64_t>(kChunkKeys, params.shape.num_keys - chunk * kChunkKeys)),
        s_(params.shape, scratch),
        turns_(turns) {}

  // Row tiles from the last to the first: a causal chunk always sees the last, so that neighbouring chunks
  // walk one tile apart instead of waiting for each other at the start.
  void run() {
    bool loaded = false;
    for (int64_t t = row_tiles(shape_) - 1; t >= 0; --t) {
      RowTile& tile = *s_.tile;
      fill_row_tile(shape_, p_.mask, t * kTileRows, tile);
      const ChunkRange chunks = chunks_of(tile);
      if (chunk_ < chunks.first || chunk_ >= chunks.last) continue;
      if (!loaded) load_chunk();
      loaded = true;
      load_tile();
      for (int64_t panel = 0; panel < num_keys_; panel += kPanelKeys) {
        const int64_t begin = std::max(first_key_ + panel, tile.key_begin);
        const int64_t end = std::min(first_key_ + std::min(panel + kPanelKeys, num_keys_), tile.key_end);
        if (begin < end) differentiate(begin, end);
      }
      add_dq(t);
    }
    if (loaded) add_dk_dv();
  }

 private:
  void load_chunk() {
    load_key_panel<Element>(p_.k, at_, first_key_, num_keys_, shape_.head_dim, s_.k_chunk);
    load_key_panel<Element>(p_.v, at_, first_key_, num_keys_, shape_.value_dim, s_.v_chunk);
    std::memset(s_.dk_chunk, 0, num_keys_ * padded(shape_.head_dim) * sizeof(float));
    std::memset(s_.dv_chunk, 0, num_keys_ * padded(shape_.value_dim) * sizeof(float));
  }

  void load_tile() {
    const RowTile& tile = *s_.tile;
    load_tile_rows<Element>(p_.q, group_, at_, tile, shape_.head_dim, s_.q_rows);
    load_tile_rows<Element>(p_.dout, group_, at_, tile, shape_.value_dim, s_.do_rows);
    rows_to_lanes(s_.q_rows, shape_.head_dim, s_.q_lanes);
    rows_to_lanes(s_.do_rows, shape_.value_dim, s_.do_lanes);
    std::memset(s_.dq_lanes, 0, padded(shape_.head_dim) * kTileRows * sizeof(float));
    for (int i = 0; i < kTileRows; ++i) {
      s_.lse_log2[i] = kInfinity;  // rows past the end and rows that see no key: P = 2^-inf = 0
      s_.delta[i] = 0.0f;
      if (i >= tile.num_rows) continue;
      const float lse = row_value(p_.lse, group_, at_, tile.first_row + i);
      if (lse == -kInfinity) continue;
      s_.lse_log2[i] = lse * kLog2E;
      s_.delta[i] = row_value(p_.delta, group_, at_, tile.first_row + i);
    }
  }

  void differentiate(int64_t begin, int64_t end) {
    const int64_t first = begin - first_key_, count = end - begin;
    const int64_t dim = padded(shape_.head_dim), value_dim = padded(shape_.value_dim);
    probabilities(begin, end);
    score_gradients(begin, end);
    add_product(s_.p, s_.do_rows, value_dim, count, s_.dv_chunk + first * value_dim);
    add_product(s_.ds, s_.q_rows, dim, count, s_.dk_chunk + first * dim);
    const float* k = s_.k_chunk + first * dim;
    for_row_groups(shape_.head_dim, [&]<int R>(int64_t d) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kColumnMajor>(k + d, dim, s_.ds, kTileRows, count, acc);
      float* sum = s_.dq_lanes + d * kTileRows;
      acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
        float* at = sum + i * kTileRows + x * kLanes;
        store(at, load(at) + value);
      });
    });
  }

  // P^T = 2^(S^T * scale * log2(e) - lse * log2(e)), zero where masked
  void probabilities(int64_t begin, int64_t end) {
    const RowTile& tile = *s_.tile;
    const int64_t dim = shape_.head_dim;
    const float* k = s_.k_chunk + (begin - first_key_) * padded(dim);
    const Vec scale = splat(p_.softmax_scale * kLog2E);
    const bool masked = tile.needs_mask(begin, end);
    for_row_groups(end - begin, [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kRowMajor>(k + r * padded(dim), padded(dim), s_.q_lanes, kTileRows, dim, acc);
      if (masked) {
        acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
          score = mask_scores(tile, begin + r + i, x, score);
        });
      }
      acc.for_each([&](int i, int x, Vec& score) __attribute__((always_inline)) {
        store(s_.p + (r + i) * kTileRows + x * kLanes, exp2(score * scale - load(s_.lse_log2 + x * kLanes)));
      });
    });
  }

  // dS^T = P^T (V dO^T - delta)
  void score_gradients(int64_t begin, int64_t end) {
    const int64_t dim = shape_.value_dim;
    const float* v = s_.v_chunk + (begin - first_key_) * padded(dim);
    for_row_groups(end - begin, [&]<int R>(int64_t r) __attribute__((always_inline)) {
      Accumulator<R, kMicroVecs> acc;
      acc.zero();
      multiply_add<Order::kRowMajor>(v + r * padded(dim), padded(dim), s_.do_lanes, kTileRows, dim, acc);
      acc.for_each([&](int i, int x, Vec& dp) __attribute__((always_inline)) {
        const int64_t at = (r + i) * kTileRows + x * kLanes;
        store(s_.ds + at, load(s_.p + at) * (dp - load(s_.delta + x * kLanes)));
      });
    });
  }

  // sum[key][d] += weights[key][row] * rows[row][d]; here d runs along the lanes.
  void add_product(const float* weights, const float* rows, int64_t width, int64_t num_keys, float* sum) {
    const int64_t depth = s_.tile->num_rows;
    for_column_groups(width, [&]<int V>(int64_t d) __attribute__((always_inline)) {
      for_row_groups(num_keys, [&]<int R>(int64_t r) __attribute__((always_inline)) {
        Accumulator<R, V> acc;
        acc.zero();
        multiply_add<Order::kRowMajor>(weights + r * kTileRows, kTileRows, rows + d, width, depth, acc);
        acc.for_each([&](int i, int x, Vec& value) __attribute__((always_inline)) {
          float* at = sum + (r + i) * width + d + x * kLanes;
          store(at, load(at) + value);
        });
      });
    });
  }

  void add_dq(int64_t t) {
    const RowTile& tile = *s_.tile;
    alignas(MLS_VEC_BYTES) float scale[kTileRows];
    std::fill_n(scale, kTileRows, p_.softmax_scale);
    lanes_to_rows(s_.dq_lanes, shape_.head_dim, scale, s_.dq_rows);
    // Workers take chunks in ascending order, so the one waited for is running: no deadlock on any thread
    // count.
    while (turns_[t].load(std::memory_order_acquire) != chunk_) std::this_thread::yield();
    for (int i = 0; i < tile.num_rows; ++i) {
      add_row(s_.dq_rows + i * padded(shape_.head_dim), shape_.head_dim, 1.0f,
              row_pointer(p_.dq, group_, at_, tile.first_row + i));
    }
    turns_[t].store(static_cast<int32_t>(chunk_ + 1), std::memory_order_release);
  }

  void add_dk_dv() {
    add_chunk(s_.dk_chunk, shape_.head_dim, p_.softmax_scale, p_.dk);
    add_chunk(s_.dv_chunk, shape_.value_dim, 1.0f, p_.dv);
  }

  void add_chunk(const float* sums, int64_t dim, float factor, const TokenTensor<float>& gradient) {
    for (int64_t r = 0; r < num_keys_; ++r) {
      add_row(sums + r * padded(dim), dim, factor, row_pointer(gradient, 1, at_, first_key_ + r));
    }
  }

  const BackwardParams& p_;
  const AttentionShape& shape_;
  const KeyHead at_;
  const int64_t group_, chunk_, first_key_, num_keys_;
  const BackwardScratch s_;
  TurnCounter* const turns_;
};

inline Workload backward_workload(const BackwardParams& p) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  return {heads * ceil_div(p.shape.num_keys, kChunkKeys), BackwardScratch(p.shape, nullptr).bytes,
          heads * row_tiles(p.shape)};
}

inline void init_turns(const BackwardParams& p, TurnCounter* turns) {
  RowTile tile;
  for (int64_t t = 0; t < row_tiles(p.shape); ++t) {
    fill_row_tile(p.shape, p.mask, t * kTileRows, tile);
    const auto first = static_cast<int32_t>(chunks_of(tile).first);
    for (int64_t head = 0; head < p.shape.batch * p.shape.num_kv_heads; ++head) {
      turns[head * row_tiles(p.shape) + t].store(first, std::memory_order_relaxed);
    }
  }
}

// Chunk-major: ascending chunks of one head, as the turns need, and independent heads side by side.
inline void backward_task(const BackwardParams& p, int64_t task, void* scratch, TurnCounter* turns) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  const int64_t head = task % heads, chunk = task / heads;
  const KeyHead at{head / p.shape.num_kv_heads, head % p.shape.num_kv_heads};
  TurnCounter* head_turns = turns + head * row_tiles(p.shape);
  if (p.element_type == ElementType::kFloat32) {
    BackwardChunk<Float32>(p, at, chunk, scratch, head_turns).run();
  } else {
    BackwardChunk<BFloat16>(p, at, chunk, scratch, head_turns).run();
  }
}

}  // namespace mls::cpu::MLS_VARIANT
