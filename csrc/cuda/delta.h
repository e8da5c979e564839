// delta, the sums of out * dout over the value dim, which backward takes as an input. Reads both tensors
// once.
#pragma once
#include "attention_params.h"
#include "cuda/tile.h"

namespace mls::cuda {

constexpr int kDeltaThreads = 256;
constexpr int kDeltaElements = 8;  // per thread: 16 bytes of dout

struct Float32 {};  // a type tag, like BFloat16 and Float16

template <class Element>
constexpr int kElementBytes = 2;
template <>
constexpr int kElementBytes<Float32> = 4;

struct DeltaLaunch {
  DeltaParams params;
  int lanes;  // threads per row: a power of two, at most a warp
};

// Eight consecutive numbers, converted to fp32.
template <class Element>
MLS_DEVICE void load_eight(float (&values)[kDeltaElements], const TokenTensor<const void>& tensor,
                           int64_t offset) {
  const void* start = static_cast<const unsigned char*>(tensor.data) + offset * kElementBytes<Element>;
  if constexpr (kElementBytes<Element> == 4) {
    const auto* fours = static_cast<const FourFloats*>(start);
    MLS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const FourFloats four = fours[half];
      MLS_UNROLL
      for (int i = 0; i < 4; ++i) values[4 * half + i] = four.values[i];
    }
  } else {
    const FourWords packed = *static_cast<const FourWords*>(start);
    MLS_UNROLL
    for (int i = 0; i < kDeltaElements / 2; ++i) {
      values[2 * i] = unpack_low<Element>(packed.words[i]);
      values[2 * i + 1] = unpack_high<Element>(packed.words[i]);
    }
  }
}

// Blocks: groups of rows in the order (token, sequence, head), which is the memory order of Megatron's
// tensors.
template <class Out, class Grad>
MLS_KERNEL(kDeltaThreads, 1)
attention_delta(const DeltaLaunch launch) {
  const DeltaParams& params = launch.params;
  const auto thread = static_cast<uint32_t>(thread_index().x), lanes = static_cast<uint32_t>(launch.lanes);
  const uint32_t row = block_index().x * (kDeltaThreads / lanes) + thread / lanes,
                 column = thread % lanes * kDeltaElements;
  const auto num_heads = static_cast<uint32_t>(params.num_heads),
             batch_size = static_cast<uint32_t>(params.batch);
  const uint32_t head = row % num_heads, batch = row / num_heads % batch_size,
                 token = row / num_heads / batch_size;
  const bool inside = token < params.num_queries;
  float sum = 0.0f;
  if (inside && column < params.value_dim) {
    float out[kDeltaElements], grad[kDeltaElements];
    const auto offset = [&](const TokenTensor<const void>& t) {
      return token * t.token_stride + batch * t.batch_stride + head * t.head_stride + column;
    };
    load_eight<Out>(out, params.out, offset(params.out));
    load_eight<Grad>(grad, params.dout, offset(params.dout));
    MLS_UNROLL
    for (int i = 0; i < kDeltaElements; ++i) sum += out[i] * grad[i];
  }
  for (int mask = launch.lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (inside && column == 0)
    params.delta.data[batch * params.delta.batch_stride + head * params.delta.head_stride +
                      token * params.delta.query_stride] = sum;
}

constexpr const char* kDeltaShape =
    "delta takes value dims that are multiples of 8 up to 256, and fewer than 2^31 rows";
constexpr const char* kDeltaTypes =
    "delta takes dout in bfloat16 or float16, and out in the same type or float32";

template <class Out, class Grad>
const char* launch_delta(const DeltaParams& params, void* stream) {
  DeltaLaunch arguments{params, 1};
  while (arguments.lanes * kDeltaElements < params.value_dim) arguments.lanes *= 2;
  const int64_t rows = params.num_queries * params.batch * params.num_heads,
                rows_per_block = kDeltaThreads / arguments.lanes;
  if (params.value_dim % kDeltaElements != 0 || arguments.lanes > kWarpSize || rows >= int64_t{1} << 31)
    return kDeltaShape;
  if (rows == 0) return nullptr;
  const Dim3 blocks(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
  return launch(&attention_delta<Out, Grad>, blocks, kDeltaThreads, 0, stream, arguments);
}

// Returns null, or an error message. Both tensors must be 16-byte aligned.
inline const char* run_delta(const DeltaParams& params, void* stream) {
  const ElementType out = params.out_type, grad = params.dout_type;
  if (grad == ElementType::kBFloat16 && out == grad) return launch_delta<BFloat16, BFloat16>(params, stream);
  if (grad == ElementType::kFloat16 && out == grad) return launch_delta<Float16, Float16>(params, stream);
  if (grad == ElementType::kBFloat16 && out == ElementType::kFloat32)
    return launch_delta<Float32, BFloat16>(params, stream);
  if (grad == ElementType::kFloat16 && out == ElementType::kFloat32)
    return launch_delta<Float32, Float16>(params, stream);
  return kDeltaTypes;
}

}  // namespace mls::cuda
