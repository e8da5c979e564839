// The kernel for x86-64 with AVX-512 and AMX: bf16 by tiles, fp32 by vectors.
#if defined(__x86_64__)
#include "variant_headers.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define MLS_VARIANT amx
#define MLS_VEC_BYTES 64
#include "backward_amx.h"
#include "forward_amx.h"
#include "variant.h"

namespace mls::cpu {
namespace amx {

void forward_task_with_tiles(const ForwardParams& p, int64_t task, void* scratch) {
  const AmxSession session;
  forward_task<AmxForward>(p, task, scratch);
}

void backward_task_with_tiles(const BackwardParams& p, int64_t task, void* scratch, TurnCounter* turns) {
  const AmxSession session;
  backward_task<AmxBackward>(p, task, scratch, turns);
}

}  // namespace amx

const KernelTable kAmxTable = {
    "amx",
    amx::vector_kernel<amx::Float32>(),
    {amx::forward_workload<amx::AmxForward>, amx::forward_task_with_tiles,
     amx::backward_workload<amx::AmxBackward>, amx::init_turns<amx::AmxBackward>,
     amx::backward_task_with_tiles},
};

}  // namespace mls::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
