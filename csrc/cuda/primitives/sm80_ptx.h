// Compute capability 8.0 in PTX, one function per instruction. The PTX ISA documents each under its name.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define MLS_DEVICE __device__ __forceinline__
#define MLS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MLS_UNROLL _Pragma("unroll")
#define MLS_UNROLL_2 _Pragma("unroll 2")
#define MLS_NO_UNROLL _Pragma("unroll 1")
// Dynamic shared memory; Hopper's 128-byte swizzle needs the alignment.
#define MLS_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

namespace mls::cuda {

struct BFloat16 {};
struct Float16 {};

using Dim3 = dim3;

MLS_DEVICE Dim3 thread_index() {
  return threadIdx;
}

MLS_DEVICE Dim3 block_index() {
  return blockIdx;
}

MLS_DEVICE void sync_threads() {
  __syncthreads();
}

MLS_DEVICE void sync_warp() {
  __syncwarp();
}

template <class T>
MLS_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Whether the condition holds in some lane of the warp. The result is the same in all lanes, and ptxas knows
// that.
MLS_DEVICE bool any_lane(bool condition) {
  return __any_sync(0xffffffffu, condition);
}

MLS_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}

MLS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MLS_DEVICE float log2_approx(float x) {
  return __log2f(x);
}

// Relative error 2^-22; 0 for divisors above 2^126.
MLS_DEVICE float divide_approx(float x, float y) {
  return __fdividef(x, y);
}

MLS_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two numbers rounded to nearest even, with `low` in the lower half.
template <class Element>
MLS_DEVICE uint32_t pack(float low, float high);

template <>
MLS_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
MLS_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The lower and the upper of two packed 16-bit numbers, converted to fp32.
template <class Element>
MLS_DEVICE float unpack_low(uint32_t pair);
template <class Element>
MLS_DEVICE float unpack_high(uint32_t pair);

template <>
MLS_DEVICE float unpack_low<BFloat16>(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

template <>
MLS_DEVICE float unpack_high<BFloat16>(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

template <>
MLS_DEVICE float unpack_low<Float16>(uint32_t pair) {
  float x;
  asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;}" : "=f"(x) : "r"(pair));
  return x;
}

template <>
MLS_DEVICE float unpack_high<Float16>(uint32_t pair) {
  return unpack_low<Float16>(pair >> 16);
}

// Loads four 8 x 8 matrices. Lane i passes the address of row i % 8 of matrix i / 8, 16 bytes.
MLS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

MLS_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8, fp32) += a (16 x 16) b (16 x 8)
template <class Element>
MLS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
MLS_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
MLS_DEVICE void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies 16 bytes from global to shared memory, or writes zeros if not `valid` (the source is then not read).
MLS_DEVICE void copy16_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

MLS_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's copy groups are in flight.
template <int kPending>
MLS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Stores four bytes per lane. Called by the whole warp.
MLS_DEVICE void store_shared(void* shared, uint32_t value) {
  *static_cast<uint32_t*>(shared) = value;
}

MLS_DEVICE void atomic_add(float* target, float value) {
  atomicAdd(target, value);
}

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Launches a kernel on a stream. Returns null, or CUDA's error message.
template <class Kernel, class Params>
const char* launch(Kernel kernel, Dim3 blocks, int threads, int shared_bytes, void* stream,
                   const Params& params) {
  cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace mls::cuda
