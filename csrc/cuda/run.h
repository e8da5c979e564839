// Runs one attention tile on an NVIDIA GPU: the C interface between the bindings and the kernels.
#pragma once
#include "attention_params.h"

namespace mls::cuda {

struct BackwardOptions {
  // No atomic additions: results repeat bit for bit, at 7 matrix products per tile in place of 5.
  bool deterministic;
  // How many blocks share the query heads of one key/value head. With one block per key/value head and 128
  // keys, few key/value heads leave multiprocessors without work. Only Hopper's kernels look at it.
  int head_parts;
};

}  // namespace mls::cuda

extern "C" {

// Launches on `stream` (a cudaStream_t) of the current device. Nothing waits for the GPU or allocates, so
// that a call may be captured in a CUDA graph. Null, or what is wrong, as text that stays valid until the
// thread's next call.
const char* mls_cuda_forward(const mls::ForwardParams* params, void* stream);

// Without `accumulate`, results are written and need no initialisation, except for those that blocks add to
// atomically: dq unless deterministic, dk and dv with several head parts. These must be fp32 and hold zeros.
const char* mls_cuda_backward(const mls::BackwardParams* params, const mls::cuda::BackwardOptions* options,
                              void* stream);

const char* mls_cuda_delta(const mls::DeltaParams* params, void* stream);

// Why this thread's last call used a slower kernel than the GPU has, for a warning: null when it did not, or
// when that was reported before.
const char* mls_cuda_fallback();
}
