// The parameters of one attention tile as plain structs: the interface between the bindings and the kernels
// (CPU and CUDA).
#pragma once
#include <cstdint>

namespace mls {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

struct AttentionShape {
  int64_t num_queries;   // Sq
  int64_t num_keys;      // Sk
  int64_t batch;         // B
  int64_t num_heads;     // H, query heads
  int64_t num_kv_heads;  // G, divides H
  int64_t head_dim;      // D, of q and k
  int64_t value_dim;     // Dv, of v and out

  int64_t heads_per_group() const { return num_heads / num_kv_heads; }
};

// A (tokens, batch, heads, dim) tensor whose last dimension is contiguous. Strides count elements.
template <typename T>
struct TokenTensor {
  T* data;
  int64_t token_stride;
  int64_t batch_stride;
  int64_t head_stride;
};

// A (batch, heads, queries) tensor with one number per row. Strides count elements.
template <typename T>
struct RowTensor {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t query_stride;
};

// Query i sees key j iff i + band_lo <= j <= i + band_hi and range_begin[i] <= j < range_end[i].
// The caller clamps the band to [-Sq - 1, Sk], so that sums with a query index cannot overflow.
struct KeyMask {
  int64_t band_lo;
  int64_t band_hi;
  const int32_t* range_begin;  // null: no ranges
  const int32_t* range_end;
};

struct ForwardParams {
  AttentionShape shape;
  ElementType element_type;
  TokenTensor<const void> q, k, v;
  TokenTensor<float> out;
  RowTensor<float> lse;
  KeyMask mask;
  float softmax_scale;
  float softcap;    // c in c * tanh(scaled score / c); 0: none
  bool accumulate;  // (out, lse) hold a partial result to merge with; otherwise they are uninitialised
  TokenTensor<uint16_t> rounded_out;  // final output in the inputs' type, if requested; out is then null
};

struct BackwardParams {
  AttentionShape shape;
  ElementType element_type;
  TokenTensor<const void> dout, q, k, v;
  RowTensor<const float> lse, delta;
  TokenTensor<float> dq, dk, dv;
  KeyMask mask;
  float softmax_scale;
  float softcap;    // as forward
  bool accumulate;  // add to dq, dk and dv; otherwise they are uninitialised (on CUDA see cuda/run.h)
  // Final gradients in the inputs' type. If one is given, its fp32 counterpart is null.
  TokenTensor<uint16_t> rounded_dq, rounded_dk, rounded_dv;
};

// delta, the sums of out * dout over Dv. Both tensors are (Sq, B, H, Dv) and may have different types.
struct DeltaParams {
  int64_t num_queries, batch, num_heads, value_dim;
  ElementType out_type, dout_type;
  TokenTensor<const void> out, dout;
  RowTensor<float> delta;  // overwritten
};

// Two normalised partial results over different keys; the second is merged into the first.
struct MergeParams {
  int64_t num_queries, batch, num_heads, value_dim;
  TokenTensor<float> out;
  RowTensor<float> lse;
  TokenTensor<const float> other_out;
  RowTensor<const float> other_lse;
};

}  // namespace mls
