// Fused attention backward for compute capability 8.0 and later.
//
// attention_backward_sm80: a block owns a tile of keys of one key/value head and iterates over the tiles of
// queries that see them, for all query heads of the group, so dK and dV stay in registers and need no
// atomics. It computes S^T = K Q^T, so P^T and dS^T are used as A fragments directly, and only dS goes
// through shared memory, for dQ. dQ is accumulated in global memory with atomic additions, whose order is not
// fixed. For reproducible gradients attention_backward_dq_sm80 computes it instead, at 7 matrix products per
// tile instead of 5.
#pragma once
#include "cuda/gradients.h"
#include "cuda/softmax.h"

namespace mls::cuda {

// kKeyWarps x kColumnWarps warps: each owns 16 keys and 1 / kColumnWarps of the columns of dK and dV.
template <class Element_, int kHeadDim_, int kValueDim_, int kKeyWarps_, int kColumnWarps_, int kQueries_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kColumnWarps = kColumnWarps_;
  static constexpr int kKeys = 16 * kKeyWarps;
  static constexpr int kQueries = kQueries_;
  static constexpr int kThreads = kKeyWarps * kColumnWarps * kWarpSize;
  static constexpr int kStages = 2;
  static constexpr bool kCaps = false;  // see softcap.h
  using KeyTile = SharedTile<kKeys, kHeadDim>;
  using ValueTile = SharedTile<kKeys, kValueDim>;
  using QueryTile = SharedTile<kQueries, kHeadDim>;
  using GradTile = SharedTile<kQueries, kValueDim>;
  using ScoreTile = SharedTile<kKeys, kQueries>;
  static constexpr int kRowBytes = 16 * kQueries;  // of QueryRow
  static constexpr int kStageBytes = QueryTile::kBytes + GradTile::kBytes + kRowBytes;
  static constexpr int kSharedBytes =
      KeyTile::kBytes + ValueTile::kBytes + ScoreTile::kBytes + kStages * kStageBytes;
  static_assert(kThreads >= kQueries);
};

template <class T>
struct BackwardShared {
  unsigned char* base;
  MLS_DEVICE typename T::KeyTile keys() const { return {base}; }
  MLS_DEVICE typename T::ValueTile values() const { return {base + T::KeyTile::kBytes}; }
  MLS_DEVICE typename T::ScoreTile scores() const { return {values().base + T::ValueTile::kBytes}; }
  MLS_DEVICE unsigned char* stage(int i) const {
    return scores().base + T::ScoreTile::kBytes + i * T::kStageBytes;
  }
  MLS_DEVICE typename T::QueryTile queries(int i) const { return {stage(i)}; }
  MLS_DEVICE typename T::GradTile grads(int i) const { return {stage(i) + T::QueryTile::kBytes}; }
  MLS_DEVICE QueryRow* rows(int i) const {
    return reinterpret_cast<QueryRow*>(grads(i).base + T::GradTile::kBytes);
  }
};

// The part of dK and dV that a warp accumulates, and its position in the tile.
template <class T>
struct KeyGradients {
  float dk[1][T::kHeadDim / T::kColumnWarps / 8][4];
  float dv[1][T::kValueDim / T::kColumnWarps / 8][4];
  int first_key;  // first key of the warp, within the block's tile
  int column_warp;

  MLS_DEVICE KeyGradients()
      : first_key(warp_id() % T::kKeyWarps * 16), column_warp(warp_id() / T::kKeyWarps) {
    set_zero(dk[0]);
    set_zero(dv[0]);
  }
};

template <class T>
using TransposedScores = float[1][T::kQueries / 8][4];  // 16 keys x kQueries

// scores = rows of `a` times `b` transposed: K Q^T or V dO^T.
template <class T, class ATile, class BTile>
MLS_DEVICE void multiply_transposed(TransposedScores<T>& scores, const ATile& a_tile, const BTile& b_tile,
                                    int first_key) {
  set_zero(scores[0]);
  MLS_UNROLL_2  // full unrolling spills registers at D = 128
      for (int k = 0; k < ATile::kColumns; k += 16) {
    uint32_t a[1][4];
    load_a(a[0], a_tile, first_key, k);
    multiply<typename T::Element, true>(scores, a, b_tile, 0, k);
  }
}

