// Emulation of the primitives in primitives/sm80_ptx.h, with the same names and semantics.
#pragma once
#include <cmath>
#include <cstring>
#include <string>

#include "cuda/emulation/machine.h"

#define MLS_DEVICE inline __attribute__((always_inline))
#define MLS_KERNEL(threads, blocks) void
#define MLS_UNROLL
#define MLS_UNROLL_2
#define MLS_NO_UNROLL
#define MLS_SHARED_MEMORY(name) unsigned char* const name = ::mls::emu::Block::current().shared()

namespace mls::cuda {

struct BFloat16 {
  static constexpr emu::Format kFormat = emu::Format::kBFloat16;
};
struct Float16 {
  static constexpr emu::Format kFormat = emu::Format::kFloat16;
};

using Dim3 = emu::Dim3;

MLS_DEVICE Dim3 thread_index() {
  return emu::Block::current().lane().index;
}

MLS_DEVICE Dim3 block_index() {
  return emu::Block::current().index();
}

MLS_DEVICE void sync_threads() {
  emu::Block& block = emu::Block::current();
  block.barrier(0, block.num_threads(), true);
}

MLS_DEVICE void sync_warp() {
  emu::Block::current().collective(emu::Operation::kSyncWarp);
}

template <class T>
inline T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4);
  emu::Block& block = emu::Block::current();
  std::memcpy(&block.lane().value, &value, 4);
  block.lane().lane_mask = lane_mask;
  block.collective(emu::Operation::kShuffle);
  std::memcpy(&value, &block.lane().value, 4);
  return value;
}

inline bool any_lane(bool condition) {
  int any = condition;
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) any |= shuffle_xor(any, lane_mask);
  return any != 0;
}

MLS_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

MLS_DEVICE float exp2_approx(float x) {
  return std::exp2(x);
}

MLS_DEVICE float log2_approx(float x) {
  return std::log2(x);
}

MLS_DEVICE float divide_approx(float x, float y) {
  return x / y;
}

template <class Element>
inline uint32_t pack(float low, float high) {
  return emu::from_float(Element::kFormat, low) |
         static_cast<uint32_t>(emu::from_float(Element::kFormat, high)) << 16;
}

template <class Element>
inline float unpack_low(uint32_t pair) {
  return emu::to_float(Element::kFormat, static_cast<uint16_t>(pair));
}

template <class Element>
inline float unpack_high(uint32_t pair) {
  return emu::to_float(Element::kFormat, static_cast<uint16_t>(pair >> 16));
}

inline void emulate_ldmatrix(uint32_t (&r)[4], const void* row, emu::Operation operation) {
  emu::Block& block = emu::Block::current();
  block.lane().address = row;
  block.lane().registers = r;
  block.collective(operation);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulate_ldmatrix(r, row, emu::Operation::kLdmatrix);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulate_ldmatrix(r, row, emu::Operation::kLdmatrixTransposed);
}

template <class Element>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emu::Block& block = emu::Block::current();
  emu::Lane& lane = block.lane();
  lane.accumulator = d;
  lane.a = a;
  lane.b[0] = b0;
  lane.b[1] = b1;
  lane.format = Element::kFormat;
  block.collective(emu::Operation::kMma);
}

inline void copy16_async(void* shared, const void* global, bool valid) {
  emu::Block::current().copy_async(shared, global, valid);
}

inline void copy_async_commit() {
  emu::Block::current().copy_async_commit();
}

template <int kPending>
inline void copy_async_wait() {
  emu::Block::current().copy_async_wait(kPending);
}

inline void store_shared(void* shared, uint32_t value) {
  emu::Block& block = emu::Block::current();
  block.lane().address = shared;
  block.lane().value = value;
  block.collective(emu::Operation::kStoreShared);
}

inline void atomic_add(float* target, float value) {
  auto* bits = reinterpret_cast<uint32_t*>(target);
  uint32_t before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
  do {
    float sum;
    std::memcpy(&sum, &before, 4);
    sum += value;
    std::memcpy(&after, &sum, 4);
  } while (!__atomic_compare_exchange_n(bits, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

// A small number, so that small tests cover more work than multiprocessors as well as less.
inline int multiprocessors() {
  return 2;
}

template <class Kernel, class Params>
const char* launch(Kernel kernel, Dim3 blocks, int threads, int shared_bytes, void*, const Params& params) {
  static thread_local std::string failure;
  failure = emu::run_grid(blocks, threads, shared_bytes, [&] { kernel(params); });
  return failure.empty() ? nullptr : failure.c_str();
}

}  // namespace mls::cuda
