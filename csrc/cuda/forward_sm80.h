// Fused attention forward for compute capability 8.0 and later (FlashAttention-2's loop, with mma.sync).
//
// A block owns a tile of queries of one head and iterates over the tiles of keys that they see. Each warp
// owns 16 or 32 of the queries and keeps their scores, probabilities and output in registers.
#pragma once
#include "cuda/softmax.h"

namespace mls::cuda {

template <class Element_, int kHeadDim_, int kValueDim_, int kWarps, int kRowTiles_, int kKeys_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 queries per warp
  static constexpr int kWarpQueries = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpQueries;
  static constexpr int kKeys = kKeys_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStages = 2;
  static constexpr bool kCaps = false;  // see softcap.h
  // Short query rows stay in registers; longer ones are reloaded from shared memory for each tile of keys.
  static constexpr bool kHoldQueries = kHeadDim * kRowTiles <= 128;
  using QueryTile = SharedTile<kQueries, kHeadDim>;
  using KeyTile = SharedTile<kKeys, kHeadDim>;
  using ValueTile = SharedTile<kKeys, kValueDim>;
  static constexpr int kSharedBytes = QueryTile::kBytes + kStages * (KeyTile::kBytes + ValueTile::kBytes);
};

// Accumulators of a warp.
template <class T>
struct ForwardState {
  float out[T::kRowTiles][T::kValueDim / 8][4];
  RowStatistics rows[T::kRowTiles];

  MLS_DEVICE ForwardState() {
    MLS_UNROLL
    for (int r = 0; r < T::kRowTiles; ++r) set_zero(out[r]);
  }
};

// The query fragments of a warp: all of them in registers, or only those of the current step.
template <class T>
struct QueryFragments {
  static constexpr int kSteps = T::kHeadDim / 16;
  uint32_t held[T::kHoldQueries ? kSteps : 1][T::kRowTiles][4];

  MLS_DEVICE void read(const typename T::QueryTile& tile, int first_row, int step,
                       uint32_t (&a)[T::kRowTiles][4]) {
    MLS_UNROLL
    for (int r = 0; r < T::kRowTiles; ++r) load_a(a[r], tile, first_row + r * 16, step * 16);
  }
  MLS_DEVICE void hold(const typename T::QueryTile& tile, int first_row) {
    if constexpr (T::kHoldQueries) {
      MLS_UNROLL
      for (int step = 0; step < kSteps; ++step) read(tile, first_row, step, held[step]);
    }
  }
};

template <class T>
MLS_DEVICE void multiply_scores(float (&scores)[T::kRowTiles][T::kKeys / 8][4], QueryFragments<T>& fragments,
                                const typename T::QueryTile& queries, const typename T::KeyTile& keys) {
  MLS_UNROLL
  for (int r = 0; r < T::kRowTiles; ++r) set_zero(scores[r]);
  MLS_UNROLL
  for (int step = 0; step < T::kHeadDim / 16; ++step) {
    if constexpr (T::kHoldQueries) {
      multiply<typename T::Element, true>(scores, fragments.held[step], keys, 0, step * 16);
    } else {
      uint32_t a[T::kRowTiles][4];
      fragments.read(queries, warp_id() * T::kWarpQueries, step, a);
      multiply<typename T::Element, true>(scores, a, keys, 0, step * 16);
    }
  }
}

template <class T>
MLS_DEVICE void accumulate_output(ForwardState<T>& state,
                                  float (&probabilities)[T::kRowTiles][T::kKeys / 8][4],
                                  const typename T::ValueTile& values) {
  MLS_UNROLL
  for (int step = 0; step < T::kKeys / 16; ++step) {
    uint32_t a[T::kRowTiles][4];
    MLS_UNROLL
    for (int r = 0; r < T::kRowTiles; ++r) to_a<typename T::Element>(a[r], probabilities[r], step);
    multiply<typename T::Element, false>(state.out, a, values, 0, step * 16);
  }
}

template <class T>
MLS_DEVICE void attend_to_tile(ForwardState<T>& state, float (&scores)[T::kRowTiles][T::kKeys / 8][4],
                               const typename T::ValueTile& values, float scale_log2) {
  MLS_UNROLL
  for (int r = 0; r < T::kRowTiles; ++r) {
    float rescale[2];
    online_softmax(scores[r], state.rows[r], rescale, scale_log2);
    scale_row(state.out[r], 0, rescale[0]);
    scale_row(state.out[r], 1, rescale[1]);
  }
  accumulate_output<T>(state, scores, values);
}

