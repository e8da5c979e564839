// Defines backward_sm90 for the head dims that have a Hopper kernel.
#pragma once
#include "cuda/backward_dq_sm90.h"
#include "cuda/backward_sm90.h"
#include "cuda/instances.h"

namespace mls::cuda {

// Maximum number of query tiles (64 queries each) per launch. Each takes one byte of shared memory. Tests
// compile fewer.
#if !defined(MLS_BACKWARD_QUERY_TILES)
#define MLS_BACKWARD_QUERY_TILES 4096
#endif

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* backward_sm90(const BackwardParams& params, const BackwardOptions& options, void* stream) {
  static_assert(kHeadDim == kValueDim);
  constexpr int kMaxTiles = MLS_BACKWARD_QUERY_TILES;
  using AllGradients = MaybeSoftcap<HopperBackwardTraits<Element, kHeadDim, true, kMaxTiles>, kCaps>;
  using KeyGradients = MaybeSoftcap<HopperBackwardTraits<Element, kHeadDim, false, kMaxTiles>, kCaps>;
  const char* failure = nullptr;
  const bool taken = options.deterministic
                         ? launch_backward_sm90<KeyGradients>(params, options, stream, &failure)
                         : launch_backward_sm90<AllGradients>(params, options, stream, &failure);
  if (!taken) return backward_sm80<Element, kHeadDim, kValueDim, kCaps>(params, options, stream);
  if (!options.deterministic || failure != nullptr) return failure;
  return launch_dq_sm90<MaybeSoftcap<HopperDqTraits<Element, kHeadDim>, kCaps>>(params, stream);
}

#define MLS_DEFINE_BACKWARD_SM90(Element, D, Dv, kCaps)                                                    \
  template const char* backward_sm90<Element, D, Dv, kCaps>(const BackwardParams&, const BackwardOptions&, \
                                                            void*);

}  // namespace mls::cuda
