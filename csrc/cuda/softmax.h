// Online softmax over accumulator fragments, in base 2 (FlashAttention; DistFlashAttn, Algorithm 3).
#pragma once
#include "attention_params.h"
#include "cuda/key_interval.h"
#include "cuda/softcap.h"
#include "cuda/tile.h"

namespace mls::cuda {

// Statistics of the two rows that a thread holds in each 16-row tile. `sum` covers only the columns of this
// thread until finish().
struct RowStatistics {
  float max[2] = {-infinity(), -infinity()};  // of scores before their scale
  float sum[2] = {0.0f, 0.0f};
};

// Masks the scores of 16 queries from first_query on: -inf for keys that a query does not see.
template <int kTiles>
MLS_DEVICE void mask_scores(float (&scores)[kTiles][4], const Visibility& visibility, int first_query,
                            int first_key) {
  MLS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const KeyInterval seen = visibility.keys_of(first_query + fragment_row(2 * half));
    MLS_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      MLS_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e)
        if (!seen.contains(first_key + fragment_column(j, e))) scores[j][e] = -infinity();
    }
  }
}

template <int kTiles>
MLS_DEVICE void scale_row(float (&x)[kTiles][4], int row, float factor) {
  MLS_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    x[j][2 * row] *= factor;
    x[j][2 * row + 1] *= factor;
  }
}

// Reduction over the four lanes that share a row.
MLS_DEVICE float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

MLS_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Turns scores into unnormalised probabilities. rescale[r] is the factor for earlier sums of row r.
template <int kTiles>
MLS_DEVICE void online_softmax(float (&scores)[kTiles][4], RowStatistics& rows, float (&rescale)[2],
                               float scale_log2) {
  MLS_UNROLL
  for (int r = 0; r < 2; ++r) {
    float max = rows.max[r];
    MLS_UNROLL
    for (int j = 0; j < kTiles; ++j) max = fmaxf(max, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    max = row_max(max);
    const float shift = max == -infinity() ? 0.0f : max * scale_log2;  // a row that has seen no key
    rescale[r] = exp2_approx(rows.max[r] * scale_log2 - shift);
    float sum = 0.0f;
    MLS_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      MLS_UNROLL
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        scores[j][e] = exp2_approx(scores[j][e] * scale_log2 - shift);
        sum += scores[j][e];
      }
    }
    rows.sum[r] = rows.sum[r] * rescale[r] + sum;
    rows.max[r] = max;
  }
}

// How a finished row is merged with the stored one: out = new_weight * row + old_weight * stored.
struct RowMerge {
  float new_weight, old_weight, lse;
};

// `old_lse` is -inf if there is nothing to merge with.
MLS_DEVICE RowMerge merge_row(float max, float sum, float old_lse, float scale_log2) {
  if (!(sum != 0.0f)) return {0.0f, 1.0f, old_lse};  // saw no key; NaN propagates
  const float lse = (max * scale_log2 + log2_approx(sum)) * kLn2;
  if (old_lse == -infinity()) return {1.0f / sum, 0.0f, lse};
  const float top = fmaxf(old_lse, lse);
  const float old_part = exp2_approx((old_lse - top) * kLog2e), new_part = exp2_approx((lse - top) * kLog2e);
  const float both = old_part + new_part;
  return {new_part / (both * sum), old_part / both, top + log2_approx(both) * kLn2};
}

// The result rows of one head of one sequence: `out` in fp32, or `rounded_out`; the other is null.
struct OutputRows {
  float* out;
  uint16_t* rounded_out;
  float* lse;
  int64_t out_stride, lse_stride;
  int num_queries;
  bool accumulate;
  float scale_log2;

  MLS_DEVICE OutputRows(const ForwardParams& params, int batch, int head, float scale_log2)
      : out(rows_at(params.out, batch, head)),
        rounded_out(rows_at(params.rounded_out, batch, head)),
        lse(params.lse.data + batch * params.lse.batch_stride + head * params.lse.head_stride),
        out_stride(out != nullptr ? params.out.token_stride : params.rounded_out.token_stride),
        lse_stride(params.lse.query_stride),
        num_queries(static_cast<int>(params.shape.num_queries)),
        accumulate(params.accumulate),
        scale_log2(scale_log2) {}
};

// Writes row `half` of a fragment to row `query`, or merges it with the stored row. Called by a whole warp.
template <class Element, int kTiles>
MLS_DEVICE void store_row(const OutputRows& target, const float (&out)[kTiles][4], const RowStatistics& rows,
                          int half, int query) {
  const float sum = row_sum(rows.sum[half]);
  const bool inside = query < target.num_queries;
  float* lse = target.lse + query * target.lse_stride;
  const float old_lse = inside && target.accumulate ? *lse : -infinity();
  sync_warp();  // four lanes read old_lse before one of them overwrites it
  if (!inside) return;
  const RowMerge merge = merge_row(rows.max[half], sum, old_lse, target.scale_log2);
  const bool keep = old_lse != -infinity();
  const int64_t row = query * target.out_stride;
  MLS_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    FloatPair value{out[j][2 * half] * merge.new_weight, out[j][2 * half + 1] * merge.new_weight};
    if (target.rounded_out != nullptr) {  // final, so there is nothing to merge with
      store_pair<Element>(target.rounded_out + row + fragment_column(j, 0), value);
      continue;
    }
    auto* pair = reinterpret_cast<FloatPair*>(target.out + row + fragment_column(j, 0));
    if (keep) {
      const FloatPair old = *pair;
      value = {value.x + old.x * merge.old_weight, value.y + old.y * merge.old_weight};
    }
    *pair = value;
  }
  if ((lane_id() & 3) == 0) *lse = merge.lse;
}

}  // namespace mls::cuda
