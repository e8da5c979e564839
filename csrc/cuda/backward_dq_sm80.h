// dQ alone, bitwise reproducible: each block owns a tile of queries and iterates over the keys that they see
// in a fixed order.
#pragma once
#include "cuda/backward_sm80.h"

namespace mls::cuda {

template <class Element_, int kHeadDim_, int kValueDim_, int kWarps, int kKeys_>
struct QueryGradientTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kKeys = kKeys_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStages = 2;
  static constexpr bool kCaps = false;  // see softcap.h
  using QueryTile = SharedTile<kQueries, kHeadDim>;
  using GradTile = SharedTile<kQueries, kValueDim>;
  using KeyTile = SharedTile<kKeys, kHeadDim>;
  using ValueTile = SharedTile<kKeys, kValueDim>;
  static constexpr int kSharedBytes =
      QueryTile::kBytes + GradTile::kBytes + kStages * (KeyTile::kBytes + ValueTile::kBytes);
};

template <class T>
struct QueryGradientShared {
  unsigned char* base;
  MLS_DEVICE typename T::QueryTile queries() const { return {base}; }
  MLS_DEVICE typename T::GradTile grads() const { return {base + T::QueryTile::kBytes}; }
  MLS_DEVICE typename T::KeyTile keys(int stage) const {
    return {grads().base + T::GradTile::kBytes + stage * (T::KeyTile::kBytes + T::ValueTile::kBytes)};
  }
  MLS_DEVICE typename T::ValueTile values(int stage) const { return {keys(stage).base + T::KeyTile::kBytes}; }
};

// scores = 16 rows of `a` times `b` transposed: Q K^T or dO V^T.
template <class T, class ATile, class BTile>
MLS_DEVICE void multiply_rows(float (&scores)[1][T::kKeys / 8][4], const ATile& a_tile, const BTile& b_tile) {
  set_zero(scores[0]);
  MLS_UNROLL
  for (int k = 0; k < ATile::kColumns; k += 16) {
    uint32_t a[1][4];
    load_a(a[0], a_tile, warp_id() * 16, k);
    multiply<typename T::Element, true>(scores, a, b_tile, 0, k);
  }
}

template <class T>
MLS_DEVICE void query_gradient_tile(float (&dq)[1][T::kHeadDim / 8][4], const QueryGradientShared<T>& shared,
                                    int stage, const QueryRow (&rows)[2], int first_key,
                                    const ScoreMap<T::kCaps>& map) {
  float scores[1][T::kKeys / 8][4], grads[1][T::kKeys / 8][4];
  multiply_rows<T>(scores, shared.queries(), shared.keys(stage));
  map.apply(scores[0]);
  multiply_rows<T>(grads, shared.grads(), shared.values(stage));
  MLS_UNROLL
  for (int j = 0; j < T::kKeys / 8; ++j) {
    MLS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const QueryRow& row = rows[e >> 1];
      const bool seen = row.seen.contains(first_key + fragment_column(j, e));
      const float probability = seen ? exp2_approx(scores[0][j][e] * map.scale_log2 - row.lse_log2) : 0.0f;
      grads[0][j][e] = probability * (grads[0][j][e] - row.delta);
      if constexpr (T::kCaps) grads[0][j][e] *= map.slope(scores[0][j][e]);
    }
  }
  MLS_UNROLL
  for (int step = 0; step < T::kKeys / 16; ++step) {
    uint32_t a[1][4];
    to_a<typename T::Element>(a[0], grads[0], step);
    multiply<typename T::Element, false>(dq, a, shared.keys(stage), 0, step * 16);
  }
}

template <class T>
MLS_DEVICE void prefetch_keys(const BackwardParams& params, const QueryGradientShared<T>& shared, int batch,
                              int kv_head, int first_key, int stage) {
  const int num_keys = static_cast<int>(params.shape.num_keys);
  load_tile<T::kThreads>(shared.keys(stage), rows_of(params.k, batch, kv_head, num_keys), first_key);
  load_tile<T::kThreads>(shared.values(stage), rows_of(params.v, batch, kv_head, num_keys), first_key);
}

