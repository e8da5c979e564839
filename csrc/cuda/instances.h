// Which kernels exist: the tile sizes of every head dim. Each .cu file compiles some of them.
#pragma once
#include "attention_params.h"
#include "cuda/primitives/sm80.h"
#include "cuda/run.h"

namespace mls::cuda {

// D = head dim of q and k, Dv of v. Tests compile fewer.
#if !defined(MLS_FOR_EACH_HEAD_DIM)
#define MLS_FOR_EACH_HEAD_DIM(X) X(64, 64) X(80, 80) X(96, 96) X(128, 128) X(192, 128) X(256, 256)
#endif

#if !defined(MLS_FOR_EACH_HOPPER_HEAD_DIM)
#define MLS_FOR_EACH_HOPPER_HEAD_DIM(X) MLS_FOR_EACH_HEAD_DIM(X)
#endif

#if !defined(MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM)
#define MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(X) X(64, 64) X(128, 128)
#endif

// Bytes of shared memory for a block of the sm_80 kernels: what 8.0 has, and for the commonest head dim
// what 8.6, 8.9 and 12.x have too (kernels/cuda.py refuses those GPUs the others).
constexpr int shared_budget(int head_dim) {
  return (head_dim == 64 ? 99 : 163) * 1024;
}

// Each runs on the stream given and returns null, or what is wrong.
template <class Element, int kHeadDim, int kValueDim>
const char* forward_sm80(const ForwardParams& params, void* stream);

template <class Element, int kHeadDim, int kValueDim>
const char* forward_sm90(const ForwardParams& params, void* stream);

template <class Element, int kHeadDim, int kValueDim>
const char* backward_sm80(const BackwardParams& params, const BackwardOptions& options, void* stream);

template <class Element, int kHeadDim, int kValueDim>
const char* backward_sm90(const BackwardParams& params, const BackwardOptions& options, void* stream);

}  // namespace mls::cuda
