// A row tile: kTileRows (query, head) pairs that share one key/value head, and the keys each may see.
//
// All heads of a group are adjacent lanes (row = query * heads_per_group + head). So a key panel serves the
// whole group, few queries still fill the lanes, and a causal tile spans few queries, so that less of it is
// masked. Bands, key ranges and ragged ends all become one interval [begin, end) of keys per lane.
#pragma once
#include "simd.h"
#include "softmax.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

// The keys that the rows of one vector see.
struct VectorKeys {
  int64_t begin, end;          // keys outside are seen by no row; empty if begin >= end
  int64_t all_begin, all_end;  // every row sees all of these
};

struct RowTile {
  int64_t first_row;
  int num_rows;
  int64_t key_begin, key_end;      // keys outside are seen by no row; empty if begin >= end
  int64_t all_begin, all_end;      // every row sees all of these keys
  VectorKeys vectors[kMicroVecs];  // the same for each vector of rows
  alignas(MLS_VEC_BYTES) int32_t begin[kTileRows];
  alignas(MLS_VEC_BYTES) int32_t end[kTileRows];

  bool sees_any() const { return key_begin < key_end; }
  // Whether some row does not see all of the keys [first, last), so that scores need masking.
  bool needs_mask(int64_t first, int64_t last) const { return first < all_begin || last > all_end; }
};

struct KeyHead {
  int64_t batch;
  int64_t kv_head;
};

MLS_INLINE int64_t rows_per_kv_head(const AttentionShape& shape) {
  return shape.num_queries * shape.heads_per_group();
}

inline int64_t row_tiles(const AttentionShape& shape) {
  return ceil_div(rows_per_kv_head(shape), kTileRows);
}

// Whether documents or a window let only few row tiles see each panel of keys, so that sharing it gains
// little.
inline bool is_narrow(const AttentionShape& shape, const KeyMask& mask) {
  const int64_t band = mask.band_hi - mask.band_lo + 1;
  return mask.range_begin != nullptr || band < std::min(shape.num_keys, kNarrowKeys);
}

// Row tiles per forward task. The result of a row tile does not depend on the other tiles of its task, so
// this may depend on the number of workers.
inline int64_t block_tiles(const AttentionShape& shape, const KeyMask& mask, int64_t workers,
                           int64_t most_tiles) {
  const int64_t most =
      std::max<int64_t>(kMinBlockTiles, is_narrow(shape, mask) ? most_tiles / 2 : most_tiles);
  const int64_t wanted_tasks = workers == 1 ? 1 : workers * kTasksPerWorker;
  const int64_t all_tiles = shape.batch * shape.num_kv_heads * row_tiles(shape);
  const int64_t wanted = std::clamp<int64_t>(all_tiles / wanted_tasks, kMinBlockTiles, most);
  return std::clamp<int64_t>(row_tiles(shape), 1, wanted);
}

template <typename T>
MLS_INLINE T* row_pointer(const TokenTensor<T>& tensor, int64_t group, KeyHead at, int64_t row) {
  return tensor.data + row / group * tensor.token_stride + at.batch * tensor.batch_stride +
         (at.kv_head * group + row % group) * tensor.head_stride;
}

template <typename T>
MLS_INLINE T& row_value(const RowTensor<T>& tensor, int64_t group, KeyHead at, int64_t row) {
  return tensor
      .data[at.batch * tensor.batch_stride + (at.kv_head * group + row % group) * tensor.head_stride +
            row / group * tensor.query_stride];
}

inline void fill_vector(const AttentionShape& shape, const KeyMask& mask, int first_lane, RowTile& tile) {
  const int64_t group = shape.heads_per_group();
  VectorKeys& keys = tile.vectors[first_lane / kLanes];
  keys = {shape.num_keys, 0, 0, shape.num_keys};
  int64_t query = (tile.first_row + first_lane) / group, head = (tile.first_row + first_lane) % group;
  for (int lane = first_lane; lane < first_lane + kLanes; ++lane) {
    // Lanes past the end are never read back, so they need no masking.
    KeyRange seen{0, shape.num_keys};
    if (lane < tile.num_rows) {
      seen = visible_keys(shape, mask, query);
      if (seen.begin < seen.end) {
        keys.begin = std::min(keys.begin, seen.begin);
        keys.end = std::max(keys.end, seen.end);
      }
      keys.all_begin = std::max(keys.all_begin, seen.begin);
      keys.all_end = std::min(keys.all_end, seen.end);
    }
    tile.begin[lane] = static_cast<int32_t>(seen.begin);
    tile.end[lane] = static_cast<int32_t>(seen.end);
    if (++head == group) head = 0, ++query;
  }
}

inline void fill_row_tile(const AttentionShape& shape, const KeyMask& mask, int64_t first_row,
                          RowTile& tile) {
  tile.first_row = first_row;
  tile.num_rows = static_cast<int>(std::min<int64_t>(kTileRows, rows_per_kv_head(shape) - first_row));
  tile.key_begin = shape.num_keys, tile.key_end = 0;
  tile.all_begin = 0, tile.all_end = shape.num_keys;
  for (int x = 0; x < kMicroVecs; ++x) {
    fill_vector(shape, mask, x * kLanes, tile);
    const VectorKeys& keys = tile.vectors[x];
    tile.key_begin = std::min(tile.key_begin, keys.begin);
    tile.key_end = std::max(tile.key_end, keys.end);
    tile.all_begin = std::max(tile.all_begin, keys.all_begin);
    tile.all_end = std::min(tile.all_end, keys.all_end);
  }
}

// The lanes of a vector of rows that may see `key`.
MLS_INLINE IntVec sees(const RowTile& tile, int64_t key, int vec) {
  const IntVec k = splat_int(static_cast<int32_t>(key));
  const IntVec begin = load_int(tile.begin + vec * kLanes), end = load_int(tile.end + vec * kLanes);
  return (k >= begin) & (k < end);
}

// Scores of `key` (one row of S^T), with -inf in the lanes that may not see it.
MLS_INLINE Vec mask_scores(const RowTile& tile, int64_t key, int vec, Vec scores) {
  return select(sees(tile, key, vec), scores, splat(-kInfinity));
}

}  // namespace mls::cpu::MLS_VARIANT