// S^T -> P^T. `first_key` is an index into the whole tensor.
template <class T>
MLS_DEVICE void to_probabilities(TransposedScores<T>& scores, const QueryRow* rows, int first_key,
                                 bool masked, float scale_log2) {
  MLS_UNROLL
  for (int j = 0; j < T::kQueries / 8; ++j) {
    MLS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const QueryRow& row = rows[fragment_column(j, e)];
      const bool seen = !masked || row.seen.contains(first_key + fragment_row(e));
      scores[0][j][e] = seen ? exp2_approx(scores[0][j][e] * scale_log2 - row.lse_log2) : 0.0f;
    }
  }
}

// dP^T -> dS^T, without the softmax scale, which is applied to dQ and dK at the end.
template <class T>
MLS_DEVICE void to_score_gradients(TransposedScores<T>& grads, const TransposedScores<T>& probabilities,
                                   const QueryRow* rows, const ScoreMap<T::kCaps>& map) {
  MLS_UNROLL
  for (int j = 0; j < T::kQueries / 8; ++j) {
    MLS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const QueryRow& row = rows[fragment_column(j, e)];
      grads[0][j][e] = probabilities[0][j][e] * (grads[0][j][e] - row.delta);
      if constexpr (T::kCaps)
        grads[0][j][e] *= map.slope_of_probability(probabilities[0][j][e], row.lse_log2);
    }
  }
}

// dK or dV += the transposed scores times the warp's columns of Q or dO.
template <class T, int kTiles, class Tile>
MLS_DEVICE void accumulate_key_gradient(float (&grad)[1][kTiles][4], const TransposedScores<T>& scores,
                                        const Tile& tile, int column_warp) {
  MLS_UNROLL
  for (int step = 0; step < T::kQueries / 16; ++step) {
    uint32_t a[1][4];
    to_a<typename T::Element>(a[0], scores[0], step);
    multiply<typename T::Element, false>(grad, a, tile, column_warp * kTiles * 8, step * 16);
  }
}

template <class T>
MLS_DEVICE void store_score_gradients(const typename T::ScoreTile& tile, const TransposedScores<T>& grads,
                                      int first_key) {
  MLS_UNROLL
  for (int j = 0; j < T::kQueries / 8; ++j) {
    MLS_UNROLL
    for (int e = 0; e < 4; e += 2)
      store_shared(tile.pair(first_key + fragment_row(e), fragment_column(j, e)),
                   pack<typename T::Element>(grads[0][j][e], grads[0][j][e + 1]));
  }
}

// dQ += dS K for the block's queries. Each warp computes 16 queries and some pairs of column tiles.
template <class T>
MLS_DEVICE void add_query_gradient(const BackwardParams& params, const BackwardShared<T>& shared, int batch,
                                   int head, int first_query) {
  constexpr int kRowWarps = T::kQueries / 16;
  constexpr int kPairWarps = T::kThreads / kWarpSize / kRowWarps;
  const int row = warp_id() % kRowWarps * 16;
  uint32_t a[T::kKeys / 16][1][4];
  MLS_UNROLL
  for (int step = 0; step < T::kKeys / 16; ++step)
    load_a_transposed(a[step][0], shared.scores(), row, step * 16);
  for (int column = warp_id() / kRowWarps * 16; column < T::kHeadDim; column += kPairWarps * 16) {
    float sums[1][2][4];
    set_zero(sums[0]);
    MLS_UNROLL
    for (int step = 0; step < T::kKeys / 16; ++step)
      multiply<typename T::Element, false>(sums, a[step], shared.keys(), column, step * 16);
    MLS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int query = first_query + row + fragment_row(e);
      if (query >= params.shape.num_queries) continue;
      float* target = gradient_row(params.dq, batch, head, query) + column;
      atomic_add(target + fragment_column(0, e), sums[0][0][e] * params.softmax_scale);
      atomic_add(target + fragment_column(1, e), sums[0][1][e] * params.softmax_scale);
    }
  }
}

// Processes one tile of queries: adds its contributions to all gradients.
template <class T>
MLS_DEVICE void backward_tile(KeyGradients<T>& gradients, const BackwardShared<T>& shared, int stage,
                              int first_key, bool masked, const ScoreMap<T::kCaps>& map) {
  const QueryRow* rows = shared.rows(stage);
  TransposedScores<T> probabilities, grads;
  multiply_transposed<T>(probabilities, shared.keys(), shared.queries(stage), gradients.first_key);
  map.apply(probabilities[0]);
  to_probabilities<T>(probabilities, rows, first_key + gradients.first_key, masked, map.scale_log2);
  accumulate_key_gradient<T>(gradients.dv, probabilities, shared.grads(stage), gradients.column_warp);
  multiply_transposed<T>(grads, shared.values(), shared.grads(stage), gradients.first_key);
  to_score_gradients<T>(grads, probabilities, rows, map);
  if (gradients.column_warp == 0) store_score_gradients<T>(shared.scores(), grads, gradients.first_key);
  accumulate_key_gradient<T>(gradients.dk, grads, shared.queries(stage), gradients.column_warp);
}

