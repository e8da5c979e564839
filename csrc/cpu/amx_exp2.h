// Base-2 exponentials of the AMX engines, by polynomials no longer than their
// use needs: for some 200 cycles after a tile instruction one multiply-add a
// cycle is left, not two.
#pragma once
#include "softmax.h"

namespace mls::cpu::MLS_VARIANT {

// Minimax polynomials of 2^r on [0, 1], exact at both ends, so that the weight
// of a row's only key is 1 and 2^x is continuous; the highest power first.
//
// A weight that is rounded to bf16 and not summed: relative error 1.0e-4, where
// the rounding has 2e-3.
constexpr float kWeightExp2[] = {7.8267969e-2f, 2.2630771e-1f, 6.9542432e-1f, 1.0f};
// A weight whose sum goes into lse: relative error 3.3e-6.
constexpr float kSummedExp2[] = {1.3557086e-2f, 5.2030448e-2f, 2.4138010e-1f, 6.9303238e-1f, 1.0f};

// 2^x; needs the flushing of denormals that AmxSession switches on.
template <int kTerms>
MLS_INLINE Vec flushing_exp2(Vec x, const float (&polynomial)[kTerms]) {
  return exp2_by(polynomial, x, 0xffff);
}

// A weight that is summed and multiplied in kParts bf16 parts.
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
