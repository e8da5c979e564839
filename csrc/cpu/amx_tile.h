// Intel AMX: eight tile registers of 16 rows x 64 bytes, and the product C[16][16] fp32 += A[16][32] bf16 *
// B[32][16] bf16. B is stored in words that pair two rows: word [k / 2][n] = (B[k][n], B[k + 1][n]).
#pragma once
#include "amx_instructions.h"
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

constexpr int kAmxTile = 16;   // rows of a tile register, and its columns of fp32
constexpr int kAmxDepth = 32;  // depth of one tile product
constexpr int kAmxBlock = 32;  // rows and columns of 2 x 2 tiles of C, which use each tile of A and B twice
constexpr int kAmxTileBytes = 64;  // per row of a tile

// Configures all eight tiles at full size: tails are padded with zeros, so the configuration never changes
// within a task. Also makes vector instructions flush denormals, as the tile unit does; otherwise every 2^x
// that underflows would cost a microcode assist of 200 cycles.
class AmxSession {
 public:
  AmxSession() : control_(_mm_getcsr()) {
    AmxTileConfig config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kAmxTileBytes, config.rows[i] = kAmxTile;
    tile_configure(config);
    _mm_setcsr(control_ | kFlushResults | kFlushOperands);
  }
  ~AmxSession() {
    tile_release();
    _mm_setcsr(control_);
  }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;

 private:
  static constexpr unsigned kFlushResults = 1u << 15, kFlushOperands = 1u << 6;  // MXCSR: FTZ, DAZ
  const unsigned control_;
};

// An fp32 value is the sum of three bf16 values, its parts, which together hold all 24 bits of its
// significand: x = x0 + x1 + x2, each below 2^-7 of the one before. Of the nine products of the parts of two
// values, six matter in fp32:
//
//     x y = x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0)
//
// The others sum to less than 2^-21 of x y, and on average to about 2^-24, the rounding error of fp32. Six
// products by tiles are still faster than one by vectors. (Henry, Tang, Heinecke: "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations", ARITH 2019.)
struct AmxPartPair {
  int a, b;
};
template <int kParts>
constexpr AmxPartPair kAmxPartPairs[1] = {{0, 0}};
// Ordered so that between most consecutive products only one of the two parts changes.
template <>
constexpr AmxPartPair kAmxPartPairs<3>[6] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};

// Memory layout of a matrix in tiles. A tile is 16 consecutive rows of 64 bytes, so that matrices fill whole
// pages and use all sets of the cache. Strides, in elements: to the tile below, to the tile on the right, to
// the next part.
template <typename T>
struct AmxTiles {
  T* data;
  int64_t down, right, part = 0;
  int64_t row_bytes = kAmxTileBytes;  // 0: all rows of a tile are the same 64 bytes

  MLS_INLINE T* at(int64_t i, int64_t j) const { return data + i * down + j * right; }
};

alignas(kAmxTileBytes) constexpr float kAmxZeros[kAmxTileBytes / sizeof(float)] = {};
constexpr AmxTiles<const float> kAmxZeroTiles{kAmxZeros, 0, 0, 0, 0};

constexpr int kAmxRow = kAmxTileBytes / sizeof(float);  // fp32 values or words in a row of a tile
constexpr int kAmxTileWords = kAmxTile * kAmxRow;
constexpr int kAmxTileHalves = kAmxTile * kAmxDepth;  // bf16 values in a tile

// Consecutive tiles, row by row, with `columns` tiles per row.
template <typename T>
MLS_INLINE AmxTiles<T> packed_tiles(T* data, int64_t columns, int64_t part = 0) {
  constexpr int64_t kSize = kAmxTile * kAmxTileBytes / sizeof(T);
  return {data, columns * kSize, kSize, part};
}
// A row tile in the SIMD lanes: [vectors][width][kLanes].
MLS_INLINE AmxTiles<float> lane_tiles(float* data, int64_t width) {
  return {data, kAmxTileWords, width * kAmxRow};
}

struct AmxShape {
  int64_t rows, columns, depth;  // of C and of the sum; multiples of kAmxBlock
};

}  // namespace mls::cpu::MLS_VARIANT
