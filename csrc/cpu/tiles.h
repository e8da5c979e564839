// Every size of the blocking, in one place.
//
//   row tile    kTileRows query rows in the SIMD lanes: the columns of the transposed scores S^T[key][row]
//   row block   row tiles that share each load of keys (one forward task): few tasks a worker, many tiles
//   key panel   at most kVectorPanelKeys keys: S^T of one (row tile, key panel) stays in the L1 cache
//   key chunk   whole panels: their K and V, and in the backward dK and dV (one task), stay in the L2 cache
//   micro tile  kMicroRows x kMicroVecs accumulators in registers
#pragma once
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

constexpr int kMicroVecs = 4;
// 24 accumulators, 4 operands and a broadcast fit the 32 registers of AVX-512; 12 fit the 16 of AVX2 and SSE.
constexpr int kMicroRows = MLS_VEC_BYTES == 64 ? 6 : 3;
constexpr int kTileRows = kMicroVecs * kLanes;
// A block shares the fetching and packing of K and V, so it should be large; but every worker should have
// some tasks, because they are not equally long, and Q and O of a block must leave half of the L2 cache.
constexpr int kMinBlockTiles = 256 / kTileRows;
constexpr int64_t kBlockBytes = 1024 * 1024;
// Products by tiles leave memory time to bring rows from a cache behind, so that a block may be larger than
// the L2 cache.
constexpr int64_t kAmxBlockBytes = 4 * 1024 * 1024, kAmxSplitBlockBytes = 3 * 1024 * 1024;
constexpr int64_t kNarrowKeys = 1024;  // rows that see fewer leave a panel to few row tiles
constexpr int kTasksPerWorker = 4;     // with more than one worker
constexpr int kVectorPanelKeys = 96;   // a multiple of kMicroRows
// K and V of a forward panel stay in the L2 cache; the longer it is, the less often do rows stream by. But
// there should be several panels, unless they get short: all but the first are fetched beside the products of
// another.
constexpr int64_t kAmxPanelBytes = 768 * 1024;
constexpr int64_t kAmxMinPanelKeys = 256, kAmxSharedPanelKeys = 512;
// Keys whose values are added to O at once, and elements of K in a step of keys; of operands in parts less.
// More would save loads and stores of O, and fewer L1 cache: the best of a range, all measured.
constexpr int kAmxAddedKeys = 128, kAmxSplitAddedKeys = 64;
constexpr int kAmxStepValues = 4096, kAmxSplitStepValues = 2048;
constexpr int kPanelsPerChunk = 4;  // at least
// A backward chunk should be large too: what it does once per row tile (fetch and transpose Q and dO, add dQ)
// is then a smaller part.
constexpr int kMaxPanelsPerChunk = 8;
constexpr int kWantedBackwardTasks = 16;
constexpr int kAmxMinChunkKeys = 512, kAmxMaxChunkKeys = 1024;
// Of K, K^T, V, dK and dV: the larger part of the L2 cache of processors with AMX.
constexpr int64_t kAmxChunkBytes = 1280 * 1024;
constexpr int64_t kChunkBytes = 768 * 1024;  // of K, V, dK and dV; half of a small L2 cache must be left

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t ceil_div(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}
// Dimensions that run along lanes are padded with zeros to whole vectors.
constexpr int64_t padded(int64_t dim) {
  return round_up(dim, kLanes);
}

}  // namespace mls::cpu::MLS_VARIANT
