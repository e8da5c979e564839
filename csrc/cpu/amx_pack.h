// Packs operands of AMX products: a bf16 value is one bf16 part, an fp32 value three. A word is a pair of
// bf16 values, the first in its lower half.
#pragma once
#include "amx_tile.h"
#include "bf16_pairs.h"
#include "isolation.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

constexpr int64_t amx_width(int64_t dim) {
  return round_up(dim, kAmxBlock);
}

// The layout of lane_tiles(data, width).
constexpr LaneLayout amx_lanes(int64_t width) {
  return {kLanes, width * kLanes};
}

MLS_INLINE void store_words(uint32_t* p, Vec x) {
  store(reinterpret_cast<float*>(p), x);
}

template <class Element>
constexpr int kAmxParts = 0;
template <>
constexpr int kAmxParts<BFloat16> = 1;
template <>
constexpr int kAmxParts<Float32> = 3;

// An operand in memory, part after part.
template <typename T>
struct AmxParts {
  T* data;
  int64_t size;  // elements per part

  MLS_INLINE T* operator[](int part) const { return data + part * size; }
  MLS_INLINE AmxParts<T> from(int64_t offset) const { return {data + offset, size}; }
};

template <int kParts, typename T>
AmxParts<T> allocate_parts(ScratchCursor& scratch, int64_t size) {
  return {scratch.objects<T>(kParts * size), size};
}

template <typename T>
MLS_INLINE AmxTiles<const T> packed_operand(AmxParts<T> operand, int64_t columns) {
  return packed_tiles<const T>(operand.data, columns, operand.size);
}

// Rounds to bf16, ties away from zero, by an integer addition; the upper half of the result is the bf16
// value. vcvtne2ps2bf16 takes two cycles and does not leave its values in the pairs that products need.
MLS_INLINE Vec round_to_bf16(Vec x) {
  constexpr int32_t kHalfOfBf16Ulp = 0x8000;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) + kHalfOfBf16Ulp);
}

// The bf16 parts of a vector of values: the upper half of `of[i]` is part i.
template <int kParts>
struct Bf16Parts {
  Vec of[kParts];
};

template <int kParts>
MLS_INLINE Bf16Parts<kParts> split(Vec x);

template <>
MLS_INLINE Bf16Parts<1> split(Vec x) {
  return {{round_to_bf16(x)}};
}
// Truncates instead of rounding: the remainders are then exact, the third part holds all of the last one, and
// the largest finite values stay finite.
template <>
MLS_INLINE Bf16Parts<3> split(Vec x) {
  constexpr int32_t kUpperHalf = static_cast<int32_t>(0xffff0000);
  const auto below = [](Vec value) __attribute__((always_inline)) {
    return value - reinterpret_cast<Vec>(reinterpret_cast<IntVec>(value) & kUpperHalf);
  };
  const Vec rest = below(x);
  return {{x, rest, below(rest)}};
}

// Each lane becomes the upper halves of (low, high): bytes 2 and 3 of `low` move below those of `high`.
MLS_INLINE Vec pair_words(Vec low, Vec high) {
  constexpr __mmask64 kLowerHalves = 0x3333333333333333;
  const __m512i bytes = _mm512_set4_epi32(0x00000f0e, 0x00000b0a, 0x00000706, 0x00000302);
  return reinterpret_cast<Vec>(_mm512_mask_shuffle_epi8(reinterpret_cast<__m512i>(high), kLowerHalves,
                                                        reinterpret_cast<__m512i>(low), bytes));
}

// The upper halves of all lanes of `first`, then those of `second`.
MLS_INLINE Vec upper_halves(Vec first, Vec second) {
  alignas(MLS_VEC_BYTES) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return reinterpret_cast<Vec>(_mm512_permutex2var_epi16(
      reinterpret_cast<__m512i>(first), _mm512_load_si512(kOdd), reinterpret_cast<__m512i>(second)));
}

template <int kParts>
MLS_INLINE void store_pairs(AmxParts<uint32_t> words, const Bf16Parts<kParts>& low,
                            const Bf16Parts<kParts>& high) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) store_words(words[i], pair_words(low.of[i], high.of[i]));
}

// words[i] = (low[i], high[i]) for 16 values
MLS_INLINE Vec interleave(const uint16_t* low, const uint16_t* high) {
  const WordVec lower = widen(load_half_words(low));
  const WordVec upper = widen(load_half_words(high));
  return reinterpret_cast<Vec>(lower | (upper << 16));
}

