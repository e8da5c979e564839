// Scores that a softcap c bounds (Gemma 2): c * tanh(score / c), where score = raw * softmax_scale.
//
// Kernels with a softcap are separate instances, so the others contain no trace of it.
#pragma once
#include "cuda/primitives/sm80.h"

namespace mls::cuda {

// tanh x: a polynomial near 0 (Cephes' tanhf), where the exponential form cancels; relative error below 1e-6.
// tanh.approx of the hardware has 2^-11, too much for a score of which 2^score is taken. NaN stays NaN.
MLS_DEVICE float tanh_accurate(float x) {
  const float size = fabsf(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near_zero = p * square * x + x;
  const float falling = exp2_approx(size * (-2.0f * kLog2e));
  const float far = divide_approx(1.0f - falling, 1.0f + falling);
  return size < 0.625f ? near_zero : copysignf(far, x);
}

// From raw scores to exponents of 2. With a softcap, the kernels hold tanh(score / c) in place of raw scores.
template <bool kCaps>
struct ScoreMap {
  float inner;       // softmax_scale / c; unused without a softcap
  float scale_log2;  // factor from what the kernels hold to exponents of 2

  template <class Params>
  MLS_DEVICE explicit ScoreMap(const Params& params)
      : inner(kCaps ? divide_approx(params.softmax_scale, params.softcap) : 0.0f),
        scale_log2((kCaps ? params.softcap : params.softmax_scale) * kLog2e) {}

  // To be called before masking: -inf would become a finite score.
  template <int kTiles>
  MLS_DEVICE void apply(float (&scores)[kTiles][4]) const {
    if constexpr (kCaps) {
      MLS_UNROLL
      for (int i = 0; i < 4 * kTiles; ++i) scores[i / 4][i % 4] = tanh_accurate(scores[i / 4][i % 4] * inner);
    }
  }

  // The derivative of a bounded score, from its tanh. 0 for masked scores, whose "tanh" is -inf.
  MLS_DEVICE static float slope(float tanh) { return fmaxf(1.0f - tanh * tanh, 0.0f); }

  // The same from the score's probability, for kernels that keep nothing else. 0 where the probability is 0.
  MLS_DEVICE float slope_of_probability(float probability, float lse_log2) const {
    return slope(divide_approx(log2_approx(probability) + lse_log2, scale_log2));
  }
};

// Traits of the kernel with a softcap, from those of the kernel without. Those define kCaps = false.
template <class Traits>
struct WithSoftcap : Traits {
  static constexpr bool kCaps = true;
};

template <class Traits, bool kCaps>
struct SoftcapChoice {
  using Type = Traits;
};
template <class Traits>
struct SoftcapChoice<Traits, true> {
  using Type = WithSoftcap<Traits>;
};
template <class Traits, bool kCaps>
using MaybeSoftcap = typename SoftcapChoice<Traits, kCaps>::Type;

}  // namespace mls::cuda
