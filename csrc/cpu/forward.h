// Forward driver: one block of row tiles against all the keys it sees, by online softmax.
//
// Everything is transposed: S^T[key][row] = K Q^T and O^T[d][row] += V^T P^T, with query rows in the SIMD
// lanes, so that maximum, sum and rescaling are lane-wise. An engine computes the two products:
//
//   struct Engine {
//     static int64_t width(int64_t dim);                  // dim, padded as the engine's products need it
//     static LaneLayout lanes(int64_t width);             // layout of O^T
//     static int64_t panel_keys(const AttentionShape&);   // keys loaded together
//     static int64_t most_block_tiles(const AttentionShape&);
//     Engine(params, at, block tiles, scratch cursor);
//
//     // Loads Q of row tile t.
//     void load_rows(int t, const RowTile&);
//     // Starts O^T of row tile t, at `out`, from zero; the zeros need not be written yet.
//     void clear(int t, float* out);
//     // Makes sure that O^T of row tile t is in memory.
//     void complete(int t, float* out);
//     // Loads K and V of keys [begin, end) of the panel that starts at key `first`.
//     void load_panel(int64_t first, int64_t begin, int64_t end);
//     // Adds keys [begin, end) of that panel to row tile t.
//     void attend(int t, const RowTile&, SoftmaxState&, int64_t first, int64_t begin, int64_t end,
//                 float* out);
//     // Completes the products that attend() has left pending.
//     void finish_panel();
//     // Whether V of the panel has extreme values. Non-finite ones were replaced by zeros (isolation.h).
//     bool has_extreme_values() const;
//
//     // The driver calls prefetch_keys_later() before the last kPrefetchRowTiles row tiles of a panel. The
//     // engine then prefetches these keys of the next panel during their products.
//     static constexpr int kPrefetchRowTiles;
//     void prefetch_keys_later(int64_t begin, int64_t end);
//   };
//
// Panels begin at multiples of panel_keys() regardless of which keys a block sees, so that a row tile takes
// the same softmax steps in any block.
#pragma once
#include "isolation.h"
#include "pack.h"
#include "row_tile.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <class Engine>
class ForwardBlock {
 public:
  ForwardBlock(const ForwardParams& params, KeyHead at, int64_t max_tiles, ScratchCursor& scratch)
      : p_(params),
        shape_(params.shape),
        at_(at),
        group_(params.shape.heads_per_group()),
        width_(Engine::width(params.shape.value_dim)),
        engine_(params, at, max_tiles, scratch),
        max_tiles_(max_tiles),
        tiles_(scratch.objects<RowTile>(max_tiles_)),
        states_(scratch.objects<SoftmaxState>(max_tiles_)),
        out_(scratch.objects<float>(max_tiles_ * width_ * kTileRows)),
        rows_(scratch.objects<float>(kTileRows * padded(params.shape.value_dim))) {}

  void run(int64_t first_row) {
    const int64_t remaining = rows_per_kv_head(shape_) - first_row;
    const int num_tiles = static_cast<int>(std::min<int64_t>(max_tiles_, ceil_div(remaining, kTileRows)));
    int64_t key_begin = shape_.num_keys, key_end = 0;
    for (int t = 0; t < num_tiles; ++t) {
      begin_tile(t, first_row + t * kTileRows);
      key_begin = std::min(key_begin, tiles_[t].key_begin);
      key_end = std::max(key_end, tiles_[t].key_end);
    }
    const int64_t panel = Engine::panel_keys(shape_);
    for (int64_t key = key_begin / panel * panel; key < key_end; key += panel)
      process_panel(num_tiles, key, std::min(key + panel, key_end), std::min(key + 2 * panel, key_end));
    for (int t = num_tiles; --t >= 0;) finish_tile(t);  // backwards: the last tiles are still in the cache
  }

 private:
  // O^T of a row tile, not yet divided by the sum of its weights.
  float* out_lanes(int t) const { return out_ + t * width_ * kTileRows; }

  void begin_tile(int t, int64_t first_row) {
    fill_row_tile(shape_, p_.mask, first_row, tiles_[t]);
    engine_.load_rows(t, tiles_[t]);
    states_[t].clear();
    engine_.clear(t, out_lanes(t));
    if (!p_.accumulate) return;
    engine_.complete(t, out_lanes(t));
    load_partial_result(t);
  }

  // A normalised partial result (out, lse) is the state of an online softmax with maximum lse and sum 1.
  void load_partial_result(int t) {
    const RowTile& tile = tiles_[t];
    const TokenTensor<const void> out{p_.out.data, p_.out.token_stride, p_.out.batch_stride,
                                      p_.out.head_stride};
    load_tile_rows<Float32>(out, group_, at_, tile, shape_.value_dim, rows_);
    rows_to_lanes(rows_, shape_.value_dim, out_lanes(t), Engine::lanes(width_));
    for (int i = 0; i < tile.num_rows; ++i) {
      const float lse = row_value(p_.lse, group_, at_, tile.first_row + i);
      states_[t].max_log2[i] = lse * kLog2E;
      states_[t].sum[i] = lse == -kInfinity ? 0.0f : 1.0f;
    }
  }

