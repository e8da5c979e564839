// Intel AMX: eight tile registers of 16 rows x 64 bytes, and C[16][16] fp32 +=
// A[16][32] bf16 * B[32][16] bf16. B comes as words, pairs of rows side by
// side: word [k / 2][n] = (B[k][n], B[k + 1][n]).
#pragma once
#include "simd.h"
#include "tiles.h"

namespace mls::cpu::MLS_VARIANT {

constexpr int kAmxTile = 16;       // rows of a tile register, and its columns of fp32
constexpr int kAmxDepth = 32;      // bf16 values of a product in one instruction
constexpr int kAmxBlock = 32;      // 2 x 2 tile registers of C: each tile of A and B is used twice
constexpr int kAmxTileBytes = 64;  // of a tile row

// All eight tiles full size: tails are padded with zeros, so the configuration
// never changes within a task. Vectors flush denormals like the tile unit does:
// 2^x that underflows costs an assist of 200 cycles otherwise.
class AmxSession {
 public:
  AmxSession() : control_(_mm_getcsr()) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kAmxTileBytes, config.rows[i] = kAmxTile;
    asm volatile("ldtilecfg %0" : : "m"(config));
    _mm_setcsr(control_ | kFlushResults | kFlushOperands);
  }
  ~AmxSession() {
    asm volatile("tilerelease" : :);
    _mm_setcsr(control_);
  }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;

 private:
  static constexpr unsigned kFlushResults = 1u << 15, kFlushOperands = 1u << 6;  // MXCSR: FTZ, DAZ
  const unsigned control_;
};

// Own wrappers: g++ 12's intrinsics do not tell the compiler that they read and
// write memory.
template <int kTile>
MLS_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
MLS_INLINE void tile_load(const void* data, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(row_bytes), "i"(kTile) : "memory");
}
// The same for data that is read once in a while: it leaves the L1 cache to what is used more often.
template <int kTile>
MLS_INLINE void tile_load_streamed(const void* data, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
MLS_INLINE void tile_store(void* data, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(data), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
MLS_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// A value of more digits than bf16 has is the sum of several bf16 values, its
// parts. Three hold all 24 digits of an fp32: x = x0 + x1 + x2, each below 2^-7
// of the one before. A product of two sums then takes the products of parts that
// fp32 can tell from zero, six of nine:
//
//     x y = x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0)
//
// What is left out is below 2^-21 of x y, and about 2^-24 of it on average, the
// rounding of fp32. Six products of tiles are still faster than one by vectors.
// (Henry, Tang, Heinecke: "Leveraging the bfloat16 artificial intelligence
// datatype for higher-precision computations", ARITH 2019.)
struct AmxPartPair {
  int a, b;
};
template <int kParts>
constexpr AmxPartPair kAmxPartPairs[1] = {{0, 0}};
// In an order in which only one of the two changes from product to product.
template <>
constexpr AmxPartPair kAmxPartPairs<3>[6] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};

// How a matrix lies in memory: a tile is 16 rows of 64 bytes, one behind the
// other (then matrices fill whole pages and all sets of the cache); elements
// between neighbouring tiles, and between the parts of a value.
template <typename T>
struct AmxTiles {
  T* data;
  int64_t down, right, part = 0;
  int64_t row_bytes = kAmxTileBytes;  // 0: a tile whose rows are all the same

  MLS_INLINE T* at(int64_t i, int64_t j) const { return data + i * down + j * right; }
};

alignas(kAmxTileBytes) constexpr float kAmxZeros[kAmxTileBytes / sizeof(float)] = {};
constexpr AmxTiles<const float> kAmxZeroTiles{kAmxZeros, 0, 0, 0, 0};

constexpr int kAmxRow = kAmxTileBytes / sizeof(float);  // fp32 or words in the row of a tile
constexpr int kAmxTileWords = kAmxTile * kAmxRow;
constexpr int kAmxTileHalves = kAmxTile * kAmxDepth;  // bf16 values of a tile

// Tiles one behind the other, `columns` to a row of tiles.
template <typename T>
MLS_INLINE AmxTiles<T> packed_tiles(T* data, int64_t columns, int64_t part = 0) {
  constexpr int64_t kSize = kAmxTile * kAmxTileBytes / sizeof(T);
  return {data, columns * kSize, kSize, part};
}
// A row tile in the SIMD lanes, vector by vector: [vectors][width][kLanes].
MLS_INLINE AmxTiles<float> lane_tiles(float* data, int64_t width) {
  return {data, kAmxTileWords, width * kAmxRow};
}

struct AmxShape {
  int64_t rows, columns, depth;  // of C and of the sum; multiples of kAmxBlock
};

}  // namespace mls::cpu::MLS_VARIANT
