// Vectors of floats, written with the compiler's vector extensions rather than intrinsics, so that the same
// source compiles to AVX-512, AVX2, SSE or NEON. The vector width is our own macro because g++ does not
// update __AVX512F__ after a target pragma.
#pragma once
#if !defined(MLS_VEC_BYTES) || !defined(MLS_VARIANT)
#error "include from a variant_*.cpp that defines MLS_VEC_BYTES and MLS_VARIANT"
#endif

#define MLS_INLINE __attribute__((always_inline)) inline

namespace mls::cpu::MLS_VARIANT {

constexpr int kLanes = MLS_VEC_BYTES / sizeof(float);

typedef float Vec __attribute__((vector_size(MLS_VEC_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(MLS_VEC_BYTES)));
typedef float UnalignedVec __attribute__((vector_size(MLS_VEC_BYTES), aligned(4), may_alias));
typedef int32_t UnalignedIntVec __attribute__((vector_size(MLS_VEC_BYTES), aligned(4), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(MLS_VEC_BYTES)));
typedef uint16_t HalfWordVec __attribute__((vector_size(MLS_VEC_BYTES / 2)));
typedef uint16_t UnalignedHalfWordVec __attribute__((vector_size(MLS_VEC_BYTES / 2), aligned(2), may_alias));

MLS_INLINE Vec splat(float x) {
  return x - Vec{};
}
MLS_INLINE IntVec splat_int(int32_t x) {
  return x - IntVec{};
}
MLS_INLINE Vec load(const float* p) {
  return *reinterpret_cast<const UnalignedVec*>(p);
}
MLS_INLINE void store(float* p, Vec x) {
  *reinterpret_cast<UnalignedVec*>(p) = x;
}
MLS_INLINE IntVec load_int(const int32_t* p) {
  return *reinterpret_cast<const UnalignedIntVec*>(p);
}
MLS_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
MLS_INLINE Vec select(IntVec keep, Vec a, Vec b) {
  return keep ? a : b;
}

MLS_INLINE HalfWordVec load_half_words(const uint16_t* p) {
  return *reinterpret_cast<const UnalignedHalfWordVec*>(p);
}

#if MLS_VEC_BYTES == 64
// With __builtin_convertvector g++ 12 widens both halves separately and joins them: four instructions instead
// of one. The unmasked intrinsic triggers a warning in g++ 12.
MLS_INLINE WordVec widen(HalfWordVec x) {
  constexpr __mmask16 kAll = 0xffff;
  return reinterpret_cast<WordVec>(_mm512_maskz_cvtepu16_epi32(kAll, reinterpret_cast<__m256i>(x)));
}
#else
MLS_INLINE WordVec widen(HalfWordVec x) {
  return __builtin_convertvector(x, WordVec);
}
#endif

// Element types: load widens to fp32, store rounds from fp32. A bf16 is the upper half of a float.
struct Float32 {
  using Storage = float;
  static MLS_INLINE Vec load(const float* p) { return MLS_VARIANT::load(p); }
  static MLS_INLINE void store(float* p, Vec x) { MLS_VARIANT::store(p, x); }
  static MLS_INLINE float scalar(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static MLS_INLINE Vec load(const uint16_t* p) {
    return reinterpret_cast<Vec>(widen(load_half_words(p)) << 16);
  }
  // Round to nearest, ties to even, as torch does. NaN is handled separately: rounding could make it
  // infinity.
  static MLS_INLINE void store(uint16_t* p, Vec x) {
    const WordVec bits = reinterpret_cast<WordVec>(x), odd = bits >> 16 & 1;
    const WordVec rounded = (bits + 0x7fff + odd) >> 16, nan = WordVec{} + 0x7fc0;
    *reinterpret_cast<UnalignedHalfWordVec*>(p) =
        __builtin_convertvector(x == x ? rounded : nan, HalfWordVec);
  }
  static MLS_INLINE float scalar(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// Lane j of the result is element kIndex[j] of the 2 * kLanes floats (a, b).
template <int... kIndex>
MLS_INLINE Vec shuffle(Vec a, Vec b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, IntVec{kIndex...});
#endif
}

constexpr int exchange_index(int lane, int distance, bool upper) {
  const bool second = (lane & distance) != 0;
  return upper ? (second ? kLanes + lane : lane + distance) : (second ? kLanes + lane - distance : lane);
}

template <int kDistance, bool kUpper, int... kLane>
MLS_INLINE Vec exchange(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return shuffle(a, b, std::integer_sequence<int, exchange_index(kLane, kDistance, kUpper)...>{});
}

// kLanes x kLanes transpose in registers: swap off-diagonal blocks of kDistance, then recurse with half of
// it.
template <int kDistance = kLanes / 2>
MLS_INLINE void transpose(Vec (&rows)[kLanes]) {
  using AllLanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kDistance) == 0) {
      const Vec a = rows[i], b = rows[i + kDistance];
      rows[i] = exchange<kDistance, false>(a, b, AllLanes{});
      rows[i + kDistance] = exchange<kDistance, true>(a, b, AllLanes{});
    }
  }
  if constexpr (kDistance > 1) transpose<kDistance / 2>(rows);
}

}  // namespace mls::cpu::MLS_VARIANT
