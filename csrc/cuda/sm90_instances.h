// Defines forward_sm90 for the head dims that have a Hopper kernel.
#pragma once
#include "cuda/forward_sm90.h"
#include "cuda/instances.h"

namespace mls::cuda {

// Consumer warpgroups, keys per tile. With short rows, registers and shared memory suffice for a third
// warpgroup that reuses each tile of keys; at D = 256 fewer keys fit.
template <int kHeadDim, int kValueDim>
struct HopperForwardSizes {
  static constexpr int kConsumers = 2, kKeys = 128;
};
template <>
struct HopperForwardSizes<64, 64> {
  static constexpr int kConsumers = 3, kKeys = 128;
};
template <>
struct HopperForwardSizes<256, 256> {
  static constexpr int kConsumers = 2, kKeys = 80;
};

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* forward_sm90(const ForwardParams& params, void* stream) {
  using Sizes = HopperForwardSizes<kHeadDim, kValueDim>;
  using Traits =
      MaybeSoftcap<HopperForwardTraits<Element, kHeadDim, kValueDim, Sizes::kConsumers, Sizes::kKeys>, kCaps>;
  const char* failure = nullptr;
  const bool taken = launch_forward_sm90<Traits>(params, stream, &failure);
  return taken ? failure : forward_sm80<Element, kHeadDim, kValueDim, kCaps>(params, stream);
}

#define MLS_DEFINE_FORWARD_SM90(Element, D, Dv, kCaps) \
  template const char* forward_sm90<Element, D, Dv, kCaps>(const ForwardParams&, void*);

}  // namespace mls::cuda
