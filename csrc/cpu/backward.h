// Backward driver: one chunk of keys against all query rows that see it.
//
// dK and dV of the chunk stay with the worker; dQ of a row tile is summed over
// chunks in memory, always in the order of the chunks: workers take turns, so
// the sum is the same bit for bit on any number of cores and no worker needs a
// dQ buffer of its own. Per (row tile, key panel), with P from the final lse:
//   P^T = 2^(K Q^T - lse)   dP^T = V dO^T   dS^T = P^T (dP^T - delta)
//   dV += P^T dO            dK += dS^T Q    dQ^T += K^T dS^T (softmax_scale:
//   once, at the end)
// Tile sums start from zero and are added to memory once: three times less fp32
// error than one running sum.
//
//   struct Engine {
//     static int64_t width(int64_t dim);    // dim padded as the engine's
//     products want it static constexpr int kPanelKeys;      // keys
//     differentiated at a time static constexpr int kChunkKeys;      // keys of
//     a chunk Engine(params, at, scratch cursor); void load_chunk(int64_t
//     first, int64_t last);  // K and V of these keys void load_rows(const
//     RowTile&);                // Q and dO void differentiate(const
//     BackwardTile&, int64_t begin, int64_t end, const Gradients&);
//   };
#pragma once
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

struct BackwardTile {
  RowTile rows;
  alignas(MLS_VEC_BYTES) float lse_log2[kTileRows];
  alignas(MLS_VEC_BYTES) float delta[kTileRows];
};

// Sums that an engine adds to. Keys count from first_key, the start of the
// chunk.
struct Gradients {
  int64_t first_key;
  float* dk;        // [kChunkKeys][width(D)], without softmax_scale
  float* dv;        // [kChunkKeys][width(Dv)]
  float* dq_lanes;  // [width(D)][kTileRows], without softmax_scale
};

// Chunks [first, last) hold the keys that a row tile sees; they add to its dQ
// in this order.
struct ChunkRange {
  int64_t first, last;

  ChunkRange(const RowTile& tile, int64_t chunk_keys) : first(0), last(0) {
    if (tile.key_begin >= tile.key_end) return;
    first = tile.key_begin / chunk_keys;
    last = ceil_div(tile.key_end, chunk_keys);
  }
};

template <class Engine>
class BackwardChunk {
 public:
  // turns: one counter per row tile of this kv head, holding the chunk whose
  // turn it is.
  BackwardChunk(const BackwardParams& params, KeyHead at, ScratchCursor& scratch, TurnCounter* turns)
      : p_(params),
        shape_(params.shape),
        at_(at),
        group_(params.shape.heads_per_group()),
        width_(Engine::width(params.shape.head_dim)),
        value_width_(Engine::width(params.shape.value_dim)),
        engine_(params, at, scratch),
        tile_(scratch.objects<BackwardTile>(1)),
        sums_{0, scratch.objects<float>(Engine::kChunkKeys * width_),
              scratch.objects<float>(Engine::kChunkKeys * value_width_),
              scratch.objects<float>(width_ * kTileRows)},
        dq_rows_(scratch.objects<float>(kTileRows * padded(params.shape.head_dim))),
        turns_(turns) {}

  // Row tiles from the last to the first: a causal chunk always sees the last,
  // so that neighbouring chunks walk one tile apart instead of waiting for each
  // other at the start.
  void run(int64_t chunk) {
    sums_.first_key = chunk * Engine::kChunkKeys;
    num_keys_ = std::min<int64_t>(Engine::kChunkKeys, shape_.num_keys - sums_.first_key);
    bool loaded = false;
    for (int64_t t = row_tiles(shape_) - 1; t >= 0; --t) {
      fill_row_tile(shape_, p_.mask, t * kTileRows, tile_->rows);
      const ChunkRange chunks(tile_->rows, Engine::kChunkKeys);
      if (chunk < chunks.first || chunk >= chunks.last) continue;
      if (!loaded) begin_chunk();
      loaded = true;
      process_tile();
      add_dq(turns_[t], chunk);
    }
    if (loaded) {
      add_chunk(sums_.dk, width_, shape_.head_dim, p_.softmax_scale, p_.dk);
      add_chunk(sums_.dv, value_width_, shape_.value_dim, 1.0f, p_.dv);
    }
  }

 private:
  void begin_chunk() {
    engine_.load_chunk(sums_.first_key, sums_.first_key + num_keys_);
    std::memset(sums_.dk, 0, Engine::kChunkKeys * width_ * sizeof(float));
    std::memset(sums_.dv, 0, Engine::kChunkKeys * value_width_ * sizeof(float));
  }

