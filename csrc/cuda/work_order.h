// The order in which the blocks of a Hopper launch are assigned their work.
#pragma once
#include "attention_params.h"
#include "cuda/primitives/sm80.h"

namespace mls::cuda {

// The work of a launch is every tile of every unit, where a unit is one head of one sequence. Blocks start in
// the order of their index, so the order determines two things:
//
// - Load balance of the multiprocessors. Under a causal mask tiles differ in cost. The longest tiles of all
//   units come first and the shortest last, so that no multiprocessor starts a long tile when the others
//   finish.
// - Reuse of the L2 cache. Only as many units run side by side as fit into it with the data that their blocks
//   read repeatedly (forward: K and V). The next units follow when those are done.
struct WorkOrder {
  int num_tiles, num_units, units_side_by_side;

  struct Place {
    int unit;
    int tile;  // 0 is started first
  };

  MLS_DEVICE Place place(int index) const {
    const int section = index / (units_side_by_side * num_tiles), first_unit = section * units_side_by_side;
    const int left = num_units - first_unit, width = left < units_side_by_side ? left : units_side_by_side;
    const int within = index - first_unit * num_tiles;
    return {first_unit + within % width, within / width};
  }

  // The grid of a launch with one tile per block.
  Dim3 blocks() const { return Dim3(static_cast<unsigned>(num_tiles) * static_cast<unsigned>(num_units)); }
};

// Budget, out of the 50 MB of L2 cache of compute capability 9.0. Tests use less.
#if !defined(MLS_CACHED_BYTES)
#define MLS_CACHED_BYTES (32 << 20)
#endif
constexpr int64_t kCachedBytes = MLS_CACHED_BYTES;
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr const char* kTooManyBlocks =
    "B * H * Sq is too large for one launch: use fewer heads or sequences per call";

// Returns null, or an error message. `cached_bytes`: data that the blocks of one unit read repeatedly.
inline const char* make_order(WorkOrder* order, int64_t num_tiles, int64_t num_units, int64_t cached_bytes) {
  if (num_tiles * num_units > kMaxBlocks) return kTooManyBlocks;
  int64_t width = cached_bytes > 0 ? kCachedBytes / cached_bytes : num_units;
  width = width < 1 ? 1 : width > num_units ? num_units : width;
  *order = {static_cast<int>(num_tiles), static_cast<int>(num_units), static_cast<int>(width)};
  return nullptr;
}

// Bytes of K and V that the blocks of one query head read, shared by the heads of its group.
inline int64_t key_bytes_of_head(const AttentionShape& shape) {
  return shape.num_keys * (shape.head_dim + shape.value_dim) * 2 / shape.heads_per_group();
}

// Bytes of Q and dO (16 bits) and of dQ (read and written in 32 bits) that the blocks of one query head use.
inline int64_t query_bytes_of_head(const AttentionShape& shape) {
  return shape.num_queries * (shape.head_dim * 6 + shape.value_dim * 2);
}

}  // namespace mls::cuda
