// Linear attention for x86-64 with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "variant_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define MLS_VARIANT avx512
#define MLS_VEC_BYTES 64
#include "variant.h"

namespace mls::cpu {
const LinearKernel kAvx512Linear = avx512::linear_kernel();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
