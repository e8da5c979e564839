// Wrappers of the AMX instructions. The kernel uses AMX only through them.
//
// With MLS_EMULATE_AMX they are emulated, so that tests can run the same kernel source on processors without
// AMX.
#pragma once
#include "simd.h"

#if defined(MLS_EMULATE_AMX)
#include "emulation/amx_instructions.h"
#else

namespace mls::cpu::MLS_VARIANT {

// The operand of ldtilecfg: eight tiles.
struct alignas(64) AmxTileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

MLS_INLINE void tile_configure(const AmxTileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}
MLS_INLINE void tile_release() {
  asm volatile("tilerelease" : :);
}

// Inline assembly, because g++ 12's intrinsics do not tell the compiler that they read and write memory.
template <int kTile>
MLS_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
MLS_INLINE void tile_load(const void* data, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(row_bytes), "i"(kTile) : "memory");
}
// The same for data that is reused rarely: it does not displace other data from the L1 cache.
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

}  // namespace mls::cpu::MLS_VARIANT
#endif
