// delta: the dot product of every row of out with the same row of dout. Both are read once, token by token.
#pragma once
#include "pack.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

// The sum of all lanes, in fp64: in rows that see few keys, delta cancels against dout V^T, and the rounding
// error of delta dominates what remains.
MLS_INLINE double lane_sum(Vec x) {
  typedef float Half __attribute__((vector_size(MLS_VEC_BYTES / 2), may_alias));
  typedef double Doubles __attribute__((vector_size(MLS_VEC_BYTES)));
  alignas(MLS_VEC_BYTES) float lanes[kLanes];
  store(lanes, x);
  const Half* const halves = reinterpret_cast<const Half*>(lanes);
  const Doubles pairs =
      __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
  double sum = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) sum += pairs[i];
  return sum;
}

// Several independent sums, to hide the latency of the additions.
template <class A, class B>
MLS_INLINE float row_dot(const typename A::Storage* a, const typename B::Storage* b, int64_t dim) {
  constexpr int kChains = 4;
  Vec sums[kChains]{};
  int64_t d = 0;
  for (; d + kChains * kLanes <= dim; d += kChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sums[i] += A::load(a + d + i * kLanes) * B::load(b + d + i * kLanes);
  }
  for (; d + kLanes <= dim; d += kLanes) sums[0] += A::load(a + d) * B::load(b + d);
  double rest = 0;
  for (; d < dim; ++d) rest += A::scalar(a[d]) * B::scalar(b[d]);
  return static_cast<float>(lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest);
}

template <class Out, class Dout>
void delta_of_rows(const DeltaParams& p, int64_t first, int64_t last) {
  const auto out = typed<Out>(p.out);
  const auto dout = typed<Dout>(p.dout);
  for (int64_t token = first; token < last; ++token) {
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const auto* a = out.data + token * out.token_stride + batch * out.batch_stride;
      const auto* b = dout.data + token * dout.token_stride + batch * dout.batch_stride;
      float* sum = p.delta.data + batch * p.delta.batch_stride + token * p.delta.query_stride;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        *sum = row_dot<Out, Dout>(a, b, p.value_dim);
        a += out.head_stride, b += dout.head_stride, sum += p.delta.head_stride;
      }
    }
  }
}

template <class Out>
void delta_of_out(const DeltaParams& p, int64_t first, int64_t last) {
  const bool half = p.dout_type == ElementType::kBFloat16;
  half ? delta_of_rows<Out, BFloat16>(p, first, last) : delta_of_rows<Out, Float32>(p, first, last);
}

// delta of tokens [first, last).
inline void attention_delta(const DeltaParams& p, int64_t first, int64_t last) {
  const bool half = p.out_type == ElementType::kBFloat16;
  half ? delta_of_out<BFloat16>(p, first, last) : delta_of_out<Float32>(p, first, last);
}

}  // namespace mls::cpu::MLS_VARIANT