  // Attends to the keys of panel [first, last) that some row tile sees; the next panel is [last, next_last).
  void process_panel(int num_tiles, int64_t first, int64_t last, int64_t next_last) {
    int64_t begin = last, end = first;
    for (int t = 0; t < num_tiles; ++t) {
      if (std::max(first, tiles_[t].key_begin) >= std::min(last, tiles_[t].key_end)) continue;
      begin = std::min(begin, std::max(first, tiles_[t].key_begin));
      end = std::max(end, std::min(last, tiles_[t].key_end));
    }
    if (begin >= end) return;
    engine_.load_panel(first, begin, end);
    for (int t = 0; t < num_tiles; ++t) {
      const int64_t from = std::max(begin, tiles_[t].key_begin), to = std::min(end, tiles_[t].key_end);
      if (t == std::max(0, num_tiles - Engine::kPrefetchRowTiles))
        engine_.prefetch_keys_later(last, next_last);
      if (from < to) engine_.attend(t, tiles_[t], states_[t], first, from, to, out_lanes(t));
    }
    engine_.finish_panel();
    if (!engine_.has_extreme_values()) return;
    for (int t = 0; t < num_tiles; ++t) {
      const bool is_bf16 = p_.element_type == ElementType::kBFloat16;
      is_bf16 ? add_non_finite_values<BFloat16>(t, begin, end)
              : add_non_finite_values<Float32>(t, begin, end);
    }
  }

  template <class Element>
  void add_non_finite_values(int t, int64_t begin, int64_t end) {
    engine_.complete(t, out_lanes(t));
    add_non_finite_keys<Element>(p_.v, at_, begin, end, shape_.value_dim, tiles_[t], out_lanes(t),
                                 Engine::lanes(width_));
  }

  void finish_tile(int t) {
    const RowTile& tile = tiles_[t];
    const SoftmaxState& state = states_[t];
    if (p_.accumulate && !tile.sees_any()) return;  // the partial result is unchanged
    alignas(MLS_VEC_BYTES) float inverse[kTileRows], lse[kTileRows];
    for (int x = 0; x < kTileRows; x += kLanes) {
      const Vec sum = load(state.sum + x), zero{};
      store(inverse + x, select(sum == zero, zero, 1.0f / sum));
      store(lse + x, select(sum == zero, splat(-kInfinity), load(state.max_log2 + x) * kLn2 + log(sum)));
    }
    engine_.complete(t, out_lanes(t));
    const LaneLayout layout = Engine::lanes(width_);
    if (p_.rounded_out.data != nullptr) {
      store_tile_rows<BFloat16>(p_.rounded_out, group_, at_, tile, out_lanes(t), layout, shape_.value_dim,
                                inverse);
    } else {
      store_tile_rows<Float32>(p_.out, group_, at_, tile, out_lanes(t), layout, shape_.value_dim, inverse);
    }
    for (int i = 0; i < tile.num_rows; ++i) row_value(p_.lse, group_, at_, tile.first_row + i) = lse[i];
  }

  const ForwardParams& p_;
  const AttentionShape& shape_;
  const KeyHead at_;
  const int64_t group_, width_;
  Engine engine_;
  const int64_t max_tiles_;
  RowTile* const tiles_;
  SoftmaxState* const states_;
  float* const out_;
  float* const rows_;
};

template <class Engine>
Workload forward_workload(const ForwardParams& p, int64_t workers) {
  const int64_t tiles = block_tiles(p.shape, p.mask, workers, Engine::most_block_tiles(p.shape));
  ScratchCursor counting(nullptr);
  const ForwardBlock<Engine> block(p, KeyHead{}, tiles, counting);
  return {p.shape.batch * p.shape.num_kv_heads * ceil_div(row_tiles(p.shape), tiles), counting.used(), tiles,
          0, 0};
}

// The last rows come first: under a causal mask they see the most keys, and large tasks should not start
// last.
template <class Engine>
void forward_task(const ForwardParams& p, int64_t block_tiles, int64_t task, void* scratch) {
  const int64_t heads = p.shape.batch * p.shape.num_kv_heads;
  const KeyHead at{task % heads / p.shape.num_kv_heads, task % heads % p.shape.num_kv_heads};
  ScratchCursor cursor(scratch);
  const int64_t blocks = ceil_div(row_tiles(p.shape), block_tiles);
  ForwardBlock<Engine>(p, at, block_tiles, cursor).run((blocks - 1 - task / heads) * kTileRows * block_tiles);
}

}  // namespace mls::cpu::MLS_VARIANT
