// bf16 operands of AMX products. A word is a pair of bf16 values, the first in
// its lower half.
#pragma once
#include "amx_tile.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

constexpr int64_t amx_width(int64_t dim) {
  return round_up(dim, kAmxBlock);
}

MLS_INLINE Vec load_words(const uint32_t* p) {
  return load(reinterpret_cast<const float*>(p));
}
MLS_INLINE void store_words(uint32_t* p, Vec x) {
  store(reinterpret_cast<float*>(p), x);
}

// Rounding to bf16 is an integer addition, ties away from zero: the upper half
// of the sum is the bf16. vcvtne2ps2bf16 takes two cycles and leaves its values
// side by side, where products want them in pairs.
MLS_INLINE Vec round_to_bf16(Vec x) {
  constexpr int32_t kHalfOfBf16Ulp = 0x8000;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) + kHalfOfBf16Ulp);
}

// lane = (low, high), both rounded: bytes 2 and 3 of `low` move below those of
// `high`.
MLS_INLINE Vec pair_words(Vec low, Vec high) {
  constexpr __mmask64 kLowerHalves = 0x3333333333333333;
  const __m512i bytes = _mm512_set4_epi32(0x00000f0e, 0x00000b0a, 0x00000706, 0x00000302);
  return reinterpret_cast<Vec>(_mm512_mask_shuffle_epi8(reinterpret_cast<__m512i>(high), kLowerHalves,
                                                        reinterpret_cast<__m512i>(low), bytes));
}

// words[i] = (low[i], high[i]) for 16 values
MLS_INLINE Vec interleave(const uint16_t* low, const uint16_t* high) {
  const WordVec lower = __builtin_convertvector(load_half_words(low), WordVec);
  const WordVec upper = __builtin_convertvector(load_half_words(high), WordVec);
  return reinterpret_cast<Vec>(lower | (upper << 16));
}

// dst[c][r] = src[r][c] for words; both extents multiples of 16
inline void transpose_words(const uint32_t* src, int64_t src_stride, int64_t rows, int64_t columns,
                            uint32_t* dst, int64_t dst_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load_words(src + (r + i) * src_stride + c);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_words(dst + (c + i) * dst_stride + r, block[i]);
    }
  }
}

// dst = src and zeros up to amx_width(dim). Not memcpy: inline loads of several
// rows wait for memory together.
MLS_INLINE void copy_row(const uint16_t* src, int64_t dim, uint16_t* dst) {
  int64_t d = 0;
  for (; d + kAmxBlock <= dim; d += kAmxBlock) _mm512_storeu_si512(dst + d, _mm512_loadu_si512(src + d));
  if (d < dim) {
    const auto tail = static_cast<__mmask32>((1u << (dim - d)) - 1);
    _mm512_storeu_si512(dst + d, _mm512_maskz_loadu_epi16(tail, src + d));
  }
}

// To the L2 cache. Rows of one head lie far apart: no processor fetches them by
// itself.
MLS_INLINE void prefetch_row(const void* row, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  for (int64_t i = 0; i < bytes; i += kCacheLine) {
    _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T1);
  }
}

// The next block of keys to be copied, if there are more.
inline void prefetch_key_rows(const TokenTensor<const void>& tensor, KeyHead at, int64_t first,
                              int64_t num_keys, int64_t dim) {
  const auto* base = static_cast<const uint16_t*>(tensor.data) + at.batch * tensor.batch_stride +
                     at.kv_head * tensor.head_stride;
  const int64_t last = std::min(first + kAmxBlock, num_keys);
  for (int64_t key = first; key < last; ++key)
    prefetch_row(base + key * tensor.token_stride, dim * int64_t{sizeof(uint16_t)});
}

