// Shared by the backward kernels: iterating over the queries that see a tile of keys, and writing gradients.
#pragma once
#include "cuda/key_interval.h"
#include "cuda/run.h"
#include "cuda/tile.h"

namespace mls::cuda {

// The log-sum-exp of a query in base 2. It is +inf for a query that sees no key, so that its probabilities
// are 0.
MLS_DEVICE float lse_log2_of(const BackwardParams& params, int batch, int head, int query) {
  if (query >= params.shape.num_queries) return infinity();
  const float lse = params.lse.data[batch * params.lse.batch_stride + head * params.lse.head_stride +
                                    query * params.lse.query_stride];
  return lse == -infinity() ? infinity() : lse * kLog2e;
}

MLS_DEVICE float delta_of(const BackwardParams& params, int batch, int head, int query) {
  if (query >= params.shape.num_queries) return 0.0f;
  return params.delta.data[batch * params.delta.batch_stride + head * params.delta.head_stride +
                           query * params.delta.query_stride];
}

// Per-query data that backward needs besides the vectors q and dO.
struct alignas(16) QueryRow {
  float lse_log2;
  float delta;
  KeyInterval seen;
};

MLS_DEVICE QueryRow query_row(const BackwardParams& params, const Visibility& visibility, int batch, int head,
                              int query) {
  return {lse_log2_of(params, batch, head, query), delta_of(params, batch, head, query),
          visibility.keys_of(query)};
}

// Iterates over the query tiles, of all heads of a group, that see some of the keys of a tile.
template <int kQueries, int kKeys>
struct QueryTiles {
  const Visibility& visibility;
  int first_key, end_key, end_head;
  QueryInterval rows;
  // The current tile; the iteration is done when head == end_head.
  int head, first_query;
  bool masked = false;

  MLS_DEVICE QueryTiles(const Visibility& visibility, int first_key, int first_head, int end_head)
      : visibility(visibility),
        first_key(first_key),
        end_key(smaller(first_key + kKeys, visibility.num_keys)),
        end_head(end_head),
        rows(queries_of_keys(visibility, first_key, end_key)),
        head(first_head) {
    rows.first = rows.first / kQueries * kQueries;
    first_query = rows.first - kQueries;
    if (rows.first < rows.end)
      advance();
    else
      head = end_head;
  }
  MLS_DEVICE bool done() const { return head == end_head; }
  MLS_DEVICE void advance() {
    while (head < end_head) {
      first_query += kQueries;
      if (first_query >= rows.end) {
        first_query = rows.first - kQueries;
        ++head;
        continue;
      }
      const KeyBounds bounds = bounds_of_queries<kQueries>(visibility, first_query);
      if (bounds.misses(first_key, end_key)) continue;
      // Keys beyond the end of the tensor count as masked: their scores are 0, and exp(0 - lse) may be
      // infinite.
      masked = !bounds.covers(first_key, first_key + kKeys);
      return;
    }
  }
};

// A row of a gradient that several blocks add to.
MLS_DEVICE float* gradient_row(const TokenTensor<float>& tensor, int batch, int head, int token) {
  return tensor.data + batch * tensor.batch_stride + head * tensor.head_stride + token * tensor.token_stride;
}

// The rows of a gradient for one head of one sequence: fp32 sums or, if `sums` is null, final results rounded
// to the inputs' type.
struct GradientRows {
  float* sums;
  uint16_t* rounded;
  int64_t stride;
  int num_rows;
  bool accumulate;  // add to the sums; otherwise they are uninitialised

  MLS_DEVICE GradientRows(const TokenTensor<float>& sums, const TokenTensor<uint16_t>& rounded, int batch,
                          int head, int64_t num_rows, bool accumulate)
      : sums(rows_at(sums, batch, head)),
        rounded(rows_at(rounded, batch, head)),
        stride(sums.data != nullptr ? sums.token_stride : rounded.token_stride),
        num_rows(static_cast<int>(num_rows)),
        accumulate(accumulate) {}
};

// Writes a warp's fragments, times `scale`, to rows first_row.. and columns first_column.. of a gradient.
template <class Element, int kTiles>
MLS_DEVICE void write_rows(const GradientRows& target, const float (&grad)[kTiles][4], int first_row,
                           int first_column, float scale) {
  MLS_UNROLL
  for (int e = 0; e < 4; e += 2) {
    const int row = first_row + fragment_row(e);
    if (row >= target.num_rows) continue;
    const int64_t start = row * target.stride + first_column;
    MLS_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      FloatPair value{grad[j][e] * scale, grad[j][e + 1] * scale};
      if (target.rounded != nullptr) {
        store_pair<Element>(target.rounded + start + fragment_column(j, 0), value);
        continue;
      }
      auto* pair = reinterpret_cast<FloatPair*>(target.sums + start + fragment_column(j, 0));
      if (target.accumulate) {
        const FloatPair old = *pair;
        value = {value.x + old.x, value.y + old.y};
      }
      *pair = value;
    }
  }
}

// Called by all threads of a block that found nothing to add to rows first_row.. of a gradient: zeroes them.
template <int kRows, int kColumns, int kThreads>
MLS_DEVICE void write_empty_rows(const GradientRows& target, int first_row) {
  if (target.accumulate) return;
  for (int i = static_cast<int>(thread_index().x); i < kRows * kColumns / 2; i += kThreads) {
    const int row = first_row + i / (kColumns / 2), column = i % (kColumns / 2) * 2;
    if (row >= target.num_rows) continue;
    const int64_t at = row * target.stride + column;
    if (target.rounded != nullptr)
      *reinterpret_cast<uint32_t*>(target.rounded + at) = 0;
    else
      *reinterpret_cast<FloatPair*>(target.sums + at) = {0.0f, 0.0f};
  }
}

}  // namespace mls::cuda
