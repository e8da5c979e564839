// The one inner loop of all seven matrix products: acc[R][V] += A(i, k) * B[k][V vectors]. A is read as
// scalar broadcasts, so it needs no packing and may be row-major or column-major.
#pragma once
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

enum class Order { kRowMajor, kColumnMajor };  // A(i, k) = a[i * lda + k] or a[k * lda + i]

template <int R, int V>
struct Accumulator {
  Vec at[R][V];

  template <class F>
  MLS_INLINE void for_each(F f) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) f(i, v, at[i][v]);
    }
  }
};

template <Order kOrder, int R, int V, class F>
MLS_INLINE void outer_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, F f) {
  Vec row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const Vec x = splat(kOrder == Order::kRowMajor ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) f(i, v, x * row[v]);
  }
}

// acc += A B
template <Order kOrder, int R, int V>
MLS_INLINE void multiply_add(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                             Accumulator<R, V>& acc, int64_t first = 0) {
  for (int64_t k = first; k < depth; ++k) {
    outer_product<kOrder, R, V>(a, lda, b, ldb, k,
                                [&](int i, int v, Vec product)
                                    __attribute__((always_inline)) { acc.at[i][v] += product; });
  }
}

// acc = A B; depth >= 1. The first product starts the sums: zeroing them would cost as much as two more.
template <Order kOrder, int R, int V>
MLS_INLINE void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                         Accumulator<R, V>& acc) {
  outer_product<kOrder, R, V>(a, lda, b, ldb, 0,
                              [&](int i, int v, Vec product)
                                  __attribute__((always_inline)) { acc.at[i][v] = product; });
  multiply_add<kOrder>(a, lda, b, ldb, depth, acc, 1);
}

// Calls f.operator()<N>(arguments...) with N = count, which is at most kMost; not at all for 0.
template <int kMost, class F, class... Arguments>
MLS_INLINE void with_count(int64_t count, F f, Arguments... arguments) {
  if constexpr (kMost > 0) {
    if (count == kMost) {
      f.template operator()<kMost>(arguments...);
    } else {
      with_count<kMost - 1>(count, f, arguments...);
    }
  }
}

// Calls f.operator()<R>(first_row) over `count` rows: full micro tiles, then one of the rest's exact size.
template <class F>
MLS_INLINE void for_row_groups(int64_t count, F f) {
  int64_t row = 0;
  for (; row + kMicroRows <= count; row += kMicroRows) f.template operator()<kMicroRows>(row);
  with_count<kMicroRows - 1>(count - row, f, row);
}

// Calls f.operator()<V>(first_column) over `width` columns (whole vectors), at most kMicroVecs at a time.
template <class F>
MLS_INLINE void for_column_groups(int64_t width, F f) {
  int64_t column = 0;
  for (; column + kMicroVecs * kLanes <= width; column += kMicroVecs * kLanes) {
    f.template operator()<kMicroVecs>(column);
  }
  with_count<kMicroVecs - 1>((width - column) / kLanes, f, column);
}

}  // namespace mls::cpu::MLS_VARIANT
