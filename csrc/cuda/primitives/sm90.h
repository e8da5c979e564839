// The operations of compute capability 9.0a that kernels use: TMA copies, mbarriers, named barriers, wgmma.
// See sm80.h.
#pragma once
#include "cuda/primitives/sm80.h"

namespace mls::cuda {

constexpr int kWarpgroupSize = 128;
constexpr int kSwizzleRowBytes = 128;  // one row of a panel: 64 elements
constexpr int kSwizzleColumns = 64;

}  // namespace mls::cuda

#if defined(__CUDACC__)
#include "cuda/primitives/sm90_ptx.h"
#else
#include "cuda/emulation/sm90.h"
#endif

namespace mls::cuda {

// The wgmma descriptor of a matrix in shared memory with the 128-byte swizzle. In a transposed operand,
// panels of 64 elements along the major dimension are `panel_bytes` apart; groups of eight rows are 1024
// bytes apart. Many products share `start`, and `offset` (bytes) is a compile-time constant, so one register
// serves them all.
MLS_DEVICE uint64_t matrix_descriptor(const void* start, uint32_t offset, uint32_t panel_bytes) {
  uint32_t low = shared_address(start) >> 4;
  keep_here(low);  // otherwise dozens of descriptors, hoisted out of a loop, would fill registers
  low += (offset >> 4) + (panel_bytes >> 4 << 16);
  constexpr uint32_t kHigh = 1024 >> 4 | 1 << 30;
  return static_cast<uint64_t>(kHigh) << 32 | low;
}

}  // namespace mls::cuda
