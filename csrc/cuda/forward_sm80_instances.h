// Defines forward_sm80 for the tile sizes below.
#pragma once
#include "cuda/forward_sm80.h"
#include "cuda/instances.h"

namespace mls::cuda {

// Warps, 16-query tiles per warp, keys per tile. At D = 128, more than 32 keys spill registers on sm_90a.
template <int kHeadDim, int kValueDim>
struct ForwardSizes {
  static constexpr int kWarps = 4, kRowTiles = 2, kKeys = 64;
};
template <>
struct ForwardSizes<128, 128> {
  static constexpr int kWarps = 4, kRowTiles = 2, kKeys = 32;
};
template <>
struct ForwardSizes<192, 128> {
  static constexpr int kWarps = 8, kRowTiles = 1, kKeys = 64;
};
template <>
struct ForwardSizes<256, 256> {
  static constexpr int kWarps = 8, kRowTiles = 1, kKeys = 32;
};

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* forward_sm80(const ForwardParams& params, void* stream) {
  using Sizes = ForwardSizes<kHeadDim, kValueDim>;
  using Traits =
      MaybeSoftcap<ForwardTraits<Element, kHeadDim, kValueDim, Sizes::kWarps, Sizes::kRowTiles, Sizes::kKeys>,
                   kCaps>;
  static_assert(Traits::kSharedBytes <= shared_budget(kHeadDim));
  return launch_forward_sm80<Traits>(params, stream);
}

#define MLS_DEFINE_FORWARD_SM80(Element, D, Dv, kCaps) \
  template const char* forward_sm80<Element, D, Dv, kCaps>(const ForwardParams&, void*);

}  // namespace mls::cuda
