// Defines backward_sm80 for the tile sizes below.
#pragma once
#include "cuda/backward_dq_sm80.h"
#include "cuda/instances.h"

namespace mls::cuda {

// Key warps, column warps and queries per tile; keys per tile of the dQ kernel.
template <int kHeadDim, int kValueDim>
struct BackwardSizes {
  static constexpr int kKeyWarps = 8, kColumnWarps = 1, kQueries = 64, kDqKeys = 64;
};
template <>
struct BackwardSizes<192, 128> {
  static constexpr int kKeyWarps = 4, kColumnWarps = 2, kQueries = 32, kDqKeys = 32;
};
template <>
struct BackwardSizes<256, 256> {
  static constexpr int kKeyWarps = 4, kColumnWarps = 2, kQueries = 32, kDqKeys = 32;
};

template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* backward_sm80(const BackwardParams& params, const BackwardOptions& options, void* stream) {
  using Sizes = BackwardSizes<kHeadDim, kValueDim>;
  using Traits = MaybeSoftcap<
      BackwardTraits<Element, kHeadDim, kValueDim, Sizes::kKeyWarps, Sizes::kColumnWarps, Sizes::kQueries>,
      kCaps>;
  using QueryTraits =
      MaybeSoftcap<QueryGradientTraits<Element, kHeadDim, kValueDim, 4, Sizes::kDqKeys>, kCaps>;
  static_assert(Traits::kSharedBytes <= shared_budget(kHeadDim));
  static_assert(QueryTraits::kSharedBytes <= shared_budget(kHeadDim));
  return launch_backward_sm80<Traits, QueryTraits>(params, options, stream);
}

#define MLS_DEFINE_BACKWARD_SM80(Element, D, Dv, kCaps)                                                    \
  template const char* backward_sm80<Element, D, Dv, kCaps>(const BackwardParams&, const BackwardOptions&, \
                                                            void*);

}  // namespace mls::cuda
