// Which keys a query sees.
#pragma once
#include <algorithm>
#include <cstdint>

#include "attention_params.h"

namespace mls::cpu {

// Keys [begin, end); none: 0, 0.
struct KeyRange {
  int64_t begin, end;
};

inline KeyRange visible_keys(const AttentionShape& shape, const KeyMask& mask, int64_t query) {
  int64_t begin = std::max<int64_t>(0, query + mask.band_lo);
  int64_t end = std::min<int64_t>(shape.num_keys, query + mask.band_hi + 1);
  if (mask.range_begin != nullptr) {
    begin = std::max<int64_t>(begin, mask.range_begin[query]);
    end = std::min<int64_t>(end, mask.range_end[query]);
  }
  return begin < end ? KeyRange{begin, end} : KeyRange{0, 0};
}

// Number of (query, key) pairs of one head that the mask allows.
inline int64_t visible_pairs(const AttentionShape& shape, const KeyMask& mask) {
  int64_t pairs = 0;
  for (int64_t query = 0; query < shape.num_queries; ++query) {
    const KeyRange keys = visible_keys(shape, mask, query);
    pairs += keys.end - keys.begin;
  }
  return pairs;
}

}  // namespace mls::cpu
