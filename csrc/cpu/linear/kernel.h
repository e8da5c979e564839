// Linear attention in one variant by instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "linear_params.h"

namespace mls::cpu {

enum class LinearOperation { kSummarise, kForward, kSummariseBackward, kBackward };

struct LinearKernel {
  int64_t (*tasks)(const LinearShape&);
  // Runs a task, and returns the bytes of scratch memory that it needs; with null memory it does nothing
  // else.
  size_t (*run)(const LinearParams&, LinearOperation, int64_t task, void* memory);
};

extern const LinearKernel kBaselineLinear;
#if defined(__x86_64__)
extern const LinearKernel kAvx2Linear;
extern const LinearKernel kAvx512Linear;
#endif

}  // namespace mls::cpu
