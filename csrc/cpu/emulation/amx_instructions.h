// AMX instructions in plain C++, for tests on processors without AMX (AVX-512 is still required). Slow.
#pragma once
#include "cpu/simd.h"

namespace mls::cpu::MLS_VARIANT {

// The operand of ldtilecfg. Only the one configuration that the kernel uses is emulated: eight tiles at full
// size.
struct AmxTileConfig {
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tile registers. Unlike hardware, they hold NaN after configuration, so that reading a tile before
// writing it is detected.
struct alignas(64) EmulatedTile {
  uint32_t words[16][16];
};
inline thread_local EmulatedTile emulated_tiles[8];

MLS_INLINE void tile_configure(const AmxTileConfig&) {
  std::memset(emulated_tiles, 0xff, sizeof emulated_tiles);
}
MLS_INLINE void tile_release() {}

template <int kTile>
inline void tile_zero() {
  std::memset(&emulated_tiles[kTile], 0, sizeof(EmulatedTile));
}
template <int kTile>
inline void tile_load(const void* data, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(emulated_tiles[kTile].words[row], static_cast<const char*>(data) + row * row_bytes, 64);
}
template <int kTile>
inline void tile_load_streamed(const void* data, int64_t row_bytes) {
  tile_load<kTile>(data, row_bytes);
}
template <int kTile>
inline void tile_store(void* data, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(static_cast<char*>(data) + row * row_bytes, emulated_tiles[kTile].words[row], 64);
}

// The two bf16 values of each word, widened to fp32.
MLS_INLINE Vec lower_bf16(IntVec words) {
  return reinterpret_cast<Vec>(words << 16);
}
MLS_INLINE Vec upper_bf16(IntVec words) {
  constexpr int32_t kUpperHalf = static_cast<int32_t>(0xffff0000);
  return reinterpret_cast<Vec>(words & kUpperHalf);
}

// C += A B, with separate sums for the two values of a word, as tdpbf16ps is specified.
template <int kC, int kA, int kB>
inline void tile_dot() {
  const auto load_row = [](int tile, int row) {
    return load_int(reinterpret_cast<const int32_t*>(emulated_tiles[tile].words[row]));
  };
  for (int m = 0; m < 16; ++m) {
    Vec lower{}, upper{};
    for (int k = 0; k < 16; ++k) {
      const IntVec a = splat_int(static_cast<int32_t>(emulated_tiles[kA].words[m][k])), b = load_row(kB, k);
      lower += lower_bf16(a) * lower_bf16(b);
      upper += upper_bf16(a) * upper_bf16(b);
    }
    float* const c = reinterpret_cast<float*>(emulated_tiles[kC].words[m]);
    store(c, load(c) + (lower + upper));
  }
}

}  // namespace mls::cpu::MLS_VARIANT
