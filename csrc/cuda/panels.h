// Tiles that tensor copies write and wgmma reads: panels of 64 columns under the 128-byte swizzle. Of a
// number of columns that is no multiple of 64, the last panel is filled up with zeros, which wgmma never
// reads.
#pragma once
#include "cuda/primitives/sm90.h"

namespace mls::cuda {

template <int kRows_, int kColumns_>
struct PanelTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kPanels = (kColumns + kSwizzleColumns - 1) / kSwizzleColumns;
  static constexpr int kPanelBytes = kRows * kSwizzleRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0 && kColumns % 16 == 0);

  unsigned char* base;  // 1024-byte aligned

  // An operand whose k runs along the columns: rows first_row.., columns k..k+15.
  MLS_DEVICE uint64_t along_columns(int first_row, int k) const {
    return matrix_descriptor(
        base + k / kSwizzleColumns * kPanelBytes + first_row * kSwizzleRowBytes + k % kSwizzleColumns * 2,
        kPanelBytes);
  }
  // An operand whose k runs along the rows: rows k..k+15, columns from first_column, a panel's first, on.
  MLS_DEVICE uint64_t along_rows(int first_column, int k) const {
    return matrix_descriptor(base + first_column / kSwizzleColumns * kPanelBytes + k * kSwizzleRowBytes +
                                 first_column % kSwizzleColumns * 2,
                             kPanelBytes);
  }
};

// Copies tokens first_token.. of one head into a tile. One thread calls it, once it has made `full` expect
// Tile::kBytes.
template <class Tile>
MLS_DEVICE void copy_tile(const Tile& tile, const TensorMap& map, Barrier* full, int first_token, int head,
                          int batch) {
  MLS_UNROLL
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    tensor_copy(tile.base + panel * Tile::kPanelBytes, map, full, panel * kSwizzleColumns, first_token, head,
                batch);
}

// A ring of stages that a producer fills and consumers drain: the stage and the parity of one use.
template <int kStages>
struct RingPosition {
  int stage = 0;
  int parity = 0;

  MLS_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace mls::cuda
