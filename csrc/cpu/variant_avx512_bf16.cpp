// The kernel for x86-64 with AVX-512 and its bf16 instructions: fp32 as in the variant avx512, bf16 by dot
// products of pairs.
#if defined(__x86_64__)
#include "variant_headers.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#define MLS_VARIANT avx512_bf16
#define MLS_VEC_BYTES 64
#include "bf16_pairs.h"
#include "variant.h"

namespace mls::cpu {
const KernelTable kAvx512Bf16Table = avx512_bf16::vector_table<avx512_bf16::Bf16Pairs>("avx512_bf16");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
