// Which keys of a tile a query sees. They always form one interval, so all kinds of masks cost the same.
#pragma once
#include "attention_params.h"
#include "cuda/primitives/sm80.h"

namespace mls::cuda {

MLS_DEVICE int smaller(int a, int b) {
  return a < b ? a : b;
}

MLS_DEVICE int larger(int a, int b) {
  return a > b ? a : b;
}

// Keys [first, end); {0, 0} if there are none.
struct KeyInterval {
  int first, end;

  MLS_DEVICE bool contains(int key) const {
    return static_cast<unsigned>(key - first) < static_cast<unsigned>(end - first);
  }
};

// KeyMask in 32-bit integers. check_shape refuses tiles for which they could overflow.
struct Visibility {
  int num_queries, num_keys, band_lo, band_hi;
  const int32_t* range_begin;
  const int32_t* range_end;

  MLS_DEVICE Visibility(const AttentionShape& shape, const KeyMask& mask)
      : num_queries(static_cast<int>(shape.num_queries)),
        num_keys(static_cast<int>(shape.num_keys)),
        band_lo(static_cast<int>(mask.band_lo)),
        band_hi(static_cast<int>(mask.band_hi)),
        range_begin(mask.range_begin),
        range_end(mask.range_end) {}

  MLS_DEVICE KeyInterval keys_of(int query) const {
    if (query >= num_queries) return {0, 0};
    int first = larger(query + band_lo, 0), end = smaller(query + band_hi + 1, num_keys);
    if (range_begin != nullptr) {
      first = larger(first, range_begin[query]);
      end = smaller(end, range_end[query]);
    }
    return first < end ? KeyInterval{first, end} : KeyInterval{0, 0};
  }
};

// Bounds for a range of queries: [any_first, any_end) contains every key that at least one of them sees (and
// perhaps others); [all_first, all_end) contains only keys that all of them see.
struct KeyBounds {
  int any_first, any_end, all_first, all_end;

  MLS_DEVICE bool misses(int first_key, int end_key) const {
    return any_end <= first_key || any_first >= end_key;
  }
  MLS_DEVICE bool covers(int first_key, int end_key) const {
    return all_first <= first_key && end_key <= all_end;
  }
};

constexpr int kNoKey = 0x7fffffff;

MLS_DEVICE KeyBounds reduce_over_warp(KeyBounds bounds) {
  MLS_UNROLL
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
    bounds.any_first = smaller(bounds.any_first, shuffle_xor(bounds.any_first, lane_mask));
    bounds.any_end = larger(bounds.any_end, shuffle_xor(bounds.any_end, lane_mask));
    bounds.all_first = larger(bounds.all_first, shuffle_xor(bounds.all_first, lane_mask));
    bounds.all_end = smaller(bounds.all_end, shuffle_xor(bounds.all_end, lane_mask));
  }
  return bounds;
}

// Called by whole warps. All lanes and all warps get the same result.
template <int kRows>
MLS_DEVICE KeyBounds bounds_of_queries(const Visibility& visibility, int first_row) {
  const int last_row = smaller(first_row + kRows, visibility.num_queries) - 1;
  if (visibility.range_begin == nullptr) {  // a band shifts right by one key per row
    return {larger(first_row + visibility.band_lo, 0),
            smaller(last_row + visibility.band_hi + 1, visibility.num_keys),
            larger(last_row + visibility.band_lo, 0),
            smaller(first_row + visibility.band_hi + 1, visibility.num_keys)};
  }
  KeyBounds bounds{kNoKey, 0, 0, kNoKey};
  for (int row = first_row + lane_id(); row <= last_row; row += kWarpSize) {
    const KeyInterval keys = visibility.keys_of(row);
    const bool empty = keys.end == 0;
    bounds.any_first = smaller(bounds.any_first, empty ? kNoKey : keys.first);
    bounds.any_end = larger(bounds.any_end, keys.end);
    bounds.all_first = larger(bounds.all_first, empty ? kNoKey : keys.first);
    bounds.all_end = smaller(bounds.all_end, keys.end);
  }
  return reduce_over_warp(bounds);
}

// Queries [first, end) include every query that sees a key in [first_key, end_key), and perhaps others.
struct QueryInterval {
  int first, end;
};

MLS_DEVICE QueryInterval queries_of_keys(const Visibility& visibility, int first_key, int end_key) {
  QueryInterval rows{larger(first_key - visibility.band_hi, 0),
                     smaller(end_key - visibility.band_lo, visibility.num_queries)};
  if (visibility.range_begin == nullptr) return rows;
  QueryInterval seen{kNoKey, 0};
  for (int row = rows.first + lane_id(); row < rows.end; row += kWarpSize) {
    const KeyInterval keys = visibility.keys_of(row);
    if (keys.end <= first_key || keys.first >= end_key) continue;
    seen.first = smaller(seen.first, row);
    seen.end = row + 1;
  }
  MLS_UNROLL
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
    seen.first = smaller(seen.first, shuffle_xor(seen.first, lane_mask));
    seen.end = larger(seen.end, shuffle_xor(seen.end, lane_mask));
  }
  return seen;
}

}  // namespace mls::cuda
