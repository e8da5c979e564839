// What kernels use of compute capability 9.0a: tensor copies, mbarriers, named barriers, wgmma. See sm80.h.
#pragma once
#include "cuda/primitives/sm80.h"
#if defined(__CUDACC__)
#include "cuda/primitives/sm90_ptx.h"
#else
#include "cuda/emulation/sm90.h"
#endif

namespace mls::cuda {

constexpr int kWarpgroupSize = 128;
constexpr int kSwizzleRowBytes = 128;  // of a panel: 64 elements of a row
constexpr int kSwizzleColumns = 64;

// A matrix in shared memory under the 128-byte swizzle, as wgmma addresses it. Along the major dimension of a
// transposed operand panels of 64 elements follow each other every `panel_bytes`; groups of eight rows lie
// 1024 bytes apart.
MLS_DEVICE uint64_t matrix_descriptor(const void* start, int panel_bytes) {
  const auto address = static_cast<uint64_t>(shared_address(start) & 0x3ffff) >> 4;
  return address | static_cast<uint64_t>(panel_bytes >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

}  // namespace mls::cuda