template <class T>
MLS_DEVICE void prefetch_queries(const BackwardParams& params, const QueryTiles<T::kQueries, T::kKeys>& tiles,
                                 const BackwardShared<T>& shared, int batch, int stage) {
  if (!tiles.done()) {
    const int num_queries = tiles.visibility.num_queries, thread = static_cast<int>(thread_index().x);
    load_tile<T::kThreads>(shared.queries(stage), rows_of(params.q, batch, tiles.head, num_queries),
                           tiles.first_query);
    load_tile<T::kThreads>(shared.grads(stage), rows_of(params.dout, batch, tiles.head, num_queries),
                           tiles.first_query);
    if (thread < T::kQueries)
      shared.rows(stage)[thread] =
          query_row(params, tiles.visibility, batch, tiles.head, tiles.first_query + thread);
  }
  copy_async_commit();
}

struct BackwardLaunch {
  BackwardParams params;
  bool with_dq;  // false: attention_backward_dq_sm80 computes dQ
};

// Blocks: (key tiles, key/value heads, batch).
template <class T>
MLS_KERNEL(T::kThreads, 1)
attention_backward_sm80(const BackwardLaunch arguments) {
  MLS_SHARED_MEMORY(memory);
  const BackwardParams& params = arguments.params;
  const BackwardShared<T> shared{memory};
  const Visibility visibility(params.shape, params.mask);
  const int first_key = static_cast<int>(block_index().x) * T::kKeys;
  const int kv_head = static_cast<int>(block_index().y), batch = static_cast<int>(block_index().z);
  const int group = static_cast<int>(params.shape.num_heads / params.shape.num_kv_heads);
  QueryTiles<T::kQueries, T::kKeys> tiles(visibility, first_key, kv_head * group, kv_head * group + group);
  const auto rows_of_gradient = [&](const TokenTensor<float>& sums, const TokenTensor<uint16_t>& rounded) {
    return GradientRows(sums, rounded, batch, kv_head, params.shape.num_keys, params.accumulate);
  };
  if (tiles.done()) {
    write_empty_rows<T::kKeys, T::kHeadDim, T::kThreads>(rows_of_gradient(params.dk, params.rounded_dk),
                                                         first_key);
    write_empty_rows<T::kKeys, T::kValueDim, T::kThreads>(rows_of_gradient(params.dv, params.rounded_dv),
                                                          first_key);
    return;
  }
  load_tile<T::kThreads>(shared.keys(), rows_of(params.k, batch, kv_head, visibility.num_keys), first_key);
  load_tile<T::kThreads>(shared.values(), rows_of(params.v, batch, kv_head, visibility.num_keys), first_key);
  prefetch_queries<T>(params, tiles, shared, batch, 0);
  KeyGradients<T> gradients;
  for (int stage = 0; !tiles.done(); stage ^= 1) {
    const int head = tiles.head, first_query = tiles.first_query;
    const bool masked = tiles.masked;
    tiles.advance();
    prefetch_queries<T>(params, tiles, shared, batch, stage ^ 1);
    copy_async_wait<1>();
    sync_threads();
    backward_tile<T>(gradients, shared, stage, first_key, masked, ScoreMap<T::kCaps>(params));
    sync_threads();  // dS is complete, and this stage may be refilled
    if (arguments.with_dq) add_query_gradient<T>(params, shared, batch, head, first_query);
  }
  copy_async_wait<0>();
  write_rows<typename T::Element>(
      rows_of_gradient(params.dk, params.rounded_dk), gradients.dk[0], first_key + gradients.first_key,
      gradients.column_warp * (T::kHeadDim / T::kColumnWarps), params.softmax_scale);
  write_rows<typename T::Element>(rows_of_gradient(params.dv, params.rounded_dv), gradients.dv[0],
                                  first_key + gradients.first_key,
                                  gradients.column_warp * (T::kValueDim / T::kColumnWarps), 1.0f);
}

}  // namespace mls::cuda
