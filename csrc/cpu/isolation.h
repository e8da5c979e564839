// Isolation of rows and keys that the mask separates, such as those of different documents.
//
// A (row, key) pair that the mask excludes has weight zero, but zero times infinity or NaN is NaN. Without
// isolation, the products of a tile would spread non-finite values of one document to rows and keys of
// another. Where extreme values occur, two rules prevent this:
//
// - P and dS are set to zero where masked after they are computed, because a masked dP may not be finite, and
//   a masked score of -inf minus an lse of NaN is NaN.
// - The other operand of their products (V, dO, K or Q) has zeros in place of its non-finite values. These
//   are added afterwards, without weights, to the rows and keys that do see them: their sum is not finite
//   either way.
//
// Values are extreme if they are not finite or so large that products of V and dO might overflow. Checking
// for them when operands are loaded takes little time; the rest costs nothing unless there are any.
#pragma once
#include "micro_kernel.h"
#include "pack.h"
#include "row_tile.h"
#include "simd.h"

namespace mls::cpu::MLS_VARIANT {

// Bits of the values in a 32-bit word: one fp32 value, or two bf16 values.
template <int kValues>
constexpr uint32_t kSignBits = kValues == 1 ? 0x80000000u : 0x80008000u;
template <int kValues>
constexpr uint32_t kExponentBits = kValues == 1 ? 0x7f800000u : 0x7f807f80u;

// Has all bits set in each value that is not finite (whose exponent is all ones), and no others.
template <int kValues>
MLS_INLINE WordVec non_finite_bits(WordVec words) {
  constexpr uint32_t kLowestBits = kExponentBits<kValues> & ~(kExponentBits<kValues> << 1);
  const WordVec exponents = words & kExponentBits<kValues>;
  const WordVec signs = (exponents + kLowestBits) & kSignBits<kValues>;  // carries, if all bits are ones
  return signs | (signs - (signs >> (32 / kValues - 1)));
}

MLS_INLINE WordVec load_words(const float* words) {
  return reinterpret_cast<WordVec>(load(words));
}

// Sums squares of values to find out whether any of them is extreme: one multiply-add per vector. Starts from
// 1, so that the sum is never denormal, which some processors handle slowly.
template <class Words>
class SquareSum {
 public:
  // Several independent sums, to hide the latency of the additions.
  static constexpr int kChains = 4;

  MLS_INLINE SquareSum() {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sums_[i] = splat(1.0f);
  }
  MLS_INLINE void add(int chain, Vec words) { sums_[chain] = Words::add_product(sums_[chain], words, words); }
  MLS_INLINE bool any_extreme() const {
    constexpr float kExtremeSquare = 0x1p112f;
    const Vec sum = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
    const IntVec ordinary = sum < splat(kExtremeSquare);  // false for NaN
    int32_t all = -1;
    for (int i = 0; i < kLanes; ++i) all &= ordinary[i];
    return all == 0;
  }

 private:
  Vec sums_[kChains];
};

// Whether any of the values of `count` words is extreme; `count` is rounded up to whole vectors.
template <class Words>
inline bool any_extreme(const float* words, int64_t count) {
  constexpr int kChains = SquareSum<Words>::kChains;
  SquareSum<Words> squares;
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) squares.add(chain, load(words + i + chain * kLanes));
  }
  for (; i < count; i += kLanes) squares.add(0, load(words + i));
  return squares.any_extreme();
}

// Replaces non-finite values by zeros; `count` as above.
template <class Words>
inline void clear_non_finite(float* words, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const WordVec value = load_words(words + i);
    store(words + i, reinterpret_cast<Vec>(value & ~non_finite_bits<Words::kValues>(value)));
  }
}

// Does so only if there are extreme values; returns whether there are any.
template <class Words>
inline bool clear_if_extreme(float* words, int64_t count) {
  const bool extreme = any_extreme<Words>(words, count);
  if (extreme) clear_non_finite<Words>(words, count);
  return extreme;
}

// The values of a row from src on, with zeros instead of finite values and past the end.
template <class Element>
MLS_INLINE Vec load_non_finite(const typename Element::Storage* src, int64_t count) {
  typename Element::Storage some[kLanes] = {};
  if (count < kLanes) std::copy_n(src, count, some);
  const WordVec values = reinterpret_cast<WordVec>(Element::load(count < kLanes ? some : src));
  return reinterpret_cast<Vec>(values & non_finite_bits<1>(values));
}

// Whether load_non_finite() has found any.
MLS_INLINE bool any_non_finite(Vec values) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= reinterpret_cast<WordVec>(values)[i];
  return all != 0;
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
      if (!any_non_finite(added)) continue;
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
      if (!any_non_finite(added)) continue;
      for (int64_t key = first; key < last; ++key) add(key, d, added);
    }
  }
}

}  // namespace mls::cpu::MLS_VARIANT