MLS_DEVICE GradientRows query_gradient_rows(const BackwardParams& params, int batch, int head) {
  return {params.dq, params.rounded_dq, batch, head, params.shape.num_queries, params.accumulate};
}

// Blocks: (query tiles, heads, batch).
template <class T>
MLS_KERNEL(T::kThreads, 1)
attention_backward_dq_sm80(const BackwardParams params) {
  MLS_SHARED_MEMORY(memory);
  const QueryGradientShared<T> shared{memory};
  const Visibility visibility(params.shape, params.mask);
  const int num_tiles = (visibility.num_queries + T::kQueries - 1) / T::kQueries;
  const int first_query = (num_tiles - 1 - static_cast<int>(block_index().x)) * T::kQueries;
  const int head = static_cast<int>(block_index().y), batch = static_cast<int>(block_index().z);
  const int kv_head = head / static_cast<int>(params.shape.num_heads / params.shape.num_kv_heads);
  const KeyBounds bounds = bounds_of_queries<T::kQueries>(visibility, first_query);
  if (bounds.any_first >= bounds.any_end)
    return write_empty_rows<T::kQueries, T::kHeadDim, T::kThreads>(query_gradient_rows(params, batch, head),
                                                                   first_query);
  const int first_tile = bounds.any_first / T::kKeys, end_tile = (bounds.any_end + T::kKeys - 1) / T::kKeys;
  load_tile<T::kThreads>(shared.queries(), rows_of(params.q, batch, head, visibility.num_queries),
                         first_query);
  load_tile<T::kThreads>(shared.grads(), rows_of(params.dout, batch, head, visibility.num_queries),
                         first_query);
  prefetch_keys<T>(params, shared, batch, kv_head, first_tile * T::kKeys, 0);
  copy_async_commit();
  const int warp_query = first_query + warp_id() * 16;
  const QueryRow rows[2] = {query_row(params, visibility, batch, head, warp_query + fragment_row(0)),
                            query_row(params, visibility, batch, head, warp_query + fragment_row(2))};
  float dq[1][T::kHeadDim / 8][4];
  set_zero(dq[0]);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int stage = (tile - first_tile) % T::kStages;
    if (tile + 1 < end_tile)
      prefetch_keys<T>(params, shared, batch, kv_head, (tile + 1) * T::kKeys, stage ^ 1);
    copy_async_commit();
    copy_async_wait<1>();
    sync_threads();
    query_gradient_tile<T>(dq, shared, stage, rows, tile * T::kKeys, ScoreMap<T::kCaps>(params));
    sync_threads();
  }
  copy_async_wait<0>();
  // Created again here: kept live across the loop, it would spill registers at the largest head dim.
  write_rows<typename T::Element>(query_gradient_rows(params, batch, head), dq[0], warp_query, 0,
                                  params.softmax_scale);
}

template <class T, class Q>
const char* launch_backward_sm80(const BackwardParams& params, const BackwardOptions& options, void* stream) {
  const auto& shape = params.shape;
  const Dim3 key_blocks((shape.num_keys + T::kKeys - 1) / T::kKeys, shape.num_kv_heads, shape.batch);
  const char* failure = launch(&attention_backward_sm80<T>, key_blocks, T::kThreads, T::kSharedBytes, stream,
                               BackwardLaunch{params, !options.deterministic});
  if (failure != nullptr || !options.deterministic) return failure;
  const Dim3 query_blocks((shape.num_queries + Q::kQueries - 1) / Q::kQueries, shape.num_heads, shape.batch);
  return launch(&attention_backward_dq_sm80<Q>, query_blocks, Q::kThreads, Q::kSharedBytes, stream, params);
}

}  // namespace mls::cuda