// Keys [first, first + count) as rows of amx_width(dim), and zero rows up to
// the next whole block: what is read there meets weights of zero, and zero
// times stale memory could be NaN.
inline void copy_key_rows(const TokenTensor<const void>& tensor, KeyHead at, int64_t first, int64_t count,
                          int64_t dim, uint16_t* rows) {
  const auto* base = static_cast<const uint16_t*>(tensor.data) + at.batch * tensor.batch_stride +
                     at.kv_head * tensor.head_stride;
  const int64_t width = amx_width(dim);
  for (int64_t r = 0; r < count; ++r)
    copy_row(base + (first + r) * tensor.token_stride, dim, rows + r * width);
  std::memset(rows + count * width, 0, (round_up(count, kAmxBlock) - count) * width * sizeof(uint16_t));
}

inline void copy_tile_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at,
                           const RowTile& tile, int64_t dim, uint16_t* rows) {
  const TokenTensor<const uint16_t> typed{static_cast<const uint16_t*>(tensor.data), tensor.token_stride,
                                          tensor.batch_stride, tensor.head_stride};
  const int64_t width = amx_width(dim);
  for (int r = 0; r < tile.num_rows; ++r) {
    copy_row(row_pointer(typed, group, at, tile.first_row + r), dim, rows + r * width);
  }
  std::memset(rows + tile.num_rows * width, 0, (kTileRows - tile.num_rows) * width * sizeof(uint16_t));
}

// kAmxBlock rows, tile by tile: a tile is 16 rows of 32 values
inline void rows_to_tiles(const uint16_t* rows, int64_t width, uint16_t* tiles) {
  for (int64_t r = 0; r < kAmxBlock; r += kAmxTile) {
    for (int64_t d = 0; d < width; d += kAmxDepth) {
#pragma GCC unroll 16
      for (int i = 0; i < kAmxTile; ++i, tiles += kAmxDepth) {
        _mm512_storeu_si512(tiles, _mm512_loadu_si512(rows + (r + i) * width + d));
      }
    }
  }
}

// words[d / 2][row] = (row's values d, d + 1), tile by tile: a B operand whose
// columns are query rows. A tile is 32 values of 16 rows.
inline void rows_to_word_tiles(const uint16_t* rows, int64_t num_rows, int64_t width, uint32_t* tiles) {
  const auto* words = reinterpret_cast<const uint32_t*>(rows);
  for (int64_t d = 0; d < width / 2; d += kAmxTile) {
    for (int64_t r = 0; r < num_rows; r += kAmxTile, tiles += kAmxTileWords) {
      transpose_words(words + r * width / 2 + d, width / 2, kAmxTile, kAmxTile, tiles, kAmxRow);
    }
  }
}

// words[r][d] = values d of rows r and r + 16 of each 32 rows, tile by tile: a B
// operand whose depth is query rows, in the order in which pair_words leaves
// neighbouring vectors of them.
inline void rows_to_pair_tiles(const uint16_t* rows, int64_t num_rows, int64_t width, uint32_t* tiles) {
  for (int64_t block = 0; block < num_rows; block += kAmxBlock) {
    for (int64_t d = 0; d < width; d += kAmxTile) {
      const uint16_t* const first = rows + block * width + d;
#pragma GCC unroll 4
      for (int64_t r = 0; r < kAmxTile; ++r, tiles += kAmxRow) {
        store_words(tiles, interleave(first + r * width, first + (r + kAmxTile) * width));
      }
    }
  }
}

// columns[d][key] = rows[key][d] for kAmxBlock keys, tile by tile: an A operand
// whose depth is keys. A tile is 32 keys of 16 values.
inline void keys_to_column_tiles(const uint16_t* rows, int64_t width, uint16_t* tiles) {
  for (int64_t d = 0; d < width; d += kAmxTile, tiles += kAmxTile * kAmxBlock) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      block[i] = interleave(rows + 2 * i * width + d, rows + (2 * i + 1) * width + d);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_words(reinterpret_cast<uint32_t*>(tiles) + i * kAmxRow, block[i]);
  }
}

}  // namespace mls::cpu::MLS_VARIANT
