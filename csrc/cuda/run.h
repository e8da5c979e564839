// Runs one attention tile on an NVIDIA GPU: the C interface between the bindings and the kernels.
#pragma once
#include "attention_params.h"

namespace mls::cuda {

struct BackwardOptions {
  // No atomic additions: results are bitwise reproducible, at 7 matrix products per tile instead of 5.
  bool deterministic;
  // Number of blocks that share the query heads of one key/value head. With one block per 128 keys and
  // key/value head, few key/value heads leave multiprocessors idle. Only the Hopper kernels use it.
  int head_parts;
};

}  // namespace mls::cuda

extern "C" {

// Launches on `stream` (a cudaStream_t) of the current device. Neither synchronises nor allocates, so a call
// may be captured in a CUDA graph. Returns null, or an error message that stays valid until the thread's next
// call.
const char* mls_cuda_forward(const mls::ForwardParams* params, void* stream);

// Without `accumulate`, results are overwritten and need no initialisation, except those that blocks add to
// atomically: dq unless deterministic, dk and dv with several head parts. These must be fp32 and hold zeros.
const char* mls_cuda_backward(const mls::BackwardParams* params, const mls::cuda::BackwardOptions* options,
                              void* stream);

const char* mls_cuda_delta(const mls::DeltaParams* params, void* stream);

// Why this thread's last call used a slower kernel than the GPU supports, for a warning. Null if it did not,
// or if that was already reported.
const char* mls_cuda_fallback();
}
