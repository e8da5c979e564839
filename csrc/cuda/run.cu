#include "cuda/run.h"

#include <initializer_list>

#include "cuda/argument_checks.h"
#include "cuda/dispatch.h"
#include "cuda/hopper_launch.h"

namespace mls::cuda {
namespace {

// 10 * major + minor of the current device; 0, with `failure` set, if there is none.
int current_capability(const char** failure) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *failure = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  return *failure == nullptr ? 10 * major + minor : 0;
}

constexpr const char* kNoKernel =
    "no CUDA kernel: it takes compute capability 8.0 and later, bfloat16 or float16, and head dims 64, 80, "
    "96, 128, 192 with value dim 128, or 256";

template <class Params>
const KernelEntry* choose(const Params& params, const char** failure) {
  const AttentionShape& shape = params.shape;
  if ((*failure = check_shape(shape)) != nullptr) return nullptr;
  const int capability = current_capability(failure);
  if (*failure != nullptr) return nullptr;
  const KernelEntry* entry =
      find_kernel(capability, shape.head_dim, shape.value_dim, params.element_type, params.softcap != 0);
  if (entry == nullptr) *failure = kNoKernel;
  return entry;
}

}  // namespace
}  // namespace mls::cuda

extern "C" {

const char* mls_cuda_forward(const mls::ForwardParams* params, void* stream) {
  namespace cuda = mls::cuda;
  if (cuda::no_output(params->shape)) return nullptr;
  if (!cuda::aligned_input(params->q) || !cuda::aligned_input(params->k) || !cuda::aligned_input(params->v))
    return cuda::kInputAlignment;
  if (!cuda::aligned_result(params->out) || !cuda::aligned_result(params->rounded_out))
    return cuda::kResultAlignment;
  const char* failure = nullptr;
  const cuda::KernelEntry* entry = cuda::choose(*params, &failure);
  return entry == nullptr ? failure : entry->forward(*params, stream);
}

const char* mls_cuda_backward(const mls::BackwardParams* params, const mls::cuda::BackwardOptions* options,
                              void* stream) {
  namespace cuda = mls::cuda;
  if (cuda::no_gradients(params->shape)) return nullptr;
  for (const auto* input : {&params->q, &params->k, &params->v, &params->dout})
    if (!cuda::aligned_input(*input)) return cuda::kInputAlignment;
  for (const auto* result : {&params->dq, &params->dk, &params->dv})
    if (!cuda::aligned_result(*result)) return cuda::kResultAlignment;
  for (const auto* result : {&params->rounded_dq, &params->rounded_dk, &params->rounded_dv})
    if (!cuda::aligned_result(*result)) return cuda::kResultAlignment;
  const char* failure = cuda::check_options(*params, *options);
  if (failure != nullptr) return failure;
  const cuda::KernelEntry* entry = cuda::choose(*params, &failure);
  return entry == nullptr ? failure : entry->backward(*params, *options, stream);
}

const char* mls_cuda_fallback() {
  return mls::cuda::take_fallback();
}

}  // extern "C"
