// Compute capability 9.0a in PTX, one function per instruction. The PTX ISA documents each under its name.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "attention_params.h"
#include "cuda/primitives/wgmma_ptx.h"

#define MLS_GRID_CONSTANT __grid_constant__

namespace mls::cuda {

// False while nvcc compiles for another architecture; kernel bodies are then left out.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kCompilesSm90a = true;
#else
constexpr bool kCompilesSm90a = false;
#endif

// Whether the current device runs the sm_90a code of a kernel. The build may contain none, or the driver may
// be set to compile PTX instead (CUDA_FORCE_PTX_JIT), which has no kernel body.
template <class Kernel>
bool has_sm90a_code(Kernel kernel) {
  cudaFuncAttributes found;
  const cudaError_t status = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) cudaGetLastError();  // clears the error, so that later checks do not report it
  return status == cudaSuccess && found.ptxVersion >= 90;
}

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// ---- mbarriers ----

MLS_DEVICE void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Makes initialised barriers visible to TMA copies. The caller must synchronise the block afterwards.
MLS_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

MLS_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase also wait for this many bytes of TMA copies.
MLS_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity (0 the first time) has completed.
MLS_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- TMA copies and reductions ----

MLS_DEVICE void tensor_copy(void* shared, const TensorMap& map, Barrier* barrier, int column, int token,
                            int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3,%4,%5,%6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// Starts a TMA reduction that adds a tile of shared memory to a tensor in global memory. Elements outside the
// tensor are skipped. The reduction joins the open bulk group of the calling thread.
MLS_DEVICE void tensor_reduce_add(const TensorMap& map, const void* shared, int column, int token, int head,
                                  int batch) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::
          "l"(&map),
      "r"(shared_address(shared)), "r"(column), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

MLS_DEVICE void tensor_reduce_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's groups have read their shared memory. The additions are complete at the end of
// the kernel.
MLS_DEVICE void tensor_reduce_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Makes this thread's ordinary stores to shared memory visible to wgmma and TMA copies (the async proxy).
MLS_DEVICE void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The driver's function that creates tensor maps, found without linking to the driver; null if there is none.
inline void* find_tensor_map_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050  // CUDA 13 has only this function
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? entry : nullptr;
}

// Why the last tensor map requested by this thread could not be created.
inline std::string& tensor_map_refusal() {
  static thread_local std::string text;
  return text;
}

inline std::string describe_refusal(CUresult status, const void* data, const cuuint64_t (&dims)[4],
                                    const cuuint64_t (&stride_bytes)[3]) {
  std::string text = "the driver refused a tensor map with CUresult " + std::to_string(status) + " (sizes";
  for (cuuint64_t size : dims) text += " " + std::to_string(size);
  text += ", strides in bytes";
  for (cuuint64_t stride : stride_bytes) text += " " + std::to_string(stride);
  return text + ", address " + std::to_string(reinterpret_cast<uintptr_t>(data) % 128) + " modulo 128)";
}

// Creates a tensor map of a (tokens, batch, heads, dim) tensor with boxes of 128 bytes x `rows` tokens.
// Returns false if the driver refuses; tensor_map_refusal() then has the reason.
inline bool encode_tensor_map(TensorMap* map, const TokenTensor<const void>& tensor,
                              const int64_t (&sizes)[4], CUtensorMapDataType type, int element_bytes,
                              int rows) {
  static void* const encode = find_tensor_map_encoder();
  if (encode == nullptr) {
    tensor_map_refusal() = "the driver has no cuTensorMapEncodeTiled";
    return false;
  }
  const int64_t strides[3] = {tensor.token_stride, tensor.head_stride, tensor.batch_stride};
  cuuint64_t dims[4], stride_bytes[3];
  for (int i = 0; i < 4; ++i) dims[i] = sizes[i];
  // The stride of a dimension of size 1 is not used, and may be one that the driver refuses.
  for (int i = 0; i < 3; ++i) stride_bytes[i] = sizes[i + 1] == 1 ? 16 : strides[i] * element_bytes;
  const cuuint32_t steps[4] = {1, 1, 1, 1},
                   box[4] = {static_cast<cuuint32_t>(kSwizzleRowBytes / element_bytes),
                             static_cast<cuuint32_t>(rows), 1, 1};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, type, 4, const_cast<void*>(tensor.data), dims, stride_bytes, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    tensor_map_refusal() = describe_refusal(status, tensor.data, dims, stride_bytes);
  return status == CUDA_SUCCESS;
}

// The tensor map of a 16-bit input: boxes of 64 columns.
inline bool make_tensor_map(TensorMap* map, const TokenTensor<const void>& tensor, const int64_t (&sizes)[4],
                            ElementType type, int rows) {
  return encode_tensor_map(
      map, tensor, sizes,
      type == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      rows);
}

// The tensor map of an fp32 result, for TMA reductions: boxes of 32 columns.
inline bool make_tensor_map(TensorMap* map, const TokenTensor<float>& tensor, const int64_t (&sizes)[4],
                            int rows) {
  return encode_tensor_map(map, {tensor.data, tensor.token_stride, tensor.batch_stride, tensor.head_stride},
                           sizes, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, rows);
}

// ---- warps and registers ----

// Stores four 8 x 8 matrices to shared memory, the reverse of ldmatrix_x4: lane i passes the address of row i
// % 8 of matrix i / 8.
MLS_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Stores eight bytes per lane. Called by the whole warp.
MLS_DEVICE void store_shared_pair(void* shared, float x, float y) {
  *static_cast<float2*>(shared) = make_float2(x, y);
}

// Adds to two adjacent numbers in global memory. Each addition is atomic.
MLS_DEVICE void atomic_add_pair(float* target, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(target)),
               "f"(x), "f"(y)
               : "memory");
}

// Index of the warpgroup in the block. The shuffle makes ptxas treat it as warp-uniform, so that values
// derived from it need few registers.
MLS_DEVICE int warpgroup_id() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
}

// Waits until `threads` threads have arrived at named barrier `id` (1 to 15).
MLS_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at named barrier `id`, without waiting.
MLS_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
MLS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
MLS_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace mls::cuda
