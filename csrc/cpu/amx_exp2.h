// Base-2 exponentials of the AMX engines, with polynomials of the lowest degree that is precise enough: for
// about 200 cycles after a tile instruction, the core executes one multiply-add per cycle instead of two.
#pragma once
#include "softmax.h"

namespace mls::cpu::MLS_VARIANT {

// Minimax polynomials of 2^r on [0, 1], highest power first. Exact at both ends, so that 2^x is continuous
// and the weight of a row's only key is 1.
//
// For weights that are rounded to bf16 and not summed: relative error 1.0e-4, against 2e-3 of the rounding.
constexpr float kWeightExp2[] = {7.8267969e-2f, 2.2630771e-1f, 6.9542432e-1f, 1.0f};
// For weights whose sum becomes lse: relative error 3.3e-6.
constexpr float kSummedExp2[] = {1.3557086e-2f, 5.2030448e-2f, 2.4138010e-1f, 6.9303238e-1f, 1.0f};

// 2^x; requires that denormals are flushed to zero, as AmxSession sets it.
template <int kTerms>
MLS_INLINE Vec flushing_exp2(Vec x, const float (&polynomial)[kTerms]) {
  return exp2_by(polynomial, x, 0xffff);
}

// A weight that is both summed and multiplied, in kParts bf16 parts.
template <int kParts>
MLS_INLINE Vec summed_exp2(Vec x) {
  if constexpr (kParts == 1) return flushing_exp2(x, kSummedExp2);
  return flushing_exp2(x, kExp2);
}
// A weight that is only multiplied.
template <int kParts>
MLS_INLINE Vec weight_exp2(Vec x) {
  if constexpr (kParts == 1) return flushing_exp2(x, kWeightExp2);
  return flushing_exp2(x, kExp2);
}

}  // namespace mls::cpu::MLS_VARIANT
