// Runs one attention tile on an NVIDIA GPU: the C interface between the bindings and the kernels.
#pragma once
#include "attention_params.h"

extern "C" {

// A launch on `stream` (a cudaStream_t) of the current device. Nothing waits for the GPU or allocates, so a
// call may be captured in a CUDA graph. Null, or what is wrong, as text that stays valid until the thread's
// next call.
const char* mls_cuda_forward(const mls::ForwardParams* params, void* stream);
const char* mls_cuda_backward(const mls::BackwardParams* params, bool deterministic, void* stream);

// Why this thread's last call used a slower kernel than the GPU has, for a warning: null when it did not, or
// when that was reported before.
const char* mls_cuda_fallback();
}
