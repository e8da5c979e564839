// Peak arithmetic throughput of one core: products of registers, without memory accesses.
#pragma once
#include "micro_kernel.h"
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// Enough independent chains to cover the latency of a multiply-add on two ports.
constexpr int kPeakChains = MLS_VEC_BYTES == 64 ? 24 : 12;

// Adds kPeakChains products of words, `iterations` times; returns the number of floating-point operations.
template <class Words>
double vector_peak_work(int64_t iterations) {
  Vec chain[kPeakChains];
#pragma GCC unroll 24
  for (int i = 0; i < kPeakChains; ++i) chain[i] = splat(static_cast<float>(i));
  const volatile float factor = 1e-7f;  // volatile, or the compiler could compute the result at compile time
  const Vec a = splat(factor);
  for (int64_t n = 0; n < iterations; ++n) {
    // Each sum is a factor too, or the products could be hoisted out of the loop.
#pragma GCC unroll 24
    for (int i = 0; i < kPeakChains; ++i) chain[i] = Words::add_product(chain[i], chain[i], a);
  }
  Vec sum{};
#pragma GCC unroll 24
  for (int i = 0; i < kPeakChains; ++i) sum += chain[i];
  [[maybe_unused]] const volatile float result = sum[0] + sum[kLanes - 1];
  return static_cast<double>(iterations) * kPeakChains * kLanes * Words::kValues * 2;
}

}  // namespace mls::cpu::MLS_VARIANT
