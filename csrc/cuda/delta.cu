#include "cuda/delta.h"

#include "cuda/argument_checks.h"

extern "C" const char* mls_cuda_delta(const mls::DeltaParams* params, void* stream) {
  namespace cuda = mls::cuda;
  const int64_t out_bytes = params->out_type == mls::ElementType::kFloat32 ? 4 : 2;
  if (!cuda::aligned_input(params->dout) || !cuda::aligned_input(params->out, out_bytes))
    return cuda::kInputAlignment;
  return cuda::run_delta(*params, stream);
}
