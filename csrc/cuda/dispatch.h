// The table of kernels, and the choice among them by compute capability.
#pragma once
#include "cuda/instances.h"

namespace mls::cuda {

struct KernelEntry {
  int capability;  // the lowest supported, as 10 * major + minor
  int end_capability;
  ElementType element_type;
  int64_t head_dim, value_dim;
  bool caps;  // with a softcap
  const char* (*forward)(const ForwardParams& params, void* stream);
  const char* (*backward)(const BackwardParams& params, const BackwardOptions& options, void* stream);
};

constexpr int kAnyLater = 1 << 30;

// backward_sm90 if it supports these head dims, otherwise backward_sm80.
template <class Element, int kHeadDim, int kValueDim, bool kCaps>
const char* backward_of_hopper(const BackwardParams& params, const BackwardOptions& options, void* stream) {
#define MLS_IS(D, Dv) || (kHeadDim == D && kValueDim == Dv)
  if constexpr (false MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(MLS_IS))
    return backward_sm90<Element, kHeadDim, kValueDim, kCaps>(params, options, stream);
  else
    return backward_sm80<Element, kHeadDim, kValueDim, kCaps>(params, options, stream);
#undef MLS_IS
}

#define MLS_ENTRY(FROM, TO, ELEMENT, D, Dv, CAPS, FORWARD, BACKWARD) \
  {FROM, TO,   ElementType::k##ELEMENT,        D,                    \
   Dv,   CAPS, &FORWARD<ELEMENT, D, Dv, CAPS>, &BACKWARD<ELEMENT, D, Dv, CAPS>},
#define MLS_ENTRIES(FROM, TO, D, Dv, FORWARD, BACKWARD)          \
  MLS_ENTRY(FROM, TO, BFloat16, D, Dv, false, FORWARD, BACKWARD) \
  MLS_ENTRY(FROM, TO, Float16, D, Dv, false, FORWARD, BACKWARD)  \
  MLS_ENTRY(FROM, TO, BFloat16, D, Dv, true, FORWARD, BACKWARD)  \
  MLS_ENTRY(FROM, TO, Float16, D, Dv, true, FORWARD, BACKWARD)
#define MLS_SM90_ENTRIES(D, Dv) MLS_ENTRIES(90, 91, D, Dv, forward_sm90, backward_of_hopper)
#define MLS_SM80_ENTRIES(D, Dv) MLS_ENTRIES(80, kAnyLater, D, Dv, forward_sm80, backward_sm80)

// The first entry that matches is used, so the newest kernels come first. sm_90a code runs on 9.0 only. Later
// GPUs run the kernels for 8.0, which the driver compiles from PTX (setup.py includes it by default).
constexpr KernelEntry kKernels[] = {MLS_FOR_EACH_HOPPER_HEAD_DIM(MLS_SM90_ENTRIES)
                                        MLS_FOR_EACH_HEAD_DIM(MLS_SM80_ENTRIES)};

// Null if there is none.
inline const KernelEntry* find_kernel(int capability, int64_t head_dim, int64_t value_dim,
                                      ElementType element_type, bool caps) {
  for (const KernelEntry& entry : kKernels)
    if (capability >= entry.capability && capability < entry.end_capability && entry.head_dim == head_dim &&
        entry.value_dim == value_dim && entry.element_type == element_type && entry.caps == caps)
      return &entry;
  return nullptr;
}

}  // namespace mls::cuda
