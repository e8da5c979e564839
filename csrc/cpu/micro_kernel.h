// The one inner loop of all seven matrix products: acc[R][V] += A(i, k) *
// B[k][V vectors]. A is read as scalar broadcasts, so it needs no packing and
// may be row-major or column-major.
#pragma once
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

enum class Order { kRowMajor, kColumnMajor };  // A(i, k) = a[i * lda + k] or a[k * lda + i]

template <int R, int V>
struct Accumulator {
  Vec at[R][V];

  MLS_INLINE void zero() {
    for_each([](int, int, Vec& x) __attribute__((always_inline)) { x = Vec{}; });
  }
  template <class F>
  MLS_INLINE void for_each(F f) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) f(i, v, at[i][v]);
    }
  }
};

template <Order kOrder, int R, int V>
MLS_INLINE void multiply_add(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                             Accumulator<R, V>& acc) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec x = splat(kOrder == Order::kRowMajor ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc.at[i][v] += x * row[v];
    }
  }
}

template <int R, class F>
MLS_INLINE void row_remainder(int remaining, int64_t row, F f) {
  if constexpr (R > 0) {
    if (remaining == R) {
      f.template operator()<R>(row);
    } else {
      row_remainder<R - 1>(remaining, row, f);
    }
  }
}

// Calls f.operator()<R>(first_row) over `count` rows: full micro tiles, then
// one of the rest's exact size.
template <class F>
MLS_INLINE void for_row_groups(int64_t count, F f) {
  int64_t row = 0;
  for (; row + kMicroRows <= count; row += kMicroRows) f.template operator()<kMicroRows>(row);
  row_remainder<kMicroRows - 1>(static_cast<int>(count - row), row, f);
}

// Calls f.operator()<V>(first_column) over `width` columns (whole vectors), at
// most kMicroVecs at a time.
template <class F>
MLS_INLINE void for_column_groups(int64_t width, F f) {
  int64_t column = 0;
  for (; column + kMicroVecs * kLanes <= width; column += kMicroVecs * kLanes) {
    f.template operator()<kMicroVecs>(column);
  }
  row_remainder<kMicroVecs - 1>(static_cast<int>((width - column) / kLanes), column, f);
}

}  // namespace mls::cpu::MLS_VARIANT
