// Tiles that TMA copies write and wgmma reads: panels of 64 columns with the 128-byte swizzle. If the number
// of columns is not a multiple of 64, the last panel is padded with zeros.
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

  // An operand whose k dimension runs along the columns: rows first_row.., columns k..k+15.
  MLS_DEVICE uint64_t along_columns(int first_row, int k) const {
    return matrix_descriptor(base + first_row * kSwizzleRowBytes,
                             k / kSwizzleColumns * kPanelBytes + k % kSwizzleColumns * 2, kPanelBytes);
  }
  MLS_DEVICE unsigned char* chunk(int row, int chunk) const {
    return base + chunk / 8 * kPanelBytes + row * kSwizzleRowBytes + (chunk % 8 ^ row % 8) * 16;
  }
  // An operand whose k dimension runs along the rows: rows k..k+15, columns from first_column on, which are
  // whole panels or columns of one panel.
  MLS_DEVICE uint64_t along_rows(int first_column, int k) const {
    return matrix_descriptor(
        base + first_column / kSwizzleColumns * kPanelBytes + first_column % kSwizzleColumns * 2,
        k * kSwizzleRowBytes, kPanelBytes);
  }
};

// Issues sums += 16 columns of A, in registers, times rows k..k+15 of a tile, all of its columns. Whole
// panels form one product, and the rest of the last panel another: CUTLASS only uses operands of whole
// panels, and it is undocumented how the hardware handles one and a half.
template <class Element, class Tile>
MLS_DEVICE void multiply_by_rows(float (&sums)[Tile::kColumns / 8][4], const uint32_t (&a)[4],
                                 const Tile& tile, int k) {
  constexpr int kRest = Tile::kColumns % kSwizzleColumns, kWhole = Tile::kColumns - kRest;
  Wgmma<Element, kWhole>::template from_registers<true>(reinterpret_cast<float (&)[kWhole / 8][4]>(sums[0]),
                                                        a, tile.along_rows(0, k), 1);
  if constexpr (kRest > 0)
    Wgmma<Element, kRest>::template from_registers<true>(
        reinterpret_cast<float (&)[kRest / 8][4]>(sums[kWhole / 8]), a, tile.along_rows(kWhole, k), 1);
}

// fp32 sums to be added to global memory: panels of 32 columns with the same swizzle.
template <int kRows_, int kColumns_>
struct FloatPanelTile {
  static constexpr int kRows = kRows_;
  static constexpr int kPanelColumns = kSwizzleRowBytes / 4;
  static constexpr int kPanels = kColumns_ / kPanelColumns;
  static constexpr int kPanelBytes = kRows * kSwizzleRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0 && kColumns_ % kPanelColumns == 0);

  unsigned char* base;  // 1024-byte aligned
};

// Writes a warp's fragments, times `factor`, as rows first_row.. of a tile. Odd rows of a fragment swap tiles
// j and j ^ 2, so that the four rows that half a warp stores in one access use different banks.
template <class Tile, int kTiles>
MLS_DEVICE void store_fragments(const Tile& tile, const float (&x)[kTiles][4], int first_row, float factor) {
  constexpr int kPanelTiles = Tile::kPanelColumns / 8;
  static_assert(kPanelTiles == 4 && kTiles == Tile::kPanels * kPanelTiles);
  const int row = lane_id() >> 2, column_pair = lane_id() & 3;
  const bool trades = row % 2;
  const int swizzle = column_pair >> 1 ^ row ^ (trades ? 4 : 0);
  unsigned char* start = tile.base + (first_row + row) * kSwizzleRowBytes + (column_pair & 1) * 8;
  MLS_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    unsigned char* target =
        start + j / kPanelTiles * Tile::kPanelBytes + (j % kPanelTiles * 2 ^ swizzle) * 16;
    MLS_UNROLL
    for (int e = 0; e < 4; e += 2)
      store_shared_pair(target + e / 2 * 8 * kSwizzleRowBytes, (trades ? x[j ^ 2][e] : x[j][e]) * factor,
                        (trades ? x[j ^ 2][e + 1] : x[j][e + 1]) * factor);
  }
}

// Copies tokens first_token.. of one head into a tile. Called by one thread, after it has made `full` expect
// Tile::kBytes.
template <class Tile>
MLS_DEVICE void copy_tile(const Tile& tile, const TensorMap& map, Barrier* full, int first_token, int head,
                          int batch) {
  MLS_UNROLL
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    tensor_copy(tile.base + panel * Tile::kPanelBytes, map, full, panel * kSwizzleColumns, first_token, head,
                batch);
}

// Signals that a warp is done with what `empty` guards: after all lanes have reached this point, one arrives.
MLS_DEVICE void arrive_as_warp(Barrier* empty) {
  sync_warp();
  if (lane_id() == 0) barrier_arrive(empty);
}

// Position in a ring buffer that a producer fills and consumers drain: the stage, and the parity of its
// barriers.
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
