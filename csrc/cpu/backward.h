// Backward driver: one chunk of keys against all query rows that see it.
//
// dK and dV of the chunk stay with the worker. dQ of a row tile is summed over chunks in memory, always in
// the order of the chunks: workers take turns, so the sum is bitwise identical on any number of cores, and no
// worker needs a private dQ buffer. The sum is accumulated in dq itself, or, if dq is to be
// rounded, in a buffer until the last chunk rounds it. Per (row tile, key panel), with P from the final lse:
//
//   P^T = 2^(K Q^T - lse)   dP^T = V dO^T   dS^T = P^T (dP^T - delta)
//   dV += P^T dO            dK += dS^T Q    dQ^T += K^T dS^T          (softmax_scale: once, at the end)
//
// The sums of a tile start from zero and are added to memory once, which gives a third of the fp32 error of
// one running sum.
//
//   struct Engine {
//     static int64_t width(int64_t dim);                 // dim, padded as the engine's products need it
//     static LaneLayout lanes(int64_t width);            // layout of dQ^T
//     static int64_t chunk_keys(const AttentionShape&);  // keys per chunk
//     static constexpr int kPanelKeys;                   // most keys per call of differentiate()
//     // Where kLanes values of dK or dV are, counted in floats.
//     static int64_t sum_at(int64_t width, int64_t key, int64_t dim);
//     Engine(params, at, scratch cursor);
//
//     // Loads K and V of keys [first, last).
//     void load_chunk(int64_t first, int64_t last);
//     // Loads Q and dO of a row tile.
//     void load_rows(const RowTile&);
//     // Adds the gradients of these rows with keys [begin, end), which are in one panel of the chunk.
//     void differentiate(const BackwardTile&, int64_t begin, int64_t end, const Gradients&);
//     // Whether K of the chunk, or Q or dO of the row tile, has extreme values. Non-finite ones were
//     // replaced by zeros in the products with P and dS (isolation.h).
//     bool has_extreme_keys() const;
//     bool has_extreme_rows() const;
//   };
#pragma once
#include "isolation.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

struct BackwardTile {
  RowTile rows;
  alignas(MLS_VEC_BYTES) float lse_log2[kTileRows];
  alignas(MLS_VEC_BYTES) float delta[kTileRows];
  bool has_nan;  // in lse or delta; or delta is infinite
};

// Sums that an engine adds to, without softmax_scale. Keys count from first_key, the start of the chunk.
struct Gradients {
  int64_t first_key;
  float* dk;        // chunk_keys x width(D) values, laid out by sum_at()
  float* dv;        // chunk_keys x width(Dv) values, laid out by sum_at()
  float* dq_lanes;  // laid out by lanes(width(D))
};

// One row of a gradient; one of the pointers is set.
struct GradientRow {
  float* fp32;
  uint16_t* bf16;
};

// A gradient tensor of the call: fp32 sums, or rounded to bf16.
struct GradientTensor {
  TokenTensor<float> fp32;
  TokenTensor<uint16_t> bf16;

  MLS_INLINE GradientRow row(int64_t group, KeyHead at, int64_t row) const {
    if (bf16.data != nullptr) return {nullptr, row_pointer(bf16, group, at, row)};
    return {row_pointer(fp32, group, at, row), nullptr};
  }
};

// Rows of one head are far apart in memory, so hardware prefetchers do not fetch them.
MLS_INLINE void prefetch_gradient(GradientRow row, int64_t dim) {
  row.bf16 != nullptr ? prefetch_for_write(row.bf16, dim) : prefetch_for_write(row.fp32, dim);
}

template <class Engine>
class BackwardChunk {
 public:
  // `state` is that of this key/value head.
  BackwardChunk(const BackwardParams& params, KeyHead at, ScratchCursor& scratch, const BackwardState& state)
      : p_(params),
        shape_(params.shape),
        at_(at),
        group_(params.shape.heads_per_group()),
        width_(Engine::width(params.shape.head_dim)),
        value_width_(Engine::width(params.shape.value_dim)),
        chunk_keys_(Engine::chunk_keys(params.shape)),
        dq_{params.dq, params.rounded_dq},
        engine_(params, at, scratch),
        tile_(scratch.objects<BackwardTile>(1)),
        sums_{0, scratch.objects<float>(chunk_keys_ * width_),
              scratch.objects<float>(chunk_keys_ * value_width_), scratch.objects<float>(width_ * kTileRows)},
        dq_rows_(scratch.objects<float>(kTileRows * padded(params.shape.head_dim))),
        state_(state) {}

