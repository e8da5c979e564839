// The inner loop of all seven matrix products: acc[R][V] += A(i, k) * B[k][V vectors]. A is read by scalar
// broadcasts, so it needs no packing and may be row-major or column-major.
//
// Operands are arrays of 32-bit words, typed float whatever they hold: one fp32 value (float_words.h), or two
// bf16 values that are adjacent along the depth of the product (bf16_pairs.h):
//
//   struct Words {
//     static constexpr int kValues;                  // per word
//     static Vec broadcast(const float* word);       // to all lanes
//     static Vec product(Vec a, Vec b);              // the products of a word's values, summed
//     static Vec add_product(Vec sum, Vec a, Vec b);
//   };
#pragma once
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// Number of words that hold `count` values.
template <class Words>
constexpr int64_t words(int64_t count) {
  return ceil_div(count, Words::kValues);
}

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

template <class Words, Order kOrder, int R, int V, class F>
MLS_INLINE void outer_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, F f) {
  Vec row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const Vec x = Words::broadcast(a + (kOrder == Order::kRowMajor ? i * lda + k : k * lda + i));
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) f(i, v, x, row[v]);
  }
}

// acc += A B; depth counts words.
template <class Words, Order kOrder, int R, int V>
MLS_INLINE void multiply_add(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                             Accumulator<R, V>& acc, int64_t first = 0) {
  for (int64_t k = first; k < depth; ++k) {
    outer_product<Words, kOrder, R, V>(a, lda, b, ldb, k,
                                       [&](int i, int v, Vec x, Vec y) __attribute__((always_inline)) {
                                         acc.at[i][v] = Words::add_product(acc.at[i][v], x, y);
                                       });
  }
}

// acc = A B; depth >= 1. The first product initialises the sums: zeroing them would cost as much as two more
// products.
template <class Words, Order kOrder, int R, int V>
MLS_INLINE void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                         Accumulator<R, V>& acc) {
  outer_product<Words, kOrder, R, V>(a, lda, b, ldb, 0,
                                     [&](int i, int v, Vec x, Vec y) __attribute__((always_inline)) {
                                       acc.at[i][v] = Words::product(x, y);
                                     });
  multiply_add<Words, kOrder>(a, lda, b, ldb, depth, acc, 1);
}

// Calls f.operator()<N>(arguments...) with N = count, a multiple of kStep of at most kMost. Does nothing for
// 0.
template <int kMost, int kStep = 1, class F, class... Arguments>
MLS_INLINE void with_count(int64_t count, F f, Arguments... arguments) {
  if constexpr (kMost > 0) {
    if (count == kMost) {
      f.template operator()<kMost>(arguments...);
    } else {
      with_count<kMost - kStep, kStep>(count, f, arguments...);
    }
  }
}

// Calls f.operator()<R>(first_row) over `count` rows, a multiple of kStep: full micro tiles, then one of
// exactly the remaining rows.
template <int kStep = 1, class F>
MLS_INLINE void for_row_groups(int64_t count, F f) {
  static_assert(kMicroRows % kStep == 0);
  int64_t row = 0;
  for (; row + kMicroRows <= count; row += kMicroRows) f.template operator()<kMicroRows>(row);
  with_count<kMicroRows - kStep, kStep>(count - row, f, row);
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
