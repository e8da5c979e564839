// Tiles of 16-bit numbers in shared memory, and the mma.m16n8k16 fragments loaded from them.
#pragma once
#include "attention_params.h"
#include "cuda/primitives/sm80.h"

namespace mls::cuda {

// kRows x kColumns elements. Rows are padded to an odd number of 16-byte chunks, so that the eight rows that
// one ldmatrix reads are in different banks, and every address is a per-lane base plus a constant. (An XOR
// swizzle would save the padding but cost a register for each of its addresses.)
template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPitch = 16 * (kChunks | 1);
  static constexpr int kBytes = kRows * kPitch;
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0);

  unsigned char* base;

  MLS_DEVICE unsigned char* chunk(int row, int chunk) const { return base + row * kPitch + chunk * 16; }
  MLS_DEVICE unsigned char* pair(int row, int column) const {
    return chunk(row, column / 8) + column % 8 * 2;
  }
};

// The rows (tokens) of one head of one sequence.
struct TokenRows {
  const uint16_t* data;
  int64_t stride;
  int num_rows;
};

MLS_DEVICE TokenRows rows_of(const TokenTensor<const void>& tensor, int batch, int head, int num_rows) {
  return {static_cast<const uint16_t*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride,
          tensor.token_stride, num_rows};
}

// Starts an asynchronous copy of rows first_row.. into the tile. Rows beyond the end of the tensor become
// zeros.
template <int kThreads, class Tile>
MLS_DEVICE void load_tile(const Tile& tile, const TokenRows& rows, int first_row) {
  MLS_NO_UNROLL  // unrolled, its addresses would make accumulators spill
      for (int i = static_cast<int>(thread_index().x); i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool valid = first_row + row < rows.num_rows;
    const uint16_t* source = rows.data + (valid ? (first_row + row) * rows.stride + chunk * 8 : 0);
    copy16_async(tile.chunk(row, chunk), source, valid);
  }
}

// The A fragment at rows row.. and columns k.. of a tile.
template <class Tile>
MLS_DEVICE void load_a(uint32_t (&a)[4], const Tile& tile, int row, int k) {
  const int lane = lane_id();
  ldmatrix_x4(a, tile.chunk(row + (lane & 15), k / 8 + (lane >> 4)));
}

// The same from a tile that is stored transposed, k by rows.
template <class Tile>
MLS_DEVICE void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int row, int k) {
  const int lane = lane_id();
  ldmatrix_x4_transposed(a, tile.chunk(k + (lane & 7) + (lane >> 4) * 8, row / 8 + (lane >> 3 & 1)));
}

// B fragments of columns column..column+15 and k..; b[0..1] belong to the first eight columns. kByColumn: the
// tile is stored column by k (like K in Q K^T); otherwise k by column (like V in P V).
template <bool kByColumn, class Tile>
MLS_DEVICE void load_b(uint32_t (&b)[4], const Tile& tile, int column, int k) {
  const int lane = lane_id();
  if constexpr (kByColumn) {
    ldmatrix_x4(b, tile.chunk(column + (lane & 7) + (lane >> 4) * 8, k / 8 + (lane >> 3 & 1)));
  } else {
    ldmatrix_x4_transposed(b, tile.chunk(k + (lane & 15), column / 8 + (lane >> 4)));
  }
}

// Layout of an accumulator of 16 x (8 kTiles): element e of tile j belongs to row lane / 4 + (e / 2) * 8 and
// column 8 j + (lane % 4) * 2 + e % 2.
MLS_DEVICE int fragment_row(int element) {
  return (lane_id() >> 2) + (element >> 1) * 8;
}

MLS_DEVICE int fragment_column(int tile, int element) {
  return tile * 8 + (lane_id() & 3) * 2 + (element & 1);
}

template <int kTiles>
MLS_DEVICE void set_zero(float (&x)[kTiles][4]) {
  MLS_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    MLS_UNROLL
    for (int e = 0; e < 4; ++e) x[j][e] = 0.0f;
  }
}

// Columns 16 * step.. of an accumulator, converted to the A fragment of the next product.
template <class Element, int kTiles>
MLS_DEVICE void to_a(uint32_t (&a)[4], const float (&x)[kTiles][4], int step) {
  a[0] = pack<Element>(x[2 * step][0], x[2 * step][1]);
  a[1] = pack<Element>(x[2 * step][2], x[2 * step][3]);
  a[2] = pack<Element>(x[2 * step + 1][0], x[2 * step + 1][1]);
  a[3] = pack<Element>(x[2 * step + 1][2], x[2 * step + 1][3]);
}

// sums[r] += a[r] b for kRowTiles tiles of 16 rows that share b (columns first_column.., 16 of k).
template <class Element, bool kByColumn, int kRowTiles, int kTiles, class Tile>
MLS_DEVICE void multiply(float (&sums)[kRowTiles][kTiles][4], const uint32_t (&a)[kRowTiles][4],
                         const Tile& tile, int first_column, int k) {
  static_assert(kTiles % 2 == 0);
  MLS_UNROLL
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t b[4];
    load_b<kByColumn>(b, tile, first_column + j * 8, k);
    MLS_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      mma_m16n8k16<Element>(sums[r][j], a[r], b[0], b[1]);
      mma_m16n8k16<Element>(sums[r][j + 1], a[r], b[2], b[3]);
    }
  }
}

struct alignas(8) FloatPair {
  float x, y;
};

struct alignas(16) FourWords {
  uint32_t words[4];
};

struct alignas(16) FourFloats {
  float values[4];
};

// Two adjacent numbers, rounded to 16 bits.
template <class Element>
MLS_DEVICE void store_pair(uint16_t* target, FloatPair value) {
  *reinterpret_cast<uint32_t*>(target) = pack<Element>(value.x, value.y);
}

// The first row of one head of one sequence; null if the tensor is absent.
template <class T>
MLS_DEVICE T* rows_at(const TokenTensor<T>& tensor, int batch, int head) {
  return tensor.data == nullptr ? nullptr
                                : tensor.data + batch * tensor.batch_stride + head * tensor.head_stride;
}

}  // namespace mls::cuda
