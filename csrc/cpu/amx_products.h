// Products of matrices in tiles, C = start + A B, in blocks of 2 x 2 tiles of C; A and B are of kParts parts.
#pragma once
#include "amx_tile.h"

namespace mls::cpu::MLS_VARIANT {

// What a block reads of an operand: step after step of the sum's depth, two tiles.
template <typename T>
struct AmxPairs {
  const T* data;
  int64_t second, step, part;  // elements to the second tile, the next step, the next part of a value
};

// How often A is read: a matrix of the L1 cache once for every block of columns, one that streams by from the
// L2 cache is better not kept.
enum class AmxReuse { kCached, kStreamed };

// The tile unit computes by itself: vector instructions between those of tiles cost hardly any time, if they
// are spread evenly. So every product takes work to be done beside it, and calls its some() after each two
// tile products.
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
  static constexpr int64_t kCacheLine = 64, kLinesAtOnce = 1;
  const char** lines_ = nullptr;
  int64_t next_ = 0, end_ = 0;
};

// A store waits for the last product of its tile, and products behind a store
// wait for it. So the tiles of a block stay in their registers until the next
// block, of the same or of another product, needs these, and are stored one by
// one between its products. finish() stores the last ones.
template <int kParts>
class AmxProducts {
 public:
  // Of some() in a block, for each step of depth.
  static constexpr int kCallsPerStep = 2 * std::size(kAmxPartPairs<kParts>);

  AmxProducts() { nothing_pends(); }
  AmxProducts(const AmxProducts&) = delete;
  AmxProducts& operator=(const AmxProducts&) = delete;

  // Two rows and two columns of tiles; `depth` is that of the sum, in steps.
  template <AmxReuse kA, class Beside>
  MLS_INLINE void block(AmxPairs<uint16_t> a, AmxPairs<uint32_t> b, int64_t depth, AmxTiles<float> c,
                        Beside& beside) {
    block<kA, true>(a, b, depth, AmxTiles<const float>{}, c, beside);
  }
  template <AmxReuse kA, class Beside>
  MLS_INLINE void block(AmxPairs<uint16_t> a, AmxPairs<uint32_t> b, int64_t depth,
                        AmxTiles<const float> start, AmxTiles<float> c, Beside& beside) {
    block<kA, false>(a, b, depth, start, c, beside);
  }

  // All blocks of a product; rows, columns and depth are multiples of kAmxBlock.
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
    multiply<false>(shape, a, b, {c.data, c.down, c.right}, c, beside);
  }

  void finish() {
    store_pending<0>(), store_pending<1>(), store_pending<2>(), store_pending<3>();
    nothing_pends();
  }

 private:
  static constexpr auto& kPairs = kAmxPartPairs<kParts>;

  template <bool kFromZero, class Beside>
  [[gnu::noinline]] void multiply(const AmxShape& shape, const AmxTiles<const uint16_t>& a,
                                  const AmxTiles<const uint32_t>& b, const AmxTiles<const float>& start,
                                  const AmxTiles<float>& c, Beside& work) {
    Beside beside = work;  // in registers; `work` itself would be read and written around every instruction
    const int64_t rows = shape.rows / kAmxTile, columns = shape.columns / kAmxTile;
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < columns; j += 2) {
        block<AmxReuse::kCached, kFromZero>({a.at(i, 0), a.down, a.right, a.part},
                                            {b.at(0, j), b.right, b.down, b.part}, shape.depth / kAmxDepth,
                                            {start.at(i, j), start.down, start.right, 0, start.row_bytes},
                                            {c.at(i, j), c.down, c.right}, beside);
      }
    }
    work = beside;
  }

  template <AmxReuse kA, bool kFromZero, class Beside>
  MLS_INLINE void block(AmxPairs<uint16_t> a, AmxPairs<uint32_t> b, int64_t depth,
                        AmxTiles<const float> start, AmxTiles<float> c, Beside& beside) {
    // A store keeps the tile unit from its products, so between these.
    load_a<kA, 4, 0>(a, 0), load_b<6, 0>(b, 0);
    begin_tile<kFromZero, 0>(start);
    tile_dot<0, 4, 6>();
    load_b<7, 0>(b, b.second);
    begin_tile<kFromZero, 1>(start);
    tile_dot<1, 4, 7>();
    beside.some();
    load_a<kA, 5, 0>(a, a.second);
    begin_tile<kFromZero, 2>(start);
    tile_dot<2, 5, 6>();
    begin_tile<kFromZero, 3>(start);
    tile_dot<3, 5, 7>();
    pending_ = c;
    beside.some();
    add_pairs<kA, 1>(a, b, beside);
    for (; depth > 1; --depth) {
      a.data += a.step, b.data += b.step;
      add_pairs<kA, 0>(a, b, beside);
    }
  }

  // The products of part pairs from kPair on.
  template <AmxReuse kA, size_t kPair, class Beside>
  static MLS_INLINE void add_pairs(const AmxPairs<uint16_t>& a, const AmxPairs<uint32_t>& b, Beside& beside) {
    if constexpr (kPair < std::size(kPairs)) {
      load_a<kA, 4, kPair>(a, 0), load_b<6, kPair>(b, 0);
      load_b<7, kPair>(b, b.second), load_a<kA, 5, kPair>(a, a.second);
      beside.some();
      tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
      beside.some();
      tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
      add_pairs<kA, kPair + 1>(a, b, beside);
    }
  }

  // If the pair of parts before has not left it in the register.
  template <AmxReuse kA, int kTile, size_t kPair>
  static MLS_INLINE void load_a(const AmxPairs<uint16_t>& a, int64_t tile) {
    if constexpr (kPair > 0 && kPairs[kPair].a == kPairs[std::max<size_t>(kPair, 1) - 1].a) return;
    const uint16_t* const data = a.data + tile + kPairs[kPair].a * a.part;
    kA == AmxReuse::kStreamed ? tile_load_streamed<kTile>(data, kAmxTileBytes)
                              : tile_load<kTile>(data, kAmxTileBytes);
  }
  template <int kTile, size_t kPair>
  static MLS_INLINE void load_b(const AmxPairs<uint32_t>& b, int64_t tile) {
    if constexpr (kPair == 0 || kPairs[kPair].b != kPairs[std::max<size_t>(kPair, 1) - 1].b)
      tile_load<kTile>(b.data + tile + kPairs[kPair].b * b.part, kAmxTileBytes);
  }

  template <bool kFromZero, int kTile>
  MLS_INLINE void begin_tile(const AmxTiles<const float>& start) {
    store_pending<kTile>();
    if constexpr (kFromZero) {
      tile_zero<kTile>();
    } else {
      tile_load<kTile>(start.at(kTile / 2, kTile % 2), start.row_bytes);
    }
  }
  template <int kTile>
  MLS_INLINE void store_pending() {
    tile_store<kTile>(pending_.at(kTile / 2, kTile % 2), kAmxTileBytes);
  }

  void nothing_pends() { pending_ = packed_tiles(nowhere_, 2); }

  AmxTiles<float> pending_;  // where the block goes that registers 0 to 3 hold
  alignas(kAmxTileBytes) float nowhere_[4 * kAmxTileWords];
};

}  // namespace mls::cpu::MLS_VARIANT
