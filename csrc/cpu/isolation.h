// Isolation of rows and keys that the mask separates, such as those of different documents.
//
// A (row, key) pair that the mask excludes has weight zero, but zero times a value that is not finite is NaN.
// So the products of a tile would spread NaN and infinity from one document to the rows and keys of another.
// Two rules prevent this:
//
// * P and dS are set to zero where masked after they are computed: a masked score alone does not give zero if
// its
//   row's lse is NaN, and a masked dP may not be finite.
// * The other operand of their products (V, dO, K or Q) has zeros instead of its non-finite values. The rows
// and keys
//   that do see these values get them added afterwards, without weights: the sum is not finite either way.
#pragma once
#include "pack.h"
#include "row_tile.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

// Bits of the values in a 32-bit word: one fp32 value, or two bf16 values.
template <int kValues>
constexpr uint32_t kSignBits = kValues == 1 ? 0x80000000u : 0x80008000u;
template <int kValues>
constexpr uint32_t kExponentBits = kValues == 1 ? 0x7f800000u : 0x7f807f80u;

// Has the sign bit of each value that is not finite, whose exponent is all ones. Other bits are arbitrary.
template <int kValues>
MLS_INLINE WordVec mark_non_finite(WordVec words) {
  constexpr uint32_t kLowestBits = kExponentBits<kValues> & ~(kExponentBits<kValues> << 1);
  const WordVec exponents = words & kExponentBits<kValues>;
  return exponents + kLowestBits;
}

// Has all bits of each value that is not finite, and no others.
template <int kValues>
MLS_INLINE WordVec non_finite_bits(WordVec words) {
  const WordVec signs = mark_non_finite<kValues>(words) & kSignBits<kValues>;
  return signs | (signs - (signs >> (32 / kValues - 1)));
}

MLS_INLINE WordVec load_words(const float* words) {
  return reinterpret_cast<WordVec>(load(words));
}

// Whether any of the marked words has a value that is not finite.
template <int kValues>
inline bool any_non_finite(WordVec marks) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= marks[i];
  return (all & kSignBits<kValues>) != 0;
}

// Whether all values of `count` words are finite; `count` is rounded up to whole vectors.
template <class Words>
inline bool all_finite(const float* words, int64_t count) {
  WordVec marks{};
  for (int64_t i = 0; i < count; i += kLanes) marks |= mark_non_finite<Words::kValues>(load_words(words + i));
  return !any_non_finite<Words::kValues>(marks);
}

// Replaces non-finite values by zeros, and returns whether there were none; `count` as above.
template <class Words>
inline bool clear_non_finite(float* words, int64_t count) {
  if (all_finite<Words>(words, count)) return true;
  for (int64_t i = 0; i < count; i += kLanes) {
    const WordVec value = load_words(words + i);
    store(words + i, reinterpret_cast<Vec>(value & ~non_finite_bits<Words::kValues>(value)));
  }
  return false;
}

// The values of a row from src on, with zeros instead of finite values and past the end.
template <class Element>
MLS_INLINE Vec load_non_finite(const typename Element::Storage* src, int64_t count) {
  typename Element::Storage some[kLanes] = {};
  if (count < kLanes) std::copy_n(src, count, some);
  const WordVec values = reinterpret_cast<WordVec>(Element::load(count < kLanes ? some : src));
  return reinterpret_cast<Vec>(values & non_finite_bits<1>(values));
}

MLS_INLINE bool has_non_finite(Vec values) {
  return any_non_finite<1>(mark_non_finite<1>(reinterpret_cast<WordVec>(values)));
}

// lanes[d][row] += value d of each key in [begin, end) that the row sees, where that value is not finite.
template <class Element>
inline void add_non_finite_keys(const TokenTensor<const void>& tensor, KeyHead at, int64_t begin, int64_t end,
                                int64_t dim, const RowTile& tile, float* lanes, LaneLayout layout) {
  const auto keys = typed<Element>(tensor);
  for (int64_t key = std::max(begin, tile.key_begin); key < std::min(end, tile.key_end); ++key) {
    const auto* const values = row_pointer(keys, 1, at, key);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec added = load_non_finite<Element>(values + d, dim - d);
      if (!has_non_finite(added)) continue;
      for (int i = 0; i < std::min<int64_t>(kLanes, dim - d); ++i) {
        for (int x = 0; x < kMicroVecs; ++x) {
          float* const sum = lanes + layout.at(d + i, x * kLanes);
          store(sum, load(sum) + select(sees(tile, key, x), splat(added[i]), Vec{}));
        }
      }
    }
  }
}

// Calls add(key, d, values) with the non-finite values of the tile's rows from dimension d on, for each key
// in [begin, end) that the row sees.
template <class Element, class Add>
inline void add_non_finite_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at,
                                int64_t begin, int64_t end, int64_t dim, const RowTile& tile, Add add) {
  const auto rows = typed<Element>(tensor);
  for (int row = 0; row < tile.num_rows; ++row) {
    const auto* const values = row_pointer(rows, group, at, tile.first_row + row);
    const int64_t first = std::max<int64_t>(begin, tile.begin[row]),
                  last = std::min<int64_t>(end, tile.end[row]);
    for (int64_t d = 0; first < last && d < dim; d += kLanes) {
      const Vec added = load_non_finite<Element>(values + d, dim - d);
      if (!has_non_finite(added)) continue;
      for (int64_t key = first; key < last; ++key) add(key, d, added);
    }
  }
}

}  // namespace mls::cpu::MLS_VARIANT
