// The kernel for x86-64 with AVX-512 and AMX: bf16 by tiles; fp32 too, split into three bf16 parts.
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

template <class Element>
void forward_task_with_tiles(const ForwardParams& p, int64_t block_tiles, int64_t task, void* scratch) {
  const AmxSession session;
  forward_task<AmxForward<Element>>(p, block_tiles, task, scratch);
}

template <class Element>
void backward_task_with_tiles(const BackwardParams& p, int64_t task, void* scratch,
                              const BackwardState& state) {
  const AmxSession session;
  backward_task<AmxBackward<Element>>(p, task, scratch, state);
}

// Multiplies values as they occur in attention: with zeros the tile unit would draw less power and run at a
// higher clock. A product in parts counts as one product.
template <class Element>
double tile_peak_work(int64_t iterations) {
  const AmxSession session;
  alignas(kAmxTileBytes) uint16_t values[kAmxTile * kAmxDepth];
  uint32_t state = 1;
  for (uint16_t& value : values) {
    state = state * 1664525u + 1013904223u;                          // a linear congruential generator
    value = static_cast<uint16_t>(0x3c00 | (state >> 16 & 0x83ff));  // +-2^-7 to +-2^1
  }
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(values, kAmxTileBytes), tile_load<5>(values, kAmxTileBytes);
  tile_load<6>(values, kAmxTileBytes), tile_load<7>(values, kAmxTileBytes);
  for (int64_t n = 0; n < iterations; ++n) {
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  }
  const double products =
      4.0 * static_cast<double>(iterations) / std::size(kAmxPartPairs<kAmxParts<Element>>);
  return products * kAmxTile * kAmxTile * kAmxDepth * 2;
}

template <class Element>
constexpr Kernel tile_kernel() {
  Kernel kernel = make_kernel<AmxForward<Element>, AmxBackward<Element>>(tile_peak_work<Element>);
  kernel.forward_task = forward_task_with_tiles<Element>;
  kernel.backward_task = backward_task_with_tiles<Element>;
  return kernel;
}

}  // namespace amx

const KernelTable kAmxTable = {"amx",
                               amx::tile_kernel<amx::Float32>(),
                               amx::vector_kernel<amx::Widened<amx::Float32>>(),
                               amx::tile_kernel<amx::BFloat16>(),
                               amx::vector_kernel<amx::Widened<amx::Float32>>(),
                               amx::vector_kernel<amx::Widened<amx::BFloat16>>(),
                               amx::attention_delta};
const KernelTable kAmxTilesTable = {"amx_tiles",
                                    amx::tile_kernel<amx::Float32>(),
                                    amx::tile_kernel<amx::Float32>(),
                                    amx::tile_kernel<amx::BFloat16>(),
                                    amx::vector_kernel<amx::Widened<amx::Float32>>(),
                                    amx::vector_kernel<amx::Widened<amx::BFloat16>>(),
                                    amx::attention_delta};

}  // namespace mls::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
