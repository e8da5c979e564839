// Linear attention for the compiler's default target: SSE2 on x86-64, NEON on ARM.
#include "variant_headers.h"

#define MLS_VARIANT baseline
#define MLS_VEC_BYTES 16
#include "variant.h"

namespace mls::cpu {
const LinearKernel kBaselineLinear = baseline::linear_kernel();
}