// Rows of bf16 values, in a tensor or in one part of a copy.
struct AmxRows {
  const uint16_t* data;
  int64_t stride;

  MLS_INLINE const uint16_t* operator[](int64_t row) const { return data + row * stride; }
  MLS_INLINE AmxRows from(int64_t row) const { return {data + row * stride, stride}; }
};
struct AmxPartRows {
  AmxParts<const uint16_t> parts;
  int64_t stride;

  MLS_INLINE AmxRows operator[](int part) const { return {parts[part], stride}; }
};

// dst = src, then zeros up to amx_width(dim). Not by memcpy: with inline loads, cache misses of several rows
// overlap.
MLS_INLINE void split_row(const uint16_t* src, int64_t dim, AmxParts<uint16_t> dst) {
  int64_t d = 0;
  for (; d + kAmxBlock <= dim; d += kAmxBlock) _mm512_storeu_si512(dst.data + d, _mm512_loadu_si512(src + d));
  if (d < dim) {
    const auto tail = static_cast<__mmask32>((1u << (dim - d)) - 1);
    _mm512_storeu_si512(dst.data + d, _mm512_maskz_loadu_epi16(tail, src + d));
  }
}
// The same for fp32, split into parts.
MLS_INLINE void split_row(const float* src, int64_t dim, AmxParts<uint16_t> dst) {
  const auto load_some = [&](int64_t d) __attribute__((always_inline)) {
    const int64_t left = std::clamp<int64_t>(dim - d, 0, kLanes);
    const auto present = static_cast<__mmask16>((1u << left) - 1);
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(present, src + d));
  };
  for (int64_t d = 0; d < amx_width(dim); d += kAmxBlock) {
    const auto first = split<kAmxParts<Float32>>(load_some(d));
    const auto second = split<kAmxParts<Float32>>(load_some(d + kLanes));
#pragma GCC unroll 3
    for (int i = 0; i < kAmxParts<Float32>; ++i)
      store_words(reinterpret_cast<uint32_t*>(dst[i] + d), upper_halves(first.of[i], second.of[i]));
  }
}

// Prefetches to the L2 cache. Rows of one head are far apart in memory, so hardware prefetchers do not fetch
// them.
MLS_INLINE void prefetch_row(const void* row, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  for (int64_t i = 0; i < bytes; i += kCacheLine) {
    _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T1);
  }
}

template <class Element>
inline void clear_rows(AmxParts<uint16_t> rows, int64_t first, int64_t last, int64_t width) {
  for (int i = 0; i < kAmxParts<Element>; ++i)
    std::memset(rows[i] + first * width, 0, (last - first) * width * sizeof(uint16_t));
}

// Prefetches keys [first, last).
template <class Element>
inline void prefetch_key_rows(const TokenTensor<const void>& tensor, KeyHead at, int64_t first, int64_t last,
                              int64_t dim) {
  for (int64_t key = first; key < last; ++key)
    prefetch_row(row_pointer(typed<Element>(tensor), 1, at, key), dim * sizeof(typename Element::Storage));
}

// Rows [first, first + count), then rows of zeros up to `capacity`, with amx_width(dim) values each. Refers
// to the tensor itself where it holds exactly that (bf16 only), otherwise to a copy in parts.
template <class Element>
MLS_INLINE AmxPartRows padded_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at,
                                   int64_t first, int64_t count, int64_t capacity, int64_t dim,
                                   AmxParts<uint16_t> copy) {
  const auto rows = typed<Element>(tensor);
  const int64_t width = amx_width(dim);
  if constexpr (kAmxParts<Element> == 1) {
    if (group == 1 && count == capacity && dim == width)
      return {{row_pointer(rows, 1, at, first), 0}, tensor.token_stride};
  }
  for (int64_t r = 0; r < count; ++r)
    split_row(row_pointer(rows, group, at, first + r), dim, copy.from(r * width));
  clear_rows<Element>(copy, count, capacity, width);
  return {{copy.data, copy.size}, width};
}

