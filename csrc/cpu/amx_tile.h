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
// never changes within a task.
class AmxSession {
 public:
  AmxSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kAmxTileBytes, config.rows[i] = kAmxTile;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~AmxSession() { asm volatile("tilerelease" : :); }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;
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
template <int kTile>
MLS_INLINE void tile_store(void* data, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(data), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
MLS_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// How a matrix lies in memory as tiles: bytes between the rows of a tile, and
// elements between neighbouring tiles. A matrix that vector code writes and the
// tile unit reads is best kept tile by tile (kAmxRow): then it fills whole pages
// and all sets of the cache.
template <typename T>
struct AmxTiles {
  T* data;
  int64_t row_bytes, down, right;

  MLS_INLINE T* at(int64_t i, int64_t j) const { return data + i * down + j * right; }
};

constexpr int kAmxRow = kAmxTileBytes / sizeof(float);  // fp32 or words in the row of a tile
constexpr int kAmxTileWords = kAmxTile * kAmxRow;

// Tiles one behind the other, `columns` to a row of tiles.
template <typename T>
MLS_INLINE AmxTiles<T> packed_tiles(T* data, int64_t columns) {
  constexpr int64_t kSize = kAmxTile * kAmxTileBytes / sizeof(T);
  return {data, kAmxTileBytes, columns * kSize, kSize};
}
// Rows of `stride` elements.
template <typename T>
MLS_INLINE AmxTiles<T> strided_tiles(T* data, int64_t stride) {
  return {data, stride * int64_t{sizeof(T)}, kAmxTile * stride, kAmxTileBytes / int64_t{sizeof(T)}};
}

struct AmxShape {
  int64_t rows, columns, depth;  // of C and of the sum; multiples of kAmxBlock
};

// C = A B, or C += A B, in blocks of 2 x 2 tiles.
template <bool kAdd>
[[gnu::noinline]] inline void amx_multiply(AmxShape shape, AmxTiles<const uint16_t> a,
                                           AmxTiles<const uint32_t> b, AmxTiles<float> c) {
  for (int64_t i = 0; i < shape.rows / kAmxTile; i += 2) {
    for (int64_t j = 0; j < shape.columns / kAmxTile; j += 2) {
      if constexpr (kAdd) {
        tile_load<0>(c.at(i, j), c.row_bytes), tile_load<1>(c.at(i, j + 1), c.row_bytes);
        tile_load<2>(c.at(i + 1, j), c.row_bytes), tile_load<3>(c.at(i + 1, j + 1), c.row_bytes);
      } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      }
#pragma GCC unroll 2
      for (int64_t k = 0; k < shape.depth / kAmxDepth; ++k) {
        tile_load<4>(a.at(i, k), a.row_bytes);
        tile_load<6>(b.at(k, j), b.row_bytes);
        tile_load<7>(b.at(k, j + 1), b.row_bytes);
        tile_load<5>(a.at(i + 1, k), a.row_bytes);
        tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
      }
      tile_store<0>(c.at(i, j), c.row_bytes), tile_store<1>(c.at(i, j + 1), c.row_bytes);
      tile_store<2>(c.at(i + 1, j), c.row_bytes), tile_store<3>(c.at(i + 1, j + 1), c.row_bytes);
    }
  }
}

// The same for rows of any stride. Strides count elements: of bf16, of words,
// of fp32.
template <bool kAdd>
inline void amx_multiply(AmxShape shape, const uint16_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                         float* c, int64_t ldc) {
  amx_multiply<kAdd>(shape, strided_tiles(a, lda), strided_tiles(b, ldb), strided_tiles(c, ldc));
}

}  // namespace mls::cpu::MLS_VARIANT