// Layout of the tiles in shared memory.
template <class T>
struct ForwardShared {
  unsigned char* base;
  MLS_DEVICE typename T::QueryTile queries() const { return {base}; }
  MLS_DEVICE typename T::KeyTile keys(int stage) const {
    return {base + T::QueryTile::kBytes + stage * (T::KeyTile::kBytes + T::ValueTile::kBytes)};
  }
  MLS_DEVICE typename T::ValueTile values(int stage) const { return {keys(stage).base + T::KeyTile::kBytes}; }
};

template <class T>
MLS_DEVICE void walk_over_keys(ForwardState<T>& state, const ForwardParams& params,
                               const ForwardShared<T>& shared, const Visibility& visibility, int first_query,
                               int batch, int head) {
  const KeyBounds bounds = bounds_of_queries<T::kQueries>(visibility, first_query);
  if (bounds.any_first >= bounds.any_end) return;
  const auto& shape = params.shape;
  const int kv_head = head / static_cast<int>(shape.num_heads / shape.num_kv_heads);
  const int num_keys = static_cast<int>(shape.num_keys);
  const int first_tile = bounds.any_first / T::kKeys, end_tile = (bounds.any_end + T::kKeys - 1) / T::kKeys;
  const auto prefetch = [&](int tile) {
    const int stage = (tile - first_tile) % T::kStages;
    if (tile < end_tile) {
      // Views are created each time: kept live, they would take registers from the loop.
      load_tile<T::kThreads>(shared.keys(stage), rows_of(params.k, batch, kv_head, num_keys),
                             tile * T::kKeys);
      load_tile<T::kThreads>(shared.values(stage), rows_of(params.v, batch, kv_head, num_keys),
                             tile * T::kKeys);
    }
    copy_async_commit();
  };
  load_tile<T::kThreads>(shared.queries(),
                         rows_of(params.q, batch, head, static_cast<int>(shape.num_queries)), first_query);
  prefetch(first_tile);
  QueryFragments<T> fragments;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    prefetch(tile + 1);
    copy_async_wait<1>();
    sync_threads();
    if (tile == first_tile) fragments.hold(shared.queries(), warp_id() * T::kWarpQueries);
    const int stage = (tile - first_tile) % T::kStages, first_key = tile * T::kKeys;
    float scores[T::kRowTiles][T::kKeys / 8][4];
    multiply_scores<T>(scores, fragments, shared.queries(), shared.keys(stage));
    const ScoreMap<T::kCaps> map(params);
    MLS_UNROLL
    for (int r = 0; r < T::kRowTiles; ++r) map.apply(scores[r]);
    if (!bounds.covers(first_key, first_key + T::kKeys)) {
      MLS_UNROLL
      for (int r = 0; r < T::kRowTiles; ++r)
        mask_scores(scores[r], visibility, first_query + warp_id() * T::kWarpQueries + r * 16, first_key);
    }
    attend_to_tile<T>(state, scores, shared.values(stage), map.scale_log2);
    sync_threads();  // all warps are done with this stage before it is filled again
  }
  copy_async_wait<0>();
}

// Blocks: (query tiles, heads, batch).
template <class T>
MLS_KERNEL(T::kThreads, 1)
attention_forward_sm80(const ForwardParams params) {
  MLS_SHARED_MEMORY(memory);
  const Visibility visibility(params.shape, params.mask);
  const int num_tiles = (visibility.num_queries + T::kQueries - 1) / T::kQueries;
  // Under a causal mask the last queries have the most work, so they start first.
  const int first_query = (num_tiles - 1 - static_cast<int>(block_index().x)) * T::kQueries;
  const int head = static_cast<int>(block_index().y), batch = static_cast<int>(block_index().z);
  const int warp_query = first_query + warp_id() * T::kWarpQueries;
  ForwardState<T> state;
  walk_over_keys<T>(state, params, ForwardShared<T>{memory}, visibility, first_query, batch, head);
  const OutputRows target(params, batch, head, ScoreMap<T::kCaps>(params).scale_log2);
  MLS_UNROLL
  for (int r = 0; r < T::kRowTiles; ++r) {
    MLS_UNROLL
    for (int half = 0; half < 2; ++half)
      store_row<typename T::Element>(target, state.out[r], state.rows[r], half,
                                     warp_query + r * 16 + fragment_row(2 * half));
  }
}

template <class T>
const char* launch_forward_sm80(const ForwardParams& params, void* stream) {
  const auto& shape = params.shape;
  const Dim3 blocks((shape.num_queries + T::kQueries - 1) / T::kQueries, shape.num_heads, shape.batch);
  return launch(&attention_forward_sm80<T>, blocks, T::kThreads, T::kSharedBytes, stream, params);
}

}  // namespace mls::cuda