  // Row tiles run from last to first. Under a causal mask every chunk sees the last tile, so chunks that run
  // concurrently follow each other one tile apart instead of waiting for one another at the start.
  void run(int64_t chunk) {
    sums_.first_key = chunk * chunk_keys_;
    num_keys_ = std::min<int64_t>(chunk_keys_, shape_.num_keys - sums_.first_key);
    bool is_seen = false;
    for (int64_t t = row_tiles(shape_) - 1; t >= 0; --t) {
      if (chunk < state_.turns[t].first || chunk >= state_.turns[t].last) continue;
      fill_row_tile(shape_, p_.mask, t * kTileRows, tile_->rows);
      std::memset(sums_.dq_lanes, 0, width_ * kTileRows * sizeof(float));
      if (tile_->rows.sees_any()) {
        if (!is_seen) begin_chunk();
        is_seen = true;
        process_tile();
      }
      accumulate_dq(t, chunk);
    }
    if (!is_seen) {
      if (p_.accumulate) return;
      clear_sums();
    }
    put_chunk(sums_.dk, width_, shape_.head_dim, p_.softmax_scale, {p_.dk, p_.rounded_dk});
    put_chunk(sums_.dv, value_width_, shape_.value_dim, 1.0f, {p_.dv, p_.rounded_dv});
  }

 private:
  void begin_chunk() {
    engine_.load_chunk(sums_.first_key, sums_.first_key + num_keys_);
    clear_sums();
  }
  void clear_sums() {
    std::memset(sums_.dk, 0, chunk_keys_ * width_ * sizeof(float));
    std::memset(sums_.dv, 0, chunk_keys_ * value_width_ * sizeof(float));
  }

  void process_tile() {
    const RowTile& rows = tile_->rows;
    load_row_values();
    engine_.load_rows(rows);
    for (int64_t panel = 0; panel < num_keys_; panel += Engine::kPanelKeys) {
      const int64_t panel_end = std::min<int64_t>(panel + Engine::kPanelKeys, num_keys_);
      const int64_t begin = std::max(sums_.first_key + panel, rows.key_begin);
      const int64_t end = std::min(sums_.first_key + panel_end, rows.key_end);
      if (begin < end) engine_.differentiate(*tile_, begin, end, sums_);
    }
    if (!engine_.has_extreme_keys() && !engine_.has_extreme_rows()) return;
    p_.element_type == ElementType::kBFloat16 ? add_non_finite<BFloat16>() : add_non_finite<Float32>();
  }

  // Adds the values that the engine has replaced by zeros: those of K to dQ, of Q to dK, and of dO to dV.
  template <class Element>
  void add_non_finite() {
    const int64_t begin = sums_.first_key, end = begin + num_keys_;
    if (engine_.has_extreme_keys()) {
      add_non_finite_keys<Element>(p_.k, at_, begin, end, shape_.head_dim, tile_->rows, sums_.dq_lanes,
                                   Engine::lanes(width_));
    }
    if (!engine_.has_extreme_rows()) return;
    const auto adder = [&](float* sums, int64_t width) {
      return [=](int64_t key, int64_t d, Vec values) {
        float* const sum = sums + Engine::sum_at(width, key - begin, d);
        store(sum, load(sum) + values);
      };
    };
    add_non_finite_rows<Element>(p_.q, group_, at_, begin, end, shape_.head_dim, tile_->rows,
                                 adder(sums_.dk, width_));
    add_non_finite_rows<Element>(p_.dout, group_, at_, begin, end, shape_.value_dim, tile_->rows,
                                 adder(sums_.dv, value_width_));
  }

  void load_row_values() {
    tile_->has_nan = false;
    for (int i = 0; i < kTileRows; ++i) {
      tile_->lse_log2[i] = kInfinity;  // rows past the end and rows that see no key: P = 2^-inf = 0
      tile_->delta[i] = 0.0f;
      if (i >= tile_->rows.num_rows) continue;
      const float lse = row_value(p_.lse, group_, at_, tile_->rows.first_row + i);
      if (lse == -kInfinity) continue;
      tile_->lse_log2[i] = lse * kLog2E;
      tile_->delta[i] = row_value(p_.delta, group_, at_, tile_->rows.first_row + i);
      tile_->has_nan |= std::isnan(lse) || !std::isfinite(tile_->delta[i]);
    }
  }

