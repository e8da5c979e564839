// Small dense matrices of fp32 in scratch memory: products, triangular solutions, transposes.
//
// Rows are padded with zeros to whole vectors. A matrix that is transposed has padded(rows) rows, of which
// those behind the last are zero.
#pragma once
#include "../float_words.h"
#include "../micro_kernel.h"
#include "../pack.h"
#include "../simd.h"
#include "../tiles.h"

namespace mls::cpu::MLS_VARIANT {

struct Matrix {
  float* data;
  int64_t stride;  // a whole number of vectors

  MLS_INLINE float* row(int64_t i) const { return data + i * stride; }
};

inline Matrix new_matrix(ScratchCursor& scratch, int64_t rows, int64_t columns) {
  return {scratch.objects<float>(padded(rows) * padded(columns)), padded(columns)};
}

inline void clear(Matrix m, int64_t first_row, int64_t last_row) {
  if (first_row < last_row)
    std::memset(m.row(first_row), 0, (last_row - first_row) * m.stride * sizeof(float));
}

// What is known to be zero, or is not wanted: entries above the diagonal.
enum class Triangle {
  kNone,
  kLeft,    // the left factor is lower triangular; its transpose, if it is read by columns
  kResult,  // only the lower triangle of the result is wanted
};

// C = kept * C + factor * A B
template <Order kOrder>
[[gnu::noinline]] void multiply_into(Matrix a, Matrix b, Matrix c, int64_t rows, int64_t depth, int64_t width,
                                     Triangle triangle, float kept, float factor) {
  constexpr bool kByRows = kOrder == Order::kRowMajor;
  const bool left = triangle == Triangle::kLeft;
  for_row_groups(rows, [&]<int R>(int64_t row) {
    const int64_t first = left && !kByRows ? row : 0;
    const int64_t last = left && kByRows ? std::min(depth, row + R) : depth;
    const int64_t columns = triangle == Triangle::kResult ? std::min(width, padded(row + R)) : width;
    const float* const from = kByRows ? a.row(row) + first : a.row(first) + row;
    for_column_groups(columns, [&]<int V>(int64_t column) {
      Accumulator<R, V> acc;
      multiply<FloatWords, kOrder>(from, a.stride, b.row(first) + column, b.stride, last - first, acc);
      acc.for_each([&](int i, int v, Vec& sum) __attribute__((always_inline)) {
        float* const to = c.row(row + i) + column + v * kLanes;
        const Vec product = sum * factor;
        store(to, kept == 0 ? product : load(to) * kept + product);
      });
    });
  });
}

// C = kept * C + factor * A B; A is rows x depth.
inline void product(Matrix a, Matrix b, Matrix c, int64_t rows, int64_t depth, int64_t width,
                    Triangle triangle = Triangle::kNone, float kept = 0, float factor = 1) {
  multiply_into<Order::kRowMajor>(a, b, c, rows, depth, padded(width), triangle, kept, factor);
}

// C = kept * C + factor * A^T B; A is depth x rows.
inline void transposed_product(Matrix a, Matrix b, Matrix c, int64_t rows, int64_t depth, int64_t width,
                               Triangle triangle = Triangle::kNone, float kept = 0, float factor = 1) {
  multiply_into<Order::kColumnMajor>(a, b, c, rows, depth, padded(width), triangle, kept, factor);
}

// X = (I + L)^-1 X for a strictly lower triangular L of which nothing else is read; with kTransposed
// (I + L^T)^-1 X.
template <bool kTransposed>
[[gnu::noinline]] void solve(Matrix lower, Matrix x, int64_t rows, int64_t width) {
  constexpr Order kOrder = kTransposed ? Order::kColumnMajor : Order::kRowMajor;
  const auto solve_rows = [&]<int R>(int64_t row) {
    const int64_t first = kTransposed ? row + R : 0, last = kTransposed ? rows : row;
    const float* const from = kTransposed ? lower.row(first) + row : lower.row(row);
    const auto factor = [&](int i, int j) {
      return splat(kTransposed ? lower.row(row + j)[row + i] : lower.row(row + i)[row + j]);
    };
    for_column_groups(padded(width), [&]<int V>(int64_t column) {
      Accumulator<R, V> acc;
      if (first < last) {
        multiply<FloatWords, kOrder>(from, lower.stride, x.row(first) + column, x.stride, last - first, acc);
      } else {
        acc.for_each([](int, int, Vec& sum) __attribute__((always_inline)) { sum = Vec{}; });
      }
      acc.for_each([&](int i, int v, Vec& sum) __attribute__((always_inline)) {
        sum = load(x.row(row + i) + column + v * kLanes) - sum;
      });
#pragma GCC unroll 16
      for (int step = 1; step < R; ++step) {
        const int i = kTransposed ? R - 1 - step : step;
#pragma GCC unroll 16
        for (int before = 0; before < step; ++before) {
          const int j = kTransposed ? R - 1 - before : before;
          const Vec y = factor(i, j);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc.at[i][v] -= y * acc.at[j][v];
        }
      }
      acc.for_each([&](int i, int v, Vec& sum)
                       __attribute__((always_inline)) { store(x.row(row + i) + column + v * kLanes, sum); });
    });
  };
  if constexpr (kTransposed) {
    int64_t row = rows / kMicroRows * kMicroRows;
    with_count<kMicroRows - 1>(rows - row, solve_rows, row);
    while ((row -= kMicroRows) >= 0) solve_rows.template operator()<kMicroRows>(row);
  } else {
    for_row_groups(rows, solve_rows);
  }
}

// to = from^T; `from` has rows x columns.
[[gnu::noinline]] inline void transpose_into(Matrix from, Matrix to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < padded(rows); r += kLanes) {
    for (int64_t c = 0; c < padded(columns); c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(from.row(r + i) + c);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to.row(c + i) + r, block[i]);
    }
  }
}

// f(row, column) for every vector of `rows` rows of `width` numbers.
template <class F>
MLS_INLINE void for_vectors(int64_t rows, int64_t width, F f) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < width; c += kLanes) f(i, c);
  }
}

template <int kDistance, int... kLane>
MLS_INLINE Vec rotate(Vec x, std::integer_sequence<int, kLane...>) {
  return shuffle(x, x, std::integer_sequence<int, (kLane + kDistance) % kLanes...>{});
}

// The sum of all lanes.
template <int kDistance = kLanes / 2>
MLS_INLINE float sum_lanes(Vec x) {
  if constexpr (kDistance == 0) {
    return x[0];
  } else {
    return sum_lanes<kDistance / 2>(x + rotate<kDistance>(x, std::make_integer_sequence<int, kLanes>{}));
  }
}

// The dot product of two rows of `width` numbers, padded.
MLS_INLINE float dot(const float* a, const float* b, int64_t width) {
  Vec sum{};
  for (int64_t c = 0; c < width; c += kLanes) sum += load(a + c) * load(b + c);
  return sum_lanes(sum);
}

// 0, 1, 2, ...
MLS_INLINE IntVec lane_numbers() {
  IntVec numbers{};
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

}  // namespace mls::cpu::MLS_VARIANT
