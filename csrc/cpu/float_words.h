// fp32 operands of vector products, for any element type: a word is one value.
#pragma once
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

struct FloatWords {
  static constexpr int kValues = 1;

  static MLS_INLINE Vec broadcast(const float* word) { return splat(*word); }
  static MLS_INLINE Vec product(Vec a, Vec b) { return a * b; }
  static MLS_INLINE Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }

  static MLS_INLINE Vec join(const Vec (&values)[kValues]) { return values[0]; }

  // The rows are already the operand of a product whose depth is rows.
  static constexpr int64_t joined_words(int64_t, int64_t) { return 0; }
  static float* join_rows(float* rows, int64_t, int64_t, float*) { return rows; }

  // Stores values of keys, with query rows in the lanes, as the operand of products whose depth is query
  // rows.
  template <int R, int V>
  static MLS_INLINE void store_row_words(const Accumulator<R, V>& values, float* words) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int x = 0; x < V; ++x) store(words + i * kTileRows + x * kLanes, values.at[i][x]);
    }
  }
  // The operand of products whose depth is keys is the same, so there is nothing to store.
  template <int R, int V>
  static MLS_INLINE void store_key_words(const Accumulator<R, V>&, float*) {}
};

// Loads elements widened to fp32.
template <class Element>
struct Widened {
  using Words = FloatWords;

  // Keys [first, first + count) of one key/value head: [count][padded(dim)]
  static void load_keys(const TokenTensor<const void>& tensor, KeyHead at, int64_t first, int64_t count,
                        int64_t dim, float* rows) {
    load_key_panel<Element>(tensor, at, first, count, dim, rows);
  }
  // Rows of a tile, then rows of zeros: [kTileRows][padded(dim)]
  static void load_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at, const RowTile& tile,
                        int64_t dim, float* rows) {
    load_tile_rows<Element>(tensor, group, at, tile, dim, rows);
  }
};

}  // namespace mls::cpu::MLS_VARIANT
