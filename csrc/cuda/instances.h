// The head dims for which kernels are compiled. Each .cu file compiles some of them.
#pragma once
#include "attention_params.h"
#include "cuda/primitives/sm80.h"
#include "cuda/run.h"

namespace mls::cuda {

// D is the head dim of q and k, Dv that of v. Tests compile fewer.
#if !defined(MLS_FOR_EACH_HEAD_DIM)
#define MLS_FOR_EACH_HEAD_DIM(X) X(64, 64) X(80, 80) X(96, 96) X(128, 128) X(192, 128) X(256, 256)
#endif

#if !defined(MLS_FOR_EACH_HOPPER_HEAD_DIM)
#define MLS_FOR_EACH_HOPPER_HEAD_DIM(X) MLS_FOR_EACH_HEAD_DIM(X)
#endif

#if !defined(MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM)
#define MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(X) X(64, 64) X(80, 80) X(96, 96) X(128, 128)
#endif

// Shared memory budget in bytes for a block of the sm_80 kernels: that of 8.0 or, for the most common head
// dim, that of 8.6, 8.9 and 12.x (on those GPUs kernels/cuda.py refuses the other head dims).
constexpr int shared_budget(int head_dim) {
  return (head_dim == 64 ? 99 : 163) * 1024;
}

// Each launches on `stream`. Returns null, or an error message. kCaps: with a softcap.
template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* forward_sm80(const ForwardParams& params, void* stream);

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* forward_sm90(const ForwardParams& params, void* stream);

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* backward_sm80(const BackwardParams& params, const BackwardOptions& options, void* stream);

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* backward_sm90(const BackwardParams& params, const BackwardOptions& options, void* stream);

}  // namespace mls::cuda
