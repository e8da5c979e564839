// Argument checks that every call must pass before a kernel is chosen.
#pragma once
#include <initializer_list>

#include "attention_params.h"
#include "cuda/run.h"

namespace mls::cuda {

inline bool aligned(const void* pointer, std::initializer_list<int64_t> strides, int64_t bytes,
                    int64_t element_bytes) {
  bool every = reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  for (int64_t stride : strides) every = every && stride * element_bytes % bytes == 0;
  return every;
}

// Kernels load inputs 16 bytes at a time and store results two elements at a time.
inline bool aligned_input(const TokenTensor<const void>& t, int64_t element_bytes = 2) {
  return aligned(t.data, {t.token_stride, t.batch_stride, t.head_stride}, 16, element_bytes);
}

template <class T>
bool aligned_result(const TokenTensor<T>& t) {
  return aligned(t.data, {t.token_stride, t.batch_stride, t.head_stride}, 2 * sizeof(T), sizeof(T));
}

constexpr const char* kTooLong = "Sq + Sk must be below 2^30: the CUDA kernels count tokens in 32 bits";
constexpr const char* kInputAlignment =
    "q, k, v, dout and the out of delta must be 16-byte aligned, with strides that are multiples of 16 bytes";
constexpr const char* kResultAlignment =
    "out, dq, dk and dv must start at a multiple of 2 elements, with strides that are multiples of 2 "
    "elements";
constexpr const char* kHeadParts =
    "head_parts must divide the query heads of a key/value head, and be 1 for deterministic gradients";
constexpr const char* kAtomicResult =
    "results that blocks add to atomically must be fp32: dq unless deterministic, dk and dv with several "
    "head parts";
constexpr const char* kTooManyHeads = "B and H must be at most 65535: they are dimensions of the launch grid";

inline const char* check_shape(const AttentionShape& shape) {
  if (shape.num_queries + shape.num_keys >= 1 << 30) return kTooLong;
  return shape.batch > 65535 || shape.num_heads > 65535 ? kTooManyHeads : nullptr;
}

inline const char* check_options(const BackwardParams& params, const BackwardOptions& options) {
  const int parts = options.head_parts;
  if (parts < 1 || params.shape.heads_per_group() % parts != 0 || (options.deterministic && parts > 1))
    return kHeadParts;
  const bool adds_keys = parts > 1, rounds_keys = params.dk.data == nullptr || params.dv.data == nullptr;
  const bool adds_queries = !options.deterministic, rounds_queries = params.dq.data == nullptr;
  return (adds_keys && rounds_keys) || (adds_queries && rounds_queries) ? kAtomicResult : nullptr;
}

inline bool no_output(const AttentionShape& shape) {
  return shape.num_queries == 0 || shape.batch == 0;
}

inline bool no_gradients(const AttentionShape& shape) {
  return no_output(shape) || shape.num_keys == 0;
}

}  // namespace mls::cuda
