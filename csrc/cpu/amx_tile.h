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

// How a matrix lies in memory as tiles: bytes between the rows of a tile, and
// elements between neighbouring tiles and between the parts of a value. A matrix
// that vector code writes and the tile unit reads is best kept tile by tile
// (kAmxRow): then it fills whole pages and all sets of the cache.
template <typename T>
struct AmxTiles {
  T* data;
  int64_t row_bytes, down, right, part = 0;

  MLS_INLINE T* at(int64_t i, int64_t j) const { return data + i * down + j * right; }
};

constexpr int kAmxRow = kAmxTileBytes / sizeof(float);  // fp32 or words in the row of a tile
constexpr int kAmxTileWords = kAmxTile * kAmxRow;

// Tiles one behind the other, `columns` to a row of tiles.
template <typename T>
MLS_INLINE AmxTiles<T> packed_tiles(T* data, int64_t columns, int64_t part = 0) {
  constexpr int64_t kSize = kAmxTile * kAmxTileBytes / sizeof(T);
  return {data, kAmxTileBytes, columns * kSize, kSize, part};
}
// A row tile in the SIMD lanes, vector by vector: [vectors][width][kLanes].
MLS_INLINE AmxTiles<float> lane_tiles(float* data, int64_t width) {
  return {data, kAmxTileBytes, kAmxTileWords, width * kAmxRow};
}

struct AmxShape {
  int64_t rows, columns, depth;  // of C and of the sum; multiples of kAmxBlock
};

// The tile unit computes by itself: vector instructions between those of tiles cost hardly any time. So every
// product takes work to be done beside it, and calls its some() after each four tile products.
struct NothingBeside {
  MLS_INLINE void some() {}
};

// Lines of memory that will be needed, fetched to the L2 cache a few at a time:
// all at once they would keep the products from theirs.
class AmxPrefetch {
 public:
  AmxPrefetch() = default;
  explicit AmxPrefetch(const char** lines) : lines_(lines) {}

  void clear() { next_ = end_ = 0; }
  void add(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kCacheLine) lines_[end_++] = static_cast<const char*>(row) + i;
  }
  MLS_INLINE void some() {
    for (const int64_t last = std::min(next_ + kLinesAtOnce, end_); next_ < last; ++next_)
      _mm_prefetch(lines_[next_], _MM_HINT_T1);
  }
  static constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, kCacheLine); }

 private:
  static constexpr int64_t kCacheLine = 64, kLinesAtOnce = 2;
  const char** lines_ = nullptr;
  int64_t next_ = 0, end_ = 0;
};

// C = start + A B in blocks of 2 x 2 tiles, product after product; A and B are
// of kParts parts.
//
// A store waits for the last product of its tile, and products behind a store
// wait for it. So the tiles of a block stay in their registers until the next
// block, of the same or of the next product, needs these, and are stored one by
// one between its products. finish() stores the last ones.
template <int kParts>
class AmxProducts {
 public:
  static constexpr int kNumPairs = std::size(kAmxPartPairs<kParts>);

  template <class Beside>
  void multiply(AmxShape shape, AmxTiles<const uint16_t> a, AmxTiles<const uint32_t> b, AmxTiles<float> c,
                Beside& beside) {
    multiply<true>(shape, a, b, {}, c, beside);
  }
  template <class Beside>
  void multiply(AmxShape shape, AmxTiles<const uint16_t> a, AmxTiles<const uint32_t> b,
                AmxTiles<const float> start, AmxTiles<float> c, Beside& beside) {
    multiply<false>(shape, a, b, start, c, beside);
  }
  template <class Beside>
  void multiply_add(AmxShape shape, AmxTiles<const uint16_t> a, AmxTiles<const uint32_t> b, AmxTiles<float> c,
                    Beside& beside) {
    multiply<false>(shape, a, b, {c.data, c.row_bytes, c.down, c.right}, c, beside);
  }

  void finish() {
    if (row_bytes_ == 0) return;
    tile_store<0>(pending_[0], row_bytes_), tile_store<1>(pending_[1], row_bytes_);
    tile_store<2>(pending_[2], row_bytes_), tile_store<3>(pending_[3], row_bytes_);
    row_bytes_ = 0;
  }

