// Base-2 exponential, the softmax of FlashAttention in log2 units: p = 2^(score * scale * log2(e) - max).
#pragma once
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for x <= about 0, relative error 9e-8; below -126 (and at -inf) exactly 0; NaN stays NaN.
// x is split into integer n and remainder r in [-1/2, 1/2] by adding 1.5 * 2^23, which rounds to nearest and
// leaves n in the low mantissa bits; a degree-5 minimax polynomial gives 2^r; n goes into the exponent.
MLS_INLINE Vec exp2(Vec x) {
  const Vec rounder = splat(12582912.0f);
  const Vec shifted = x + rounder;
  const Vec r = x - (shifted - rounder);
  Vec p = splat(1.326472032815218e-3f);
  p = p * r + 9.671513922512531e-3f;
  p = p * r + 5.550733953714371e-2f;
  p = p * r + 2.4022242426872253e-1f;
  p = p * r + 6.931470036506653e-1f;
  p = p * r + 1.0f;
  const IntVec scaled = reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23);
  const IntVec underflow = x < splat(-126.0f);
  return reinterpret_cast<Vec>(scaled & ~underflow);
}

// A running maximum that is safe to subtract: a row without keys has -inf, and -inf - -inf would be NaN.
MLS_INLINE Vec finite_max(Vec max_log2) {
  return select(max_log2 == splat(-kInfinity), Vec{}, max_log2);
}

}  // namespace mls::cpu::MLS_VARIANT
