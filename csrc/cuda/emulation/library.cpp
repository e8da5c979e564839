// The kernels of csrc/cuda compiled for the CPU, as a library that tests load: one C function per entry
// point.
#include <cstring>

#include "cuda/argument_checks.h"
#include "cuda/backward_sm80_instances.h"
#include "cuda/backward_sm90_instances.h"
#include "cuda/calibration.h"
#include "cuda/delta.h"
#include "cuda/emulation/machine.h"
#include "cuda/forward_sm80_instances.h"
#include "cuda/sm90_instances.h"

namespace mls::cuda {
namespace {

constexpr const char* kNoKernel = "the library has no kernel for these head dims";

// Mutant tests compile bfloat16 without softcap only.
#if defined(MLS_ONE_VARIANT)
using OtherElement = BFloat16;
constexpr bool kHasSoftcap = false;
#else
using OtherElement = Float16;
constexpr bool kHasSoftcap = true;
#endif

#define MLS_CASE(D, Dv)                                                                \
  if (shape.head_dim == D && shape.value_dim == Dv)                                    \
    return type == ElementType::kBFloat16 ? run.template operator()<BFloat16, D, Dv>() \
                                          : run.template operator()<OtherElement, D, Dv>();

template <class Run>
const char* with_kernel(const AttentionShape& shape, ElementType type, Run run) {
  MLS_FOR_EACH_HEAD_DIM(MLS_CASE)
  return kNoKernel;
}

template <class Run>
const char* with_hopper_kernel(const AttentionShape& shape, ElementType type, Run run) {
  MLS_FOR_EACH_HOPPER_HEAD_DIM(MLS_CASE)
  return kNoKernel;
}

template <class Run>
const char* with_hopper_backward(const AttentionShape& shape, ElementType type, Run run) {
  MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(MLS_CASE)
  return kNoKernel;
}

}  // namespace
}  // namespace mls::cuda

extern "C" {

void mls_emu_configure(uint64_t seed, int threads, bool refuses_tensor_maps) {
  mls::emu::options() = {seed, threads, refuses_tensor_maps};
}

// Writes the unit and the tile of every block of a launch, in block order.
const char* mls_emu_order(int64_t num_tiles, int64_t num_units, int64_t cached_bytes, int* places) {
  mls::cuda::WorkOrder order;
  const char* failure = mls::cuda::make_order(&order, num_tiles, num_units, cached_bytes);
  if (failure != nullptr) return failure;
  for (unsigned index = 0; index < order.blocks().x; ++index) {
    const auto place = order.place(static_cast<int>(index));
    *places++ = place.unit;
    *places++ = place.tile;
  }
  return nullptr;
}

const char* mls_emu_fallback() {
  return mls::cuda::take_fallback();
}

void mls_emu_statistics(mls::emu::Statistics* copy) {
  *copy = mls::emu::statistics();
  mls::emu::statistics() = {};
}

const char* mls_emu_forward_sm80(const mls::ForwardParams* params) {
  return mls::cuda::with_kernel(
      params->shape, params->element_type, [params]<class Element, int kHeadDim, int kValueDim>() {
        using mls::cuda::kHasSoftcap;
        return params->softcap != 0
                   ? mls::cuda::forward_sm80<Element, kHeadDim, kValueDim, kHasSoftcap>(*params, nullptr)
                   : mls::cuda::forward_sm80<Element, kHeadDim, kValueDim, false>(*params, nullptr);
      });
}

const char* mls_emu_forward_sm90(const mls::ForwardParams* params) {
  return mls::cuda::with_hopper_kernel(
      params->shape, params->element_type, [params]<class Element, int kHeadDim, int kValueDim>() {
        using mls::cuda::kHasSoftcap;
        return params->softcap != 0
                   ? mls::cuda::forward_sm90<Element, kHeadDim, kValueDim, kHasSoftcap>(*params, nullptr)
                   : mls::cuda::forward_sm90<Element, kHeadDim, kValueDim, false>(*params, nullptr);
      });
}

const char* mls_emu_backward_sm80(const mls::BackwardParams* params,
                                  const mls::cuda::BackwardOptions* options) {
  if (mls::cuda::no_gradients(params->shape)) return nullptr;
  if (const char* failure = mls::cuda::check_options(*params, *options)) return failure;
  return mls::cuda::with_kernel(
      params->shape, params->element_type, [&]<class Element, int kHeadDim, int kValueDim>() {
        using mls::cuda::kHasSoftcap;
        return params->softcap != 0 ? mls::cuda::backward_sm80<Element, kHeadDim, kValueDim, kHasSoftcap>(
                                          *params, *options, nullptr)
                                    : mls::cuda::backward_sm80<Element, kHeadDim, kValueDim, false>(
                                          *params, *options, nullptr);
      });
}

const char* mls_emu_backward_sm90(const mls::BackwardParams* params,
                                  const mls::cuda::BackwardOptions* options) {
  if (mls::cuda::no_gradients(params->shape)) return nullptr;
  if (const char* failure = mls::cuda::check_options(*params, *options)) return failure;
  return mls::cuda::with_hopper_backward(
      params->shape, params->element_type, [&]<class Element, int kHeadDim, int kValueDim>() {
        using mls::cuda::kHasSoftcap;
        return params->softcap != 0 ? mls::cuda::backward_sm90<Element, kHeadDim, kValueDim, kHasSoftcap>(
                                          *params, *options, nullptr)
                                    : mls::cuda::backward_sm90<Element, kHeadDim, kValueDim, false>(
                                          *params, *options, nullptr);
      });
}

const char* mls_emu_delta(const mls::DeltaParams* params) {
  return mls::cuda::run_delta(*params, nullptr);
}

const char* mls_emu_calibrate(mls::cuda::PrimitiveGroup group, mls::ElementType type, const uint16_t* input,
                              uint32_t* output) {
  return mls::cuda::calibrate(group, type, {input, output}, nullptr);
}

}  // extern "C"