// A block of keys. Rows past the last key are zeros: they are multiplied by weights of zero, and zero times
// stale memory could be NaN.
template <class Element>
MLS_INLINE AmxPartRows key_rows(const TokenTensor<const void>& tensor, KeyHead at, int64_t first,
                                int64_t count, int64_t dim, AmxParts<uint16_t> copy) {
  return padded_rows<Element>(tensor, 1, at, first, count, kAmxBlock, dim, copy);
}
template <class Element>
MLS_INLINE AmxPartRows tile_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at,
                                 const RowTile& tile, int64_t dim, AmxParts<uint16_t> copy) {
  return padded_rows<Element>(tensor, group, at, tile.first_row, tile.num_rows, kTileRows, dim, copy);
}

// Whether there are extreme values in rows of bf16 values, or of the first parts of fp32 values. num_rows is
// a multiple of four.
inline bool any_extreme(AmxRows rows, int64_t num_rows, int64_t width) {
  constexpr int kChains = SquareSum<PairWords>::kChains;
  SquareSum<PairWords> squares;
  for (int64_t r = 0; r < num_rows; r += kChains) {
    for (int64_t d = 0; d < width; d += kAmxBlock) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) squares.add(i, load(reinterpret_cast<const float*>(rows[r + i] + d)));
    }
  }
  return squares.any_extreme();
}

// If the rows have extreme values, sets `is_extreme` and returns a copy with zeros instead of non-finite
// values.
template <int kParts>
inline AmxPartRows finite_rows(AmxPartRows rows, int64_t num_rows, int64_t width, AmxParts<uint16_t> copy,
                               bool& is_extreme) {
  if (!any_extreme(rows[0], num_rows, width)) return rows;
  is_extreme = true;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t d = 0; d < width; d += kAmxBlock) {
      const auto load = [&](int part) __attribute__((always_inline)) {
        return reinterpret_cast<WordVec>(_mm512_loadu_si512(rows[part][r] + d));
      };
      const WordVec kept = ~non_finite_bits<2>(load(0));
      for (int part = 0; part < kParts; ++part)
        _mm512_storeu_si512(copy[part] + r * width + d, reinterpret_cast<__m512i>(load(part) & kept));
    }
  }
  return {{copy.data, copy.size}, width};
}

// kAmxBlock rows, tile by tile: a tile is 16 rows of 32 values
inline void rows_to_tiles(AmxRows rows, int64_t width, uint16_t* tiles) {
  for (int64_t r = 0; r < kAmxBlock; r += kAmxTile) {
    for (int64_t d = 0; d < width; d += kAmxDepth) {
#pragma GCC unroll 16
      for (int i = 0; i < kAmxTile; ++i, tiles += kAmxDepth)
        _mm512_storeu_si512(tiles, _mm512_loadu_si512(rows[r + i] + d));
    }
  }
}

// words[d / 2][row] = values (d, d + 1) of the row, tile by tile: a B operand whose columns are query rows. A
// tile holds 32 values of 16 rows.
inline void rows_to_word_tiles(AmxRows rows, int64_t num_rows, int64_t width, uint32_t* tiles) {
  for (int64_t d = 0; d < width; d += kAmxDepth) {
    for (int64_t r = 0; r < num_rows; r += kAmxTile, tiles += kAmxTileWords) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = reinterpret_cast<Vec>(_mm512_loadu_si512(rows[r + i] + d));
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_words(tiles + i * kAmxRow, block[i]);
    }
  }
}

// words[r][d] = values d of rows (r, r + num_rows / 2), tile by tile: a B operand whose depth is query rows,
// in the order in which pair_words() pairs vectors of the lower and upper half of the rows.
inline void rows_to_pair_tiles(AmxRows rows, int64_t num_rows, int64_t width, uint32_t* tiles) {
  for (int64_t block = 0; block < num_rows / 2; block += kAmxTile) {
    for (int64_t d = 0; d < width; d += kAmxTile) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < kAmxTile; ++r, tiles += kAmxRow) {
        store_words(tiles, interleave(rows[block + r] + d, rows[block + r + num_rows / 2] + d));
      }
    }
  }
}

// columns[d][key] = rows[key][d] for kAmxBlock keys, tile by tile: an A operand whose depth is keys. A tile
// holds 16 values of 32 keys.
inline void keys_to_column_tiles(AmxRows rows, int64_t width, uint16_t* tiles) {
  for (int64_t d = 0; d < width; d += kAmxTile, tiles += kAmxTile * kAmxBlock) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = interleave(rows[2 * i] + d, rows[2 * i + 1] + d);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_words(reinterpret_cast<uint32_t*>(tiles) + i * kAmxRow, block[i]);
  }
}

}  // namespace mls::cpu::MLS_VARIANT
