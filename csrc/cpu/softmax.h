// Base-2 exponential and online softmax in log2 units, as in FlashAttention:
// p = 2^(score * scale * log2(e) - max).
#pragma once
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for x up to about 0; exactly 0 below -126 (and at -inf); NaN stays NaN. The fractional part is a
// minimax polynomial of degree 5, relative error 9e-8.
#if MLS_VEC_BYTES == 64
// AVX-512 has instructions for r = x - floor(x) and for p * 2^floor(x): 5 cycles per vector instead of 6.5.
//
// `polynomial` approximates 2^r on [0, 1], highest power first; lanes outside `keep` get 0.
template <int kTerms>
MLS_INLINE Vec exp2_by(const float (&polynomial)[kTerms], Vec x, __mmask16 keep) {
  constexpr int kFloor = 0x09;  // no fraction bits, round towards -inf, no exception flags
  const auto wide = reinterpret_cast<__m512>(x);
  const Vec r = reinterpret_cast<Vec>(_mm512_reduce_ps(wide, kFloor));
  Vec p = splat(polynomial[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kTerms; ++i) p = p * r + polynomial[i];
  // The unmasked intrinsic triggers a warning in g++ 12.
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(keep, reinterpret_cast<__m512>(p), wide));
}

constexpr float kExp2[] = {1.8671302134215275e-3f, 9.017030018570639e-3f, 5.5799913320829474e-2f,
                           2.4016445009565887e-1f, 6.93151311809468e-1f,  1.0f};

MLS_INLINE Vec exp2(Vec x) {
  const auto wide = reinterpret_cast<__m512>(x);
  return exp2_by(kExp2, x, _mm512_cmp_ps_mask(wide, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ));
}
#else
// Adding 1.5 * 2^23 rounds x to the nearest integer n and leaves n in the low mantissa bits, so x = n + r
// with r in [-1/2, 1/2]. n is then added to the exponent of 2^r.
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
#endif

// ln x for x > 0 that is not denormal; NaN and infinity are returned as they are. The polynomial of Cephes'
// logf, error below 1e-7.
MLS_INLINE Vec log(Vec x) {
  constexpr float kTerms[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                              -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                              2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec exponent = (bits - kSqrtHalf) >> 23;  // x = 2^exponent (1 + r), 1 + r in [sqrt(1/2), sqrt(2))
  const Vec r = reinterpret_cast<Vec>(bits - (exponent << 23)) - 1.0f;
  const Vec n = __builtin_convertvector(exponent, Vec);
  Vec p = splat(kTerms[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) p = p * r + kTerms[i];
  // ln 2 is split in two parts, the first of which times n is exact.
  const Vec ln = n * 0.693359375f + (r + (p * r * r * r - 0.5f * r * r + n * -2.12194440e-4f));
  return select(x < splat(kInfinity), ln, x);
}

// tanh x: a polynomial near 0 (Cephes' tanhf), by the exponential elsewhere; relative error below 2e-7. NaN
// stays NaN.
MLS_INLINE Vec tanh(Vec x) {
  const Vec size = max(x, -x), square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near_zero = p * square * x + x;
  const Vec falling = exp2(size * (-2 * kLog2E));
  const Vec far = (1.0f - falling) / (1.0f + falling);
  const Vec result = select(size < splat(0.625f), near_zero, select(x < Vec{}, -far, far));
  return select(x == x, result, x);
}

// Bounds scores by c * tanh(score / c), before they are scaled: score = raw * softmax_scale.
struct Softcap {
  float inner;  // softmax_scale / c; 0: no softcap
  float outer;  // c / softmax_scale

  Softcap(float softmax_scale, float softcap)
      : inner(softcap == 0 ? 0 : softmax_scale / softcap),
        outer(softcap == 0 ? 0 : softcap / softmax_scale) {}

  MLS_INLINE bool is_on() const { return inner != 0; }
  // tanh(score / c), whose square is 1 less the derivative of the bounded score.
  MLS_INLINE Vec tanh_of(Vec raw) const { return tanh(raw * inner); }
};

// The running maximum, but 0 where it is -inf (rows without keys): -inf - -inf would be NaN.
MLS_INLINE Vec finite_max(Vec max_log2) {
  return select(max_log2 == splat(-kInfinity), Vec{}, max_log2);
}

// State of the online softmax of one row tile.
struct SoftmaxState {
  alignas(MLS_VEC_BYTES) float max_log2[kTileRows];  // running maximum of score * scale * log2(e)
  alignas(MLS_VEC_BYTES) float sum[kTileRows];       // running sum of 2^(score - maximum)

  void clear() {
    std::fill_n(max_log2, kTileRows, -kInfinity);
    std::fill_n(sum, kTileRows, 0.0f);
  }
};

// One step of the online softmax for V vectors of rows: takes the maximum of the new scores, and rescales
// older sums to the new running maximum.
template <int V>
struct SoftmaxStep {
  Vec scale;       // softmax_scale * log2(e)
  Vec offset[V];   // the new maximum, 0 instead of -inf
  Vec rescale[V];  // factor for everything summed so far
  Vec sum[V];

  MLS_INLINE SoftmaxStep(SoftmaxState& state, const Vec (&top)[V], float log2_scale, int first_row = 0)
      : scale(splat(log2_scale)) {
#pragma GCC unroll 8
    for (int x = 0; x < V; ++x) {
      float* const running = state.max_log2 + first_row + x * kLanes;
      const Vec old = load(running);
      const Vec updated = max(top[x] * scale, old);
      store(running, updated);
      offset[x] = finite_max(updated);
      rescale[x] = exp2(old - offset[x]);
      sum[x] = load(state.sum + first_row + x * kLanes) * rescale[x];
    }
  }
  MLS_INLINE Vec weight(int x, Vec score) {
    const Vec p = exp2(score * scale - offset[x]);
    sum[x] += p;
    return p;
  }
  MLS_INLINE void finish(SoftmaxState& state, int first_row = 0) const {
#pragma GCC unroll 8
    for (int x = 0; x < V; ++x) store(state.sum + first_row + x * kLanes, sum[x]);
  }
};

}  // namespace mls::cpu::MLS_VARIANT
