// What the arithmetic units of one core give at most: products of registers only, no memory.
#pragma once
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// Enough independent chains to cover the latency of a multiply-add on two ports.
constexpr int kPeakChains = MLS_VEC_BYTES == 64 ? 24 : 12;

// `iterations` times kPeakChains multiply-adds; returns the floating-point operations done.
inline double vector_peak_work(int64_t iterations) {
  Vec chain[kPeakChains];
#pragma GCC unroll 24
  for (int i = 0; i < kPeakChains; ++i) chain[i] = splat(static_cast<float>(i));
  const volatile float factor = 0.999f, term = 1e-3f;  // or the compiler could compute the result beforehand
  const Vec a = splat(factor), b = splat(term);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kPeakChains; ++i) chain[i] = chain[i] * a + b;
  }
  Vec sum{};
#pragma GCC unroll 24
  for (int i = 0; i < kPeakChains; ++i) sum += chain[i];
  [[maybe_unused]] const volatile float result = sum[0] + sum[kLanes - 1];
  return static_cast<double>(iterations) * kPeakChains * kLanes * 2;
}

}  // namespace mls::cpu::MLS_VARIANT
