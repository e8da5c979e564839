// Which vectors of a row tile see which keys.
//
// At a causal diagonal, the edges of a window or a border between documents, some vectors of a tile see keys
// that others do not. The keys are cut into segments there, each computed only for the vectors that see it:
//
//     row vector   0 1 2 3
//     keys   0..   # # # #    segment 0, four vectors wide
//     keys  16..   . # # #    segment 1, three
//     keys  32..   . . # #    ...
//     keys  48..   . . . #
#pragma once
#include "row_tile.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// Keys [begin, end) and the vectors [first_vec, first_vec + num_vecs) that see them.
struct KeySegment {
  int64_t begin, end;
  int first_vec, num_vecs;

  int end_vec() const { return first_vec + num_vecs; }
  int first_row() const { return first_vec * kLanes; }
  int64_t num_keys() const { return end - begin; }
};

class KeySegments {
 public:
  // Segments of the tile's keys in [first, last), extended so that all begin and end at multiples of `unit`.
  KeySegments(const RowTile& tile, int64_t first, int64_t last, int64_t unit = 1) {
    int64_t cuts[kMaxSegments + 1];
    int num_cuts = 0;
    for (const VectorKeys& keys : tile.vectors) {
      cuts[num_cuts++] = std::clamp(keys.begin, first, last) / unit * unit;
      cuts[num_cuts++] = round_up(std::clamp(keys.end, first, last), unit);
    }
    std::sort(cuts, cuts + num_cuts);
    for (int i = 0; i + 1 < num_cuts; ++i) {
      if (cuts[i] < cuts[i + 1]) append(seen_by(tile, cuts[i], cuts[i + 1]));
    }
  }

  const KeySegment* begin() const { return segments_; }
  const KeySegment* end() const { return segments_ + size_; }

 private:
  static constexpr int kMaxSegments = 2 * kMicroVecs - 1;
  // An additional segment costs about as much as computing and masking this many vectors of scores.
  static constexpr int64_t kSegmentCost = 8;

  static KeySegment seen_by(const RowTile& tile, int64_t begin, int64_t end) {
    int first_vec = kMicroVecs, end_vec = 0;
    for (int x = 0; x < kMicroVecs; ++x) {
      if (tile.vectors[x].begin >= end || tile.vectors[x].end <= begin) continue;
      first_vec = std::min(first_vec, x);
      end_vec = x + 1;
    }
    return {begin, end, first_vec, std::max(0, end_vec - first_vec)};
  }

  void append(const KeySegment& next) {
    if (next.num_vecs == 0) return;
    if (size_ > 0 && segments_[size_ - 1].end == next.begin) {
      KeySegment& last = segments_[size_ - 1];
      const int first_vec = std::min(last.first_vec, next.first_vec);
      const int num_vecs = std::max(last.end_vec(), next.end_vec()) - first_vec;
      const int64_t waste =
          last.num_keys() * (num_vecs - last.num_vecs) + next.num_keys() * (num_vecs - next.num_vecs);
      if (waste <= kSegmentCost) {
        last = {last.begin, next.end, first_vec, num_vecs};
        return;
      }
    }
    segments_[size_++] = next;
  }

  KeySegment segments_[kMaxSegments];
  int size_ = 0;
};

// Whether some row of the segment does not see all of its keys, so that scores need masking.
inline bool needs_mask(const RowTile& tile, const KeySegment& keys) {
  return std::any_of(
      tile.vectors + keys.first_vec, tile.vectors + keys.end_vec(),
      [&](const VectorKeys& seen) { return keys.begin < seen.all_begin || keys.end > seen.all_end; });
}

// Calls f(segment) for parts of `whole` of at most kVectorPanelKeys keys. The parts are nearly equal, in
// whole micro tiles, so that there is no short remainder.
template <class F>
MLS_INLINE void for_panels(const KeySegment& whole, F f) {
  const int64_t panels = ceil_div(whole.num_keys(), kVectorPanelKeys);
  const int64_t step = round_up(ceil_div(whole.num_keys(), panels), kMicroRows);
  for (int64_t key = whole.begin; key < whole.end; key += step) {
    f(KeySegment{key, std::min(key + step, whole.end), whole.first_vec, whole.num_vecs});
  }
}

}  // namespace mls::cpu::MLS_VARIANT
