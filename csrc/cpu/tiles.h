// Every block size, in one place.
//
//   row tile    kTileRows query rows in the SIMD lanes: the columns of the transposed scores S^T[key][row]
//   row block   row tiles that share each load of keys (one forward task)
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
// The rows of a block share the loading and packing of K and V, so a block should be large. But every worker
// should get several tasks, because tasks differ in length, and Q and O of a block may take at most half
// of the L2 cache.
constexpr int kMinBlockTiles = 256 / kTileRows;
constexpr int64_t kBlockBytes = 1024 * 1024;
// AMX products take long enough to hide loads from the L3 cache, so here a block may exceed the L2 cache.
constexpr int64_t kAmxBlockBytes = 4 * 1024 * 1024, kAmxSplitBlockBytes = 3 * 1024 * 1024;
constexpr int64_t kNarrowKeys = 1024;  // a band of fewer keys is narrow: few row tiles share a panel
constexpr int kTasksPerWorker = 4;     // with more than one worker
constexpr int kVectorPanelKeys = 96;   // a multiple of kMicroRows
// K and V of a forward panel stay in the L2 cache; a longer panel means fewer passes over the rows. But there
// should be several panels, unless they would be short: each but the first is prefetched during the products
// of the one before it.
constexpr int64_t kAmxPanelBytes = 768 * 1024;
constexpr int64_t kAmxMinPanelKeys = 256, kAmxSharedPanelKeys = 512;
// Keys whose values are added to O in one product, and elements of K in one step of keys; fewer for operands
// in parts. Larger values save loads and stores of O, smaller ones L1 cache. Tuned.
constexpr int kAmxAddedKeys = 128, kAmxSplitAddedKeys = 64;
constexpr int kAmxStepValues = 4096, kAmxSplitStepValues = 2048;
constexpr int kPanelsPerChunk = 4;  // minimum
// A backward chunk should be large too, to amortise the work done once per row tile (loading and transposing
// Q and dO, adding dQ).
constexpr int kMaxPanelsPerChunk = 8;
constexpr int kWantedBackwardTasks = 16;
constexpr int kAmxMinChunkKeys = 512, kAmxMaxChunkKeys = 1024;
// For K, K^T, V, dK and dV: most of the L2 cache of processors with AMX.
constexpr int64_t kAmxChunkBytes = 1280 * 1024;
constexpr int64_t kChunkBytes = 768 * 1024;  // for K, V, dK and dV; leaves half of a small L2 cache free

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
