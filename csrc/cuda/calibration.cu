#include "cuda/calibration.h"

extern "C" const char* mls_cuda_calibrate(bool hopper, mls::ElementType type, const uint16_t* input,
                                          uint32_t* output, void* stream) {
  return mls::cuda::calibrate(hopper, type, {input, output}, stream);
}
