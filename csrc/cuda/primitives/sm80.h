// The operations of compute capability 8.0 that kernels use. Kernels reach the hardware only through these.
//
// nvcc compiles sm80_ptx.h. A host compiler compiles emulation/sm80.h, which runs the same kernel source on a
// CPU (emulation/machine.h states what that can verify and what it cannot).
#pragma once
#if defined(__CUDACC__)
#include "cuda/primitives/sm80_ptx.h"
#else
#include "cuda/emulation/sm80.h"
#endif

namespace mls::cuda {

constexpr int kWarpSize = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

MLS_DEVICE constexpr float infinity() {
  return __builtin_huge_valf();
}

MLS_DEVICE int lane_id() {
  return static_cast<int>(thread_index().x) % kWarpSize;
}

MLS_DEVICE int warp_id() {
  return static_cast<int>(thread_index().x) / kWarpSize;
}

}  // namespace mls::cuda
