// Products of matrices in tiles, C = start + A B, in blocks of 2 x 2 tiles of C; A and B have kParts parts.
#pragma once
#include "amx_tile.h"

namespace mls::cpu::MLS_VARIANT {

// The tiles of an operand that a block reads: two per step along the depth.
template <typename T>
struct AmxPairs {
  const T* data;
  int64_t second, step, part;  // strides, in elements: to the second tile, the next step, the next part
};

// Whether A should stay in the L1 cache, where it is read again for every block of columns, or is streamed
// from the L2 cache without displacing other data.
enum class AmxReuse { kCached, kStreamed };

// The tile unit works asynchronously: vector instructions between tile instructions take hardly any extra
// time if they are spread evenly. So every product takes an object with interleaved work, and calls its
// do_some() after every two tile products.
struct NoInterleavedWork {
  MLS_INLINE void do_some() {}
};

// Prefetches cache lines to the L2 cache, a few at a time: a burst of prefetches would delay the loads of the
// products.
class AmxPrefetch {
 public:
  AmxPrefetch() = default;
  explicit AmxPrefetch(const char** lines) : lines_(lines) {}

  void clear() { next_ = end_ = 0; }
  void add(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kCacheLine) lines_[end_++] = static_cast<const char*>(row) + i;
  }
  MLS_INLINE void do_some() {
    for (const int64_t last = std::min(next_ + kLinesPerCall, end_); next_ < last; ++next_)
      _mm_prefetch(lines_[next_], _MM_HINT_T1);
  }
  static constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, kCacheLine); }

 private:
  static constexpr int64_t kCacheLine = 64, kLinesPerCall = 1;
  const char** lines_ = nullptr;
  int64_t next_ = 0, end_ = 0;
};

// A tile store waits for the last product of its tile, and delays the products issued after it. So the tiles
// of a block stay in their registers until the next block, of this or another product, needs the registers,
// and are stored one by one between its products. finish() stores the last block.
template <int kParts>
class AmxProducts {
 public:
  // Calls of do_some() in a block per step of its depth.
  static constexpr int kCallsPerStep = 2 * std::size(kAmxPartPairs<kParts>);

  AmxProducts() { clear_pending(); }
  AmxProducts(const AmxProducts&) = delete;
  AmxProducts& operator=(const AmxProducts&) = delete;

  // Computes 2 x 2 tiles of C; `depth` is in steps.
  template <AmxReuse kA, class Work>
  MLS_INLINE void block(AmxPairs<uint16_t> a, AmxPairs<uint32_t> b, int64_t depth, AmxTiles<float> c,
                        Work& work) {
    block<kA, true>(a, b, depth, AmxTiles<const float>{}, c, work);
  }
  template <AmxReuse kA, class Work>
  MLS_INLINE void block(AmxPairs<uint16_t> a, AmxPairs<uint32_t> b, int64_t depth,
                        AmxTiles<const float> start, AmxTiles<float> c, Work& work) {
    block<kA, false>(a, b, depth, start, c, work);
  }

  // Computes all blocks of a product; rows, columns and depth are multiples of kAmxBlock.
  template <class Work>
  void multiply(AmxShape shape, AmxTiles<const uint16_t> a, AmxTiles<const uint32_t> b, AmxTiles<float> c,
                Work& work) {
    multiply<true>(shape, a, b, {}, c, work);
  }
  template <class Work>
  void multiply(AmxShape shape, AmxTiles<const uint16_t> a, AmxTiles<const uint32_t> b,
                AmxTiles<const float> start, AmxTiles<float> c, Work& work) {
    multiply<false>(shape, a, b, start, c, work);
  }
  template <class Work>
  void multiply_add(AmxShape shape, AmxTiles<const uint16_t> a, AmxTiles<const uint32_t> b, AmxTiles<float> c,
                    Work& work) {
    multiply<false>(shape, a, b, {c.data, c.down, c.right}, c, work);
  }

  void finish() {
    store_pending<0>(), store_pending<1>(), store_pending<2>(), store_pending<3>();
    clear_pending();
  }

 private:
  static constexpr auto& kPairs = kAmxPartPairs<kParts>;

  template <bool kFromZero, class Work>
  [[gnu::noinline]] void multiply(const AmxShape& shape, const AmxTiles<const uint16_t>& a,
                                  const AmxTiles<const uint32_t>& b, const AmxTiles<const float>& start,
                                  const AmxTiles<float>& c, Work& caller_work) {
    // A copy, which stays in registers: the caller's would be loaded and stored at every use.
    Work work = caller_work;
    const int64_t rows = shape.rows / kAmxTile, columns = shape.columns / kAmxTile;
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < columns; j += 2) {
        block<AmxReuse::kCached, kFromZero>({a.at(i, 0), a.down, a.right, a.part},
                                            {b.at(0, j), b.right, b.down, b.part}, shape.depth / kAmxDepth,
                                            {start.at(i, j), start.down, start.right, 0, start.row_bytes},
                                            {c.at(i, j), c.down, c.right}, work);
      }
    }
    caller_work = work;
  }

  template <AmxReuse kA, bool kFromZero, class Work>
  MLS_INLINE void block(AmxPairs<uint16_t> a, AmxPairs<uint32_t> b, int64_t depth,
                        AmxTiles<const float> start, AmxTiles<float> c, Work& work) {
    // Pending stores are placed between the products, because each delays the tile unit.
    load_a<kA, 4, 0>(a, 0), load_b<6, 0>(b, 0);
    begin_tile<kFromZero, 0>(start);
    tile_dot<0, 4, 6>();
    load_b<7, 0>(b, b.second);
    begin_tile<kFromZero, 1>(start);
    tile_dot<1, 4, 7>();
    work.do_some();
    load_a<kA, 5, 0>(a, a.second);
    begin_tile<kFromZero, 2>(start);
    tile_dot<2, 5, 6>();
    begin_tile<kFromZero, 3>(start);
    tile_dot<3, 5, 7>();
    pending_ = c;
    work.do_some();
    add_pairs<kA, 1>(a, b, work);
    for (; depth > 1; --depth) {
      a.data += a.step, b.data += b.step;
      add_pairs<kA, 0>(a, b, work);
    }
  }

  // Adds the products of part pairs from kPair on.
  template <AmxReuse kA, size_t kPair, class Work>
  static MLS_INLINE void add_pairs(const AmxPairs<uint16_t>& a, const AmxPairs<uint32_t>& b, Work& work) {
    if constexpr (kPair < std::size(kPairs)) {
      load_a<kA, 4, kPair>(a, 0), load_b<6, kPair>(b, 0);
      load_b<7, kPair>(b, b.second), load_a<kA, 5, kPair>(a, a.second);
      work.do_some();
      tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
      work.do_some();
      tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
      add_pairs<kA, kPair + 1>(a, b, work);
    }
  }

  // Loads a tile of A, unless the previous pair of parts has left it in the register.
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

  void clear_pending() { pending_ = packed_tiles(discarded_, 2); }

  AmxTiles<float> pending_;                                    // destination of the block in registers 0 to 3
  alignas(kAmxTileBytes) float discarded_[4 * kAmxTileWords];  // destination while no block is pending
};

}  // namespace mls::cpu::MLS_VARIANT
