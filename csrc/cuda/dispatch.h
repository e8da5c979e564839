// The table of kernels, and the choice among them by compute capability.
#pragma once
#include <initializer_list>

#include "cuda/instances.h"

namespace mls::cuda {

struct KernelEntry {
  int capability;  // the least, as 10 * major + minor
  int end_capability;
  ElementType element_type;
  int64_t head_dim, value_dim;
  const char* (*forward)(const ForwardParams& params, void* stream);
  const char* (*backward)(const BackwardParams& params, bool deterministic, void* stream);
};

constexpr int kAnyLater = 1 << 30;

// backward_sm90 where it has such head dims.
template <class Element, int kHeadDim, int kValueDim>
const char* backward_of_hopper(const BackwardParams& params, bool deterministic, void* stream) {
#define MLS_IS(D, Dv) || (kHeadDim == D && kValueDim == Dv)
  if constexpr (false MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(MLS_IS))
    return backward_sm90<Element, kHeadDim, kValueDim>(params, deterministic, stream);
  else
    return backward_sm80<Element, kHeadDim, kValueDim>(params, deterministic, stream);
#undef MLS_IS
}

#define MLS_ENTRY(FROM, TO, ELEMENT, D, Dv, FORWARD, BACKWARD) \
  {FROM, TO, ElementType::k##ELEMENT, D, Dv, &FORWARD<ELEMENT, D, Dv>, &BACKWARD<ELEMENT, D, Dv>},
#define MLS_SM90_ENTRIES(D, Dv)                                        \
  MLS_ENTRY(90, 91, BFloat16, D, Dv, forward_sm90, backward_of_hopper) \
  MLS_ENTRY(90, 91, Float16, D, Dv, forward_sm90, backward_of_hopper)
#define MLS_SM80_ENTRIES(D, Dv)                                          \
  MLS_ENTRY(80, kAnyLater, BFloat16, D, Dv, forward_sm80, backward_sm80) \
  MLS_ENTRY(80, kAnyLater, Float16, D, Dv, forward_sm80, backward_sm80)

// The first entry that fits is taken: the newest kernels come first. sm_90a code runs on 9.0 alone; later
// GPUs run the kernels of 8.0, which the driver compiles for them from PTX (setup.py ships it unless told
// otherwise).
constexpr KernelEntry kKernels[] = {MLS_FOR_EACH_HOPPER_HEAD_DIM(MLS_SM90_ENTRIES)
                                        MLS_FOR_EACH_HEAD_DIM(MLS_SM80_ENTRIES)};

// Null where there is none.
inline const KernelEntry* find_kernel(int capability, int64_t head_dim, int64_t value_dim,
                                      ElementType element_type) {
  for (const KernelEntry& entry : kKernels)
    if (capability >= entry.capability && capability < entry.end_capability && entry.head_dim == head_dim &&
        entry.value_dim == value_dim && entry.element_type == element_type)
      return &entry;
  return nullptr;
}

inline bool aligned(const void* pointer, std::initializer_list<int64_t> strides, int64_t bytes,
                    int64_t element_bytes) {
  bool every = reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  for (int64_t stride : strides) every = every && stride * element_bytes % bytes == 0;
  return every;
}

// Kernels copy 16 bytes of inputs and write 8 bytes of results at once.
inline bool aligned_input(const TokenTensor<const void>& t) {
  return aligned(t.data, {t.token_stride, t.batch_stride, t.head_stride}, 16, 2);
}

inline bool aligned_result(const TokenTensor<float>& t) {
  return aligned(t.data, {t.token_stride, t.batch_stride, t.head_stride}, 8, 4);
}

constexpr const char* kTooLong = "Sq + Sk must be below 2^30: the CUDA kernels count tokens in 32 bits";
constexpr const char* kInputAlignment =
    "q, k, v and dout must be 16-byte aligned with strides that are multiples of 8 elements";
constexpr const char* kResultAlignment =
    "out, dq, dk and dv must be 8-byte aligned with strides that are multiples of 2 elements";
constexpr const char* kTooManyHeads = "B and H must be at most 65535: they are dimensions of the launch grid";

inline const char* check_shape(const AttentionShape& shape) {
  if (shape.num_queries + shape.num_keys >= 1 << 30) return kTooLong;
  return shape.batch > 65535 || shape.num_heads > 65535 ? kTooManyHeads : nullptr;
}

inline bool nothing_to_do(const AttentionShape& shape) {
  return shape.num_queries == 0 || shape.batch == 0;
}

}  // namespace mls::cuda
