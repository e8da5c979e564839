// What kernels use of compute capability 9.0a: tensor copies, mbarriers, named barriers, wgmma. See sm80.h.
#pragma once
#include "cuda/primitives/sm80.h"

namespace mls::cuda {

constexpr int kWarpgroupSize = 128;
constexpr int kSwizzleRowBytes = 128;  // of a panel: 64 elements of a row
constexpr int kSwizzleColumns = 64;

}  // namespace mls::cuda

#if defined(__CUDACC__)
#include "cuda/primitives/sm90_ptx.h"
#else
#include "cuda/emulation/sm90.h"
#endif

namespace mls::cuda {

// A matrix in shared memory under the 128-byte swizzle, as wgmma addresses it. Along the major dimension of a
// transposed operand panels of 64 elements follow each other every `panel_bytes`; groups of eight rows lie
// 1024 bytes apart. `start` is the same for many products and `offset` (bytes) a constant: one register
// serves all.
MLS_DEVICE uint64_t matrix_descriptor(const void* start, uint32_t offset, uint32_t panel_bytes) {
  uint32_t low = shared_address(start) >> 4;
  keep_here(low);  // hoisted out of a loop, dozens of them would fill registers
  low += (offset >> 4) + (panel_bytes >> 4 << 16);
  constexpr uint32_t kHigh = 1024 >> 4 | 1 << 30;
  return static_cast<uint64_t>(kHigh) << 32 | low;
}

}  // namespace mls::cuda