  void process_tile() {
    const RowTile& rows = tile_->rows;
    load_row_values();
    engine_.load_rows(rows);
    std::memset(sums_.dq_lanes, 0, width_ * kTileRows * sizeof(float));
    for (int64_t panel = 0; panel < num_keys_; panel += Engine::kPanelKeys) {
      const int64_t panel_end = std::min<int64_t>(panel + Engine::kPanelKeys, num_keys_);
      const int64_t begin = std::max(sums_.first_key + panel, rows.key_begin);
      const int64_t end = std::min(sums_.first_key + panel_end, rows.key_end);
      if (begin < end) engine_.differentiate(*tile_, begin, end, sums_);
    }
  }

  void load_row_values() {
    for (int i = 0; i < kTileRows; ++i) {
      tile_->lse_log2[i] = kInfinity;  // rows past the end and rows that see no
                                       // key: P = 2^-inf = 0
      tile_->delta[i] = 0.0f;
      if (i >= tile_->rows.num_rows) continue;
      const float lse = row_value(p_.lse, group_, at_, tile_->rows.first_row + i);
      if (lse == -kInfinity) continue;
      tile_->lse_log2[i] = lse * kLog2E;
      tile_->delta[i] = row_value(p_.delta, group_, at_, tile_->rows.first_row + i);
    }
  }

  void add_dq(TurnCounter& turn, int64_t chunk) {
    const RowTile& tile = tile_->rows;
    const int64_t dim = shape_.head_dim;
    alignas(MLS_VEC_BYTES) float scale[kTileRows];
    std::fill_n(scale, kTileRows, p_.softmax_scale);
    lanes_to_rows(sums_.dq_lanes, dim, scale, dq_rows_);
    // Workers take chunks in ascending order, so the one waited for is running:
    // no deadlock on any thread count.
    while (turn.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
    for (int i = 0; i < tile.num_rows; ++i) {
      add_row(dq_rows_ + i * padded(dim), dim, 1.0f, row_pointer(p_.dq, group_, at_, tile.first_row + i));
    }
    turn.store(static_cast<int32_t>(chunk + 1), std::memory_order_release);
  }

  void add_chunk(const float* sums, int64_t width, int64_t dim, float factor,
                 const TokenTensor<float>& gradient) {
    for (int64_t r = 0; r < num_keys_; ++r) {
      add_row(sums + r * width, dim, factor, row_pointer(gradient, 1, at_, sums_.first_key + r));
    }
  }

  const BackwardParams& p_;
  const AttentionShape& shape_;
  const KeyHead at_;
  const int64_t group_, width_, value_width_;
  int64_t num_keys_ = 0;
  Engine engine_;
  BackwardTile* const tile_;
  Gradients sums_;
  float* const dq_rows_;  // staging: [kTileRows][padded(D)]
  TurnCounter* const turns_;
};

template <class Engine>
Workload backward_workload(const BackwardParams& p) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  ScratchCursor counting(nullptr);
  const BackwardChunk<Engine> chunk(p, KeyHead{}, counting, nullptr);
  return {heads * ceil_div(p.shape.num_keys, Engine::kChunkKeys), counting.used(),
          heads * row_tiles(p.shape)};
}

template <class Engine>
void init_turns(const BackwardParams& p, TurnCounter* turns) {
  RowTile tile;
  for (int64_t t = 0; t < row_tiles(p.shape); ++t) {
    fill_row_tile(p.shape, p.mask, t * kTileRows, tile);
    const auto first = static_cast<int32_t>(ChunkRange(tile, Engine::kChunkKeys).first);
    for (int64_t head = 0; head < p.shape.batch * p.shape.num_kv_heads; ++head) {
      turns[head * row_tiles(p.shape) + t].store(first, std::memory_order_relaxed);
    }
  }
}

// Chunk-major: ascending chunks of one head, as the turns need, and independent
// heads side by side.
template <class Engine>
void backward_task(const BackwardParams& p, int64_t task, void* scratch, TurnCounter* turns) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  const int64_t head = task % heads;
  ScratchCursor cursor(scratch);
  BackwardChunk<Engine> chunk(p, KeyHead{head / p.shape.num_kv_heads, head % p.shape.num_kv_heads}, cursor,
                              turns + head * row_tiles(p.shape));
  chunk.run(task / heads);
}

}  // namespace mls::cpu::MLS_VARIANT
