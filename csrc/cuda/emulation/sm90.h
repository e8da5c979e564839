// Emulation of the primitives in primitives/sm90_ptx.h and wgmma_ptx.h, with the same names and semantics.
#pragma once
#include "attention_params.h"
#include "cuda/emulation/hopper.h"
#include "cuda/emulation/sm80.h"

#define MLS_GRID_CONSTANT

namespace mls::cuda {

constexpr bool kCompilesSm90a = true;

template <class Kernel>
bool has_sm90a_code(Kernel) {
  return true;
}

using TensorMap = emu::TensorMap;
using Barrier = uint64_t;

inline emu::Hopper& hopper() {
  return emu::Block::current().hopper();
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emu::Block::current().shared());
}

inline void barrier_init(Barrier* barrier, int count) {
  hopper().barrier_init(barrier, count);
}

inline void barrier_init_fence() {}

inline void barrier_arrive(Barrier* barrier) {
  hopper().barrier_arrive(barrier, 0);
}

inline void barrier_expect(Barrier* barrier, int bytes) {
  hopper().barrier_arrive(barrier, bytes);
}

inline void barrier_wait(Barrier* barrier, int parity) {
  hopper().barrier_wait(barrier, parity);
}

inline void tensor_copy(void* shared, const TensorMap& map, Barrier* barrier, int column, int token, int head,
                        int batch) {
  hopper().tensor_copy(shared, map, barrier, {column, token, head, batch});
}

inline void tensor_reduce_add(const TensorMap& map, const void* shared, int column, int token, int head,
                              int batch) {
  hopper().tensor_reduce_add(map, shared, {column, token, head, batch});
}

inline void tensor_reduce_commit() {
  hopper().tensor_reduce_commit();
}

inline void tensor_reduce_wait_read() {
  hopper().tensor_reduce_wait_read();
}

inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  emu::Block& block = emu::Block::current();
  block.lane().address = row;
  block.lane().registers = const_cast<uint32_t*>(r);
  block.collective(emu::Operation::kStmatrix);
}

inline void store_shared_pair(void* shared, float x, float y) {
  emu::Block& block = emu::Block::current();
  block.lane().address = shared;
  block.lane().value = float_bits(x);
  block.lane().second_value = float_bits(y);
  block.collective(emu::Operation::kStorePair);
}

inline void atomic_add_pair(float* target, float x, float y) {
  atomic_add(target, x);
  atomic_add(target + 1, y);
}

inline void proxy_fence() {
  hopper().proxy_fence();
}

inline const char* tensor_map_refusal() {
  return "the emulated driver refuses tensor maps";
}

inline bool make_tensor_map(TensorMap* map, const TokenTensor<const void>& tensor, const int64_t (&sizes)[4],
                            ElementType, int rows) {
  *map = {static_cast<const unsigned char*>(tensor.data),
          {sizes[0], sizes[1], sizes[2], sizes[3]},
          {2, tensor.token_stride * 2, tensor.head_stride * 2, tensor.batch_stride * 2},
          rows};
  return !emu::options().refuses_tensor_maps;
}

inline bool make_tensor_map(TensorMap* map, const TokenTensor<float>& tensor, const int64_t (&sizes)[4],
                            int rows) {
  *map = {reinterpret_cast<const unsigned char*>(tensor.data),
          {sizes[0], sizes[1], sizes[2], sizes[3]},
          {4, tensor.token_stride * 4, tensor.head_stride * 4, tensor.batch_stride * 4},
          rows};
  return !emu::options().refuses_tensor_maps;
}

inline int warpgroup_id() {
  return emu::Block::current().thread() / 128;
}

inline void named_barrier_sync(int id, int threads) {
  emu::Block::current().barrier(id, threads, true);
}

inline void named_barrier_arrive(int id, int threads) {
  emu::Block::current().barrier(id, threads, false);
}

template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

template <int kRegisters>
inline void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void wgmma_fence() {
  hopper().wgmma_fence();
}

inline void wgmma_commit() {
  hopper().wgmma_commit();
}

template <int kPending>
inline void wgmma_wait() {
  hopper().wgmma_wait(kPending);
}

inline void keep_here(uint32_t&) {}

template <class Registers>
inline void hold(Registers&) {}

template <class Element, int kColumns>
struct Wgmma {
  template <bool kTransposeA, bool kTransposeB>
  static void from_shared(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b, int accumulate) {
    hopper().wgmma(d[0],
                   {kColumns, Element::kFormat, accumulate != 0, kTransposeA, kTransposeB, nullptr, a, b});
  }
  template <bool kTransposeB>
  static void from_registers(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b,
                             int accumulate) {
    hopper().wgmma(d[0], {kColumns, Element::kFormat, accumulate != 0, false, kTransposeB, a, 0, b});
  }
};

}  // namespace mls::cuda
