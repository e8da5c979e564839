// Copies between tensors in memory and the fp32 panels that the micro-kernel reads.
#pragma once
#include "row_tile.h"
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

template <typename T>
MLS_INLINE void prefetch_for_write(T* row, int64_t dim) {
  constexpr int64_t kCacheLine = 64;
  for (int64_t d = 0; d < dim; d += kCacheLine / sizeof(T)) __builtin_prefetch(row + d, 1);
}

// The tensor with its element type.
template <class Element>
MLS_INLINE TokenTensor<const typename Element::Storage> typed(const TokenTensor<const void>& tensor) {
  return {static_cast<const typename Element::Storage*>(tensor.data), tensor.token_stride,
          tensor.batch_stride, tensor.head_stride};
}

// dst[0..padded(dim)) = src[0..dim) widened to fp32, then zeros.
template <class Element>
MLS_INLINE void load_row(const typename Element::Storage* src, int64_t dim, float* dst) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(dst + d, Element::load(src + d));
  if (d < dim) {
    store(dst + d, Vec{});
    for (; d < dim; ++d) dst[d] = Element::scalar(src[d]);
  }
}

// dst[0..count) = the first `count` values, rounded.
template <class Element>
MLS_INLINE void store_some(typename Element::Storage* dst, Vec values, int64_t count) {
  if (count >= kLanes) return Element::store(dst, values);
  typename Element::Storage all[kLanes];
  Element::store(all, values);
  std::copy_n(all, count, dst);
}

// Keys [first, first + count) of one kv head as rows of a panel; stride padded(dim).
template <class Element>
inline void load_key_panel(const TokenTensor<const void>& tensor, KeyHead at, int64_t first, int64_t count,
                           int64_t dim, float* panel) {
  const auto keys = typed<Element>(tensor);
  for (int64_t r = 0; r < count; ++r) {
    load_row<Element>(row_pointer(keys, 1, at, first + r), dim, panel + r * padded(dim));
  }
}

// A panel as the column-major operand of a product: value (key, d) is data[key * key_stride + d * dim_stride]
// for d a multiple of kMicroRows, and the values after it follow.
struct PanelColumns {
  const float* data;
  int64_t key_stride, dim_stride;

  PanelColumns from_key(int64_t key) const { return {data + key * key_stride, key_stride, dim_stride}; }
  const float* at_dim(int64_t d) const { return data + d * dim_stride; }
};

// The panel itself, without a copy.
inline PanelColumns columns_in_place(const float* panel, int64_t dim) {
  return {panel, padded(dim), 1};
}

// A copy of the panel in the order in which the micro-kernel reads it, without gaps; `copy` has room for
// `capacity` keys. In place, a column maps to few sets of the L1 cache and uses little of each cache line.
// The copy pays off if several row tiles share the panel.
inline PanelColumns copy_columns(const float* panel, int64_t count, int64_t dim, int64_t capacity,
                                 float* copy) {
  for (int64_t r = 0; r < count; ++r) {
    const float* const row = panel + r * padded(dim);
    float* to = copy + r * kMicroRows;
    int64_t d = 0;
    for (; d + kMicroRows <= dim; d += kMicroRows, to += capacity * kMicroRows) {
      std::memcpy(to, row + d, kMicroRows * sizeof(float));
    }
    std::copy_n(row + d, dim - d, to);
  }
  return {copy, kMicroRows, capacity};
}

// Rows of a tile, zeros for lanes past its end; stride padded(dim).
template <class Element>
inline void load_tile_rows(const TokenTensor<const void>& tensor, int64_t group, KeyHead at,
                           const RowTile& tile, int64_t dim, float* rows) {
  const auto queries = typed<Element>(tensor);
  for (int r = 0; r < tile.num_rows; ++r) {
    load_row<Element>(row_pointer(queries, group, at, tile.first_row + r), dim, rows + r * padded(dim));
  }
  std::memset(rows + tile.num_rows * padded(dim), 0,
              (kTileRows - tile.num_rows) * padded(dim) * sizeof(float));
}

// Memory layout of a row tile in the SIMD lanes: vector x of dimension d is at d * dim_stride + x *
// vec_stride.
struct LaneLayout {
  int64_t dim_stride, vec_stride;

  MLS_INLINE int64_t at(int64_t dim, int64_t row) const {
    return dim * dim_stride + row / kLanes * vec_stride;
  }
};
constexpr LaneLayout kRowsOfLanes{kTileRows, kLanes};  // [dim][kTileRows]