  // Adds this chunk's part of dQ to the sum of the chunks before it, when it is its turn.
  void accumulate_dq(int64_t t, int64_t chunk) {
    ChunkTurns& turns = state_.turns[t];
    const bool is_first = chunk == turns.first, is_last = chunk + 1 == turns.last;
    const bool is_rounded = p_.rounded_dq.data != nullptr;
    if (!is_rounded) dq_lanes_to_rows();
    // Workers take chunks in ascending order, so the chunk waited for is already running: this cannot
    // deadlock, whatever the number of threads.
    while (turns.next.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
    if (!is_rounded) {
      put_dq_rows(p_.accumulate || !is_first);
    } else {
      float* const sum = state_.dq_sums + t * width_ * kTileRows;
      if (!is_first) add_row(sum, width_ * kTileRows, 1.0f, sums_.dq_lanes);
      if (!is_last) {
        std::memcpy(sum, sums_.dq_lanes, width_ * kTileRows * sizeof(float));
      } else {
        dq_lanes_to_rows();
        put_dq_rows(false);
      }
    }
    turns.next.store(static_cast<int32_t>(chunk + 1), std::memory_order_release);
  }
  void dq_lanes_to_rows() {
    alignas(MLS_VEC_BYTES) float scale[kTileRows];
    std::fill_n(scale, kTileRows, p_.softmax_scale);
    lanes_to_rows(sums_.dq_lanes, Engine::lanes(width_), shape_.head_dim, scale, dq_rows_);
  }
  void put_dq_rows(bool adds) {
    const int64_t dim = shape_.head_dim;
    for (int i = 0; i < tile_->rows.num_rows; ++i) {
      const float* const row = dq_rows_ + i * padded(dim);
      put_row([&](int64_t d) { return row + d; }, dim, 1.0f, adds,
              dq_.row(group_, at_, tile_->rows.first_row + i));
    }
  }

  void put_chunk(const float* sums, int64_t width, int64_t dim, float factor,
                 const GradientTensor& gradient) {
    const auto row_of = [&](int64_t key) { return gradient.row(1, at_, sums_.first_key + key); };
    for (int64_t key = 0; key < num_keys_; ++key) {
      prefetch_gradient(row_of(std::min(key + kRowsAhead, num_keys_ - 1)), dim);
      put_row([&](int64_t d) { return sums + Engine::sum_at(width, key, d); }, dim, factor, p_.accumulate,
              row_of(key));
    }
  }

  // values(d) points to the kLanes values from dimension d on.
  template <class Values>
  static MLS_INLINE void put_row(Values values, int64_t dim, float factor, bool adds, GradientRow to) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, dim - d);
      if (to.bf16 != nullptr) {
        store_some<BFloat16>(to.bf16 + d, load(values(d)) * factor, count);
      } else if (adds) {
        add_row(values(d), count, factor, to.fp32 + d);
      } else {
        store_some<Float32>(to.fp32 + d, load(values(d)) * factor, count);
      }
    }
  }

  static constexpr int64_t kRowsAhead = 8;

  const BackwardParams& p_;
  const AttentionShape& shape_;
  const KeyHead at_;
  const int64_t group_, width_, value_width_, chunk_keys_;
  const GradientTensor dq_;
  int64_t num_keys_ = 0;
  Engine engine_;
  BackwardTile* const tile_;
  Gradients sums_;
  float* const dq_rows_;  // staging: [kTileRows][padded(D)]
  const BackwardState state_;
};

// The first chunk has a task even if there are no keys: it zeroes the gradients that no chunk adds to.
template <class Engine>
Workload backward_workload(const BackwardParams& p) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads, tiles = heads * row_tiles(p.shape);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(p.shape.num_keys, Engine::chunk_keys(p.shape)));
  const int64_t sums = tiles * kTileRows * Engine::width(p.shape.head_dim);
  ScratchCursor counting(nullptr);
  const BackwardChunk<Engine> chunk(p, KeyHead{}, counting, {});
  return {heads * chunks, counting.used(), 0, tiles, chunks > 1 && p.rounded_dq.data != nullptr ? sums : 0};
}

// Sets the chunks that hold keys of each row tile; the first of them has the first turn. A row tile that sees
// no key is cleared by chunk 0, unless gradients are accumulated.
template <class Engine>
void init_turns(const BackwardParams& p, ChunkTurns* turns) {
  const int64_t chunk_keys = Engine::chunk_keys(p.shape), tiles = row_tiles(p.shape);
  RowTile tile;
  for (int64_t t = 0; t < tiles; ++t) {
    fill_row_tile(p.shape, p.mask, t * kTileRows, tile);
    int32_t first = 0, last = p.accumulate ? 0 : 1;
    if (tile.sees_any()) {
      first = static_cast<int32_t>(tile.key_begin / chunk_keys);
      last = static_cast<int32_t>(ceil_div(tile.key_end, chunk_keys));
    }
    for (int64_t head = 0; head < p.shape.batch * p.shape.num_kv_heads; ++head) {
      ChunkTurns& turn = turns[head * tiles + t];
      turn.first = first, turn.last = last;
      turn.next.store(first, std::memory_order_relaxed);
    }
  }
}

// Tasks are chunk-major: chunks of one head in ascending order, as the turns require, and independent heads
// concurrently.
template <class Engine>
void backward_task(const BackwardParams& p, int64_t task, void* scratch, const BackwardState& state) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  const int64_t head = task % heads, first_tile = head * row_tiles(p.shape);
  BackwardState of_head = state;
  of_head.turns += first_tile;
  if (state.dq_sums != nullptr) of_head.dq_sums += first_tile * kTileRows * Engine::width(p.shape.head_dim);
  ScratchCursor cursor(scratch);
  BackwardChunk<Engine> chunk(p, KeyHead{head / p.shape.num_kv_heads, head % p.shape.num_kv_heads}, cursor,
                              of_head);
  chunk.run(task / heads);
}

}  // namespace mls::cpu::MLS_VARIANT
