// bf16 operands of vector products: a word is a pair of values, the first in its lower half; one instruction
// adds the products of two pairs to an fp32 sum.
#pragma once
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

// Joins two half vectors, and takes them apart. The intrinsics for this trigger warnings in g++ 12.
MLS_INLINE __m512i join_halves(__m256i low, __m256i high) {
  return reinterpret_cast<__m512i>(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7));
}
MLS_INLINE __m256i lower_half(__m512i halves) {
  return reinterpret_cast<__m256i>(__builtin_shufflevector(halves, halves, 0, 1, 2, 3));
}
MLS_INLINE __m256i upper_half(__m512i halves) {
  return reinterpret_cast<__m256i>(__builtin_shufflevector(halves, halves, 4, 5, 6, 7));
}

MLS_INLINE __m256i load_half(const float* words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(words));
}
MLS_INLINE void store_half(float* words, __m256i half) {
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(words), half);
}

// The values of two vectors rounded to bf16 (ties to even): those of `low`, then those of `high`.
MLS_INLINE __m512i round_to_bf16(Vec low, Vec high) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

// word i = (value i of the lower half, value i of the upper half)
MLS_INLINE Vec pair_halves(__m512i halves) {
  typedef uint16_t Indices __attribute__((vector_size(64)));
  constexpr Indices kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Vec>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kOrder), halves));
}

struct PairWords {
  static constexpr int kValues = 2;

  static MLS_INLINE Vec broadcast(const float* word) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return reinterpret_cast<Vec>(splat_int(bits));
  }
  static MLS_INLINE Vec product(Vec a, Vec b) { return add_product(Vec{}, a, b); }
  static MLS_INLINE Vec add_product(Vec sum, Vec a, Vec b) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }

  static MLS_INLINE Vec join(const Vec (&values)[kValues]) {
    return pair_halves(round_to_bf16(values[0], values[1]));
  }

  // Turns rows of padded(words(dim)) words along dim into the operand of a product whose depth is rows:
  // joined[r / 2][d] = value d of rows r and r + 1. If the number of rows is odd, a row of zeros must follow.
  static constexpr int64_t joined_words(int64_t count, int64_t dim) {
    return words<PairWords>(count) * padded(dim);
  }
  static float* join_rows(float* rows, int64_t count, int64_t dim, float* joined) {
    const int64_t stride = padded(words<PairWords>(dim));
    for (int64_t pair = 0; pair < words<PairWords>(count); ++pair) {
      const float *const low = rows + 2 * pair * stride, *const high = low + stride;
      for (int64_t d = 0; d < dim; d += kLanes) {
        const __m512i halves = join_halves(load_half(low + d / kValues), load_half(high + d / kValues));
        store(joined + pair * padded(dim) + d, pair_halves(halves));
      }
    }
    return joined;
  }

  // Stores values of keys, with query rows in the lanes, as the operand of products whose depth is query
  // rows.
  template <int R, int V>
  static MLS_INLINE void store_row_words(const Accumulator<R, V>& values, float* words) {
    for_key_pairs(values, [&](int i, int x, __m512i halves) __attribute__((always_inline)) {
      float* const at = words + (i * kTileRows + x * kLanes) / kValues;
      store_half(at, lower_half(halves));
      store_half(at + kTileRows / kValues, upper_half(halves));
    });
  }
  // Stores the same values as the operand of products whose depth is keys.
  template <int R, int V>
  static MLS_INLINE void store_key_words(const Accumulator<R, V>& values, float* words) {
    for_key_pairs(values, [&](int i, int x, __m512i halves) __attribute__((always_inline)) {
      store(words + i / kValues * kTileRows + x * kLanes, pair_halves(halves));
    });
  }

 private:
  template <int R, int V, class F>
  static MLS_INLINE void for_key_pairs(const Accumulator<R, V>& values, F f) {
    static_assert(R % kValues == 0);
#pragma GCC unroll 16
    for (int i = 0; i < R; i += kValues) {
#pragma GCC unroll 8
      for (int x = 0; x < V; ++x) f(i, x, round_to_bf16(values.at[i][x], values.at[i + 1][x]));
    }
  }
};

// Loads bf16 elements without widening.
struct Bf16Pairs {
  using Words = PairWords;

  // Keys [first, first + count) of one key/value head, and a row of zeros if count is odd:
  // [round_up(count, 2)][padded(words(dim))]
  static void load_keys(const TokenTensor<const void>& tensor, KeyHead at, int64_t first, int64_t count,
                        int64_t dim, float* rows) {
    const auto keys = typed<BFloat16>(tensor);
    const int64_t stride = padded(words<Words>(dim));
    for (int64_t r = 0; r < count; ++r) copy_row(row_pointer(keys, 1, at, first + r), dim, rows + r * stride);
    if (count % Words::kValues != 0) std::memset(rows + count * stride, 0, stride * sizeof(float));
  }
  // Rows of a tile, then rows of zeros: [kTileRows][padded(words(dim))]
  static void load_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at, const RowTile& tile,
                        int64_t dim, float* rows) {
    const auto queries = typed<BFloat16>(tensor);
    const int64_t stride = padded(words<Words>(dim));
    for (int r = 0; r < tile.num_rows; ++r) {
      copy_row(row_pointer(queries, group, at, tile.first_row + r), dim, rows + r * stride);
    }
    std::memset(rows + tile.num_rows * stride, 0, (kTileRows - tile.num_rows) * stride * sizeof(float));
  }

 private:
  // words = src[0..dim), then zeros up to padded(words(dim))
  static MLS_INLINE void copy_row(const uint16_t* src, int64_t dim, float* words) {
    constexpr int64_t kVector = kLanes * Words::kValues;
    for (int64_t d = 0; d < dim; d += kVector) {
      const auto keep = static_cast<__mmask32>(~0u >> (kVector - std::min(dim - d, kVector)));
      _mm512_storeu_si512(words + d / Words::kValues, _mm512_maskz_loadu_epi16(keep, src + d));
    }
  }
};

}  // namespace mls::cpu::MLS_VARIANT
