// Linear attention for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#include "variant_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MLS_VARIANT avx2
#define MLS_VEC_BYTES 32
#include "variant.h"

namespace mls::cpu {
const LinearKernel kAvx2Linear = avx2::linear_kernel();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
