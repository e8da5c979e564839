// Defines forward_sm90: the head dims that have kernels of their own on Hopper.
#pragma once
#include "cuda/forward_sm90.h"
#include "cuda/instances.h"

namespace mls::cuda {

template <class Element, int kHeadDim, int kValueDim>
const char* forward_sm90(const ForwardParams& params, void* stream) {
  const char* failure = nullptr;
  const bool taken =
      launch_forward_sm90<HopperForwardTraits<Element, kHeadDim, kValueDim>>(params, stream, &failure);
  return taken ? failure : forward_sm80<Element, kHeadDim, kValueDim>(params, stream);
}

#define MLS_DEFINE_FORWARD_SM90(Element, D, Dv) \
  template const char* forward_sm90<Element, D, Dv>(const ForwardParams&, void*);

}  // namespace mls::cuda