 private:
  static constexpr auto& kPairs = kAmxPartPairs<kParts>;

  // The tiles of A and B that the products of a block read next.
  struct Operands {
    const AmxTiles<const uint16_t>& a;
    const AmxTiles<const uint32_t>& b;
    const uint16_t *a0, *a1;
    const uint32_t *b0, *b1;

    MLS_INLINE void advance() { a0 += a.right, a1 += a.right, b0 += b.down, b1 += b.down; }
    template <int kTile, int kPair>
    MLS_INLINE void load_a(const uint16_t* tile) const {
      if constexpr (kPair == 0 || kPairs[kPair].a != kPairs[std::max(kPair, 1) - 1].a)
        tile_load<kTile>(tile + kPairs[kPair].a * a.part, a.row_bytes);
    }
    template <int kTile, int kPair>
    MLS_INLINE void load_b(const uint32_t* tile) const {
      if constexpr (kPair == 0 || kPairs[kPair].b != kPairs[std::max(kPair, 1) - 1].b)
        tile_load<kTile>(tile + kPairs[kPair].b * b.part, b.row_bytes);
    }
  };

  template <bool kFromZero, class Beside>
  [[gnu::noinline]] void multiply(const AmxShape& shape, const AmxTiles<const uint16_t>& a,
                                  const AmxTiles<const uint32_t>& b, const AmxTiles<const float>& start,
                                  const AmxTiles<float>& c, Beside& work) {
    Beside beside = work;  // in registers; `work` itself would be read and written around every instruction
    const int64_t rows = shape.rows / kAmxTile, columns = shape.columns / kAmxTile;
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < columns; j += 2) {
        Operands from{a, b, a.at(i, 0), a.at(i + 1, 0), b.at(0, j), b.at(0, j + 1)};
        // A store keeps the tile unit from its products, so between these.
        from.template load_a<4, 0>(from.a0), from.template load_b<6, 0>(from.b0);
        begin_tile<kFromZero, 0>(start.at(i, j), start.row_bytes, c.at(i, j));
        tile_dot<0, 4, 6>();
        from.template load_b<7, 0>(from.b1);
        begin_tile<kFromZero, 1>(start.at(i, j + 1), start.row_bytes, c.at(i, j + 1));
        tile_dot<1, 4, 7>();
        from.template load_a<5, 0>(from.a1);
        begin_tile<kFromZero, 2>(start.at(i + 1, j), start.row_bytes, c.at(i + 1, j));
        tile_dot<2, 5, 6>();
        begin_tile<kFromZero, 3>(start.at(i + 1, j + 1), start.row_bytes, c.at(i + 1, j + 1));
        tile_dot<3, 5, 7>();
        row_bytes_ = c.row_bytes;
        beside.some();
        add_pairs<1>(from, beside);
        for (int64_t k = kAmxDepth; k < shape.depth; k += kAmxDepth) {
          from.advance();
          add_pairs<0>(from, beside);
        }
      }
    }
    work = beside;
  }

  // The products of part pairs from kPair on.
  template <int kPair, class Beside>
  static MLS_INLINE void add_pairs(const Operands& from, Beside& beside) {
    if constexpr (kPair < kNumPairs) {
      from.template load_a<4, kPair>(from.a0), from.template load_b<6, kPair>(from.b0);
      from.template load_b<7, kPair>(from.b1), from.template load_a<5, kPair>(from.a1);
      beside.some();
      tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
      add_pairs<kPair + 1>(from, beside);
    }
  }

  template <bool kFromZero, int kTile>
  MLS_INLINE void begin_tile(const float* start, int64_t start_bytes, float* c) {
    if (row_bytes_ != 0) tile_store<kTile>(pending_[kTile], row_bytes_);
    if constexpr (kFromZero) {
      tile_zero<kTile>();
    } else {
      tile_load<kTile>(start, start_bytes);
    }
    pending_[kTile] = c;
  }

  float* pending_[4] = {};  // where the tiles of C go that registers 0 to 3 hold
  int64_t row_bytes_ = 0;   // 0: they hold none
};

}  // namespace mls::cpu::MLS_VARIANT