// lanes[d][row] = rows[row][d]
inline void rows_to_lanes(const float* rows, int64_t dim, float* lanes, LaneLayout layout = kRowsOfLanes) {
  for (int row = 0; row < kTileRows; row += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(rows + (row + i) * padded(dim) + d);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(lanes + layout.at(d + i, row), block[i]);
    }
  }
}

// block[i][j] = lanes[d + j][row + i] * scale[i]: a transposed kLanes x kLanes block.
MLS_INLINE void load_block(const float* lanes, LaneLayout layout, int64_t d, int64_t row, Vec scale,
                           Vec (&block)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) block[i] = load(lanes + layout.at(d + i, row)) * scale;
  transpose(block);
}

// rows[row][d] = lanes[d][row] * factor[row]
inline void lanes_to_rows(const float* lanes, LaneLayout layout, int64_t dim, const float* factor,
                          float* rows) {
  for (int row = 0; row < kTileRows; row += kLanes) {
    const Vec scale = load(factor + row);
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec block[kLanes];
      load_block(lanes, layout, d, row, scale, block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(rows + (row + i) * padded(dim) + d, block[i]);
    }
  }
}

// rows[i][d + j] = block[i][j], rounded, for the first num_rows rows and dimensions below `dim`.
template <class Element>
MLS_INLINE void store_block(const Vec (&block)[kLanes], typename Element::Storage* const (&rows)[kLanes],
                            int num_rows, int64_t d, int64_t dim) {
  if (num_rows == kLanes && d + kLanes <= dim) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) Element::store(rows[i] + d, block[i]);
  } else {
    // A copy, because indexing `block` with a variable would move it out of registers in both branches.
    alignas(MLS_VEC_BYTES) float copy[kLanes][kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(copy[i], block[i]);
    for (int i = 0; i < num_rows; ++i) store_some<Element>(rows[i] + d, load(copy[i]), dim - d);
  }
}

// tensor[row][d] = lanes[d][row] * factor[row], rounded, for the rows of a tile. Stored straight from
// registers: an intermediate copy of the rows would not fit into the L1 cache. Rows to be written are
// prefetched a few at a time, because a burst of prefetches would stall all other loads.
template <class Element>
inline void store_tile_rows(const TokenTensor<typename Element::Storage>& tensor, int64_t group, KeyHead at,
                            const RowTile& tile, const float* lanes, LaneLayout layout, int64_t dim,
                            const float* factor) {
  const auto row_of = [&](int row) { return row_pointer(tensor, group, at, tile.first_row + row); };
  const auto prefetch_rows = [&](int from, int to) {
    for (int row = from; row < std::min(to, tile.num_rows); ++row) prefetch_for_write(row_of(row), dim);
  };
  const int rows_per_block = static_cast<int>(ceil_div(kLanes, ceil_div(dim, kLanes)));
  prefetch_rows(0, kLanes);
  for (int first = 0, next = kLanes; first < tile.num_rows; first += kLanes) {
    typename Element::Storage* rows[kLanes];
    const int num_rows = std::min(kLanes, tile.num_rows - first);
    for (int i = 0; i < num_rows; ++i) rows[i] = row_of(first + i);
    const Vec scale = load(factor + first);
    for (int64_t d = 0; d < dim; d += kLanes, next += rows_per_block) {
      prefetch_rows(next, next + rows_per_block);
      Vec block[kLanes];
      load_block(lanes, layout, d, first, scale, block);
      store_block<Element>(block, rows, num_rows, d, dim);
    }
  }
}

// dst[0..dim) += src[0..dim) * factor
MLS_INLINE void add_row(const float* src, int64_t dim, float factor, float* dst) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(dst + d, load(dst + d) + load(src + d) * factor);
  for (; d < dim; ++d) dst[d] += src[d] * factor;
}

// Hands out consecutive, cache-line aligned pieces of a worker's scratch memory. With a null base it only
// counts bytes.
class ScratchCursor {
 public:
  explicit ScratchCursor(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* objects(int64_t count) {
    void* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * sizeof(T), kCacheLine);
    return static_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  static constexpr int64_t kCacheLine = 64;
  char* base_;
  size_t used_ = 0;
};

}  // namespace mls::cpu::MLS_VARIANT
