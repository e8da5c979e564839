#include "cuda/calibration.h"

extern "C" const char* mls_cuda_calibrate(mls::cuda::PrimitiveGroup group, mls::ElementType type,
                                          const uint16_t* input, uint32_t* output, void* stream) {
  return mls::cuda::calibrate(group, type, {input, output}, stream);
}
