// Fused attention forward for compute capability 9.0a (an independent implementation of FlashAttention-3's
// structure).
//
// One producer warpgroup issues TMA copies of K and V tiles into a ring buffer. Two or three consumer
// warpgroups with 64 queries each use wgmma. A consumer issues the scores of tile j, then the output product
// of tile j - 1, and computes the softmax of tile j while the output product runs.
#pragma once
#include "cuda/hopper_launch.h"
#include "cuda/panels.h"
#include "cuda/softmax.h"
#include "cuda/work_order.h"

namespace mls::cuda {

template <class Element_, int kHeadDim_, int kValueDim_, int kConsumers_, int kKeys_>
struct HopperForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = 2;
  static constexpr bool kCaps = false;  // see softcap.h
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
  static constexpr int kConsumerWarps = kConsumers * 4;
  // A block starts with the register file divided evenly among its threads; these numbers redistribute it.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters == kRegisters * (1 + kConsumers));
  using QueryTile = PanelTile<kQueries, kHeadDim>;
  using KeyTile = PanelTile<kKeys, kHeadDim>;
  using ValueTile = PanelTile<kKeys, kValueDim>;
  static constexpr int kTileBytes = QueryTile::kBytes + kStages * (KeyTile::kBytes + ValueTile::kBytes);
  static constexpr int kSharedBytes = kTileBytes + (1 + 4 * kStages) * sizeof(Barrier);
  static_assert(kSharedBytes <= 227 * 1024);
  // With head dim > 128 one warpgroup keeps the tensor cores busy, so ping-pong scheduling is off.
  static constexpr bool kTakesTurns = kHeadDim <= 128;
};

struct HopperForwardLaunch {
  ForwardParams params;
  WorkOrder order;
  TensorMap q, k, v;
  template <class T>
  bool describe();  // creates the tensor maps; false if the driver refuses them
};

// A tile is `full` once its copy has landed, and `empty` once every consumer warp is done with it.
template <class T>
struct HopperForwardShared {
  unsigned char* base;
  MLS_DEVICE typename T::QueryTile queries() const { return {base}; }
  MLS_DEVICE typename T::KeyTile keys(int stage) const {
    return {base + T::QueryTile::kBytes + stage * T::KeyTile::kBytes};
  }
  MLS_DEVICE typename T::ValueTile values(int stage) const {
    return {keys(T::kStages).base + stage * T::ValueTile::kBytes};
  }
  MLS_DEVICE Barrier* barriers() const { return reinterpret_cast<Barrier*>(base + T::kTileBytes); }
  MLS_DEVICE Barrier* queries_full() const { return barriers(); }
  MLS_DEVICE Barrier* keys_full(int stage) const { return barriers() + 1 + stage; }
  MLS_DEVICE Barrier* keys_empty(int stage) const { return barriers() + 1 + T::kStages + stage; }
  MLS_DEVICE Barrier* values_full(int stage) const { return barriers() + 1 + 2 * T::kStages + stage; }
  MLS_DEVICE Barrier* values_empty(int stage) const { return barriers() + 1 + 3 * T::kStages + stage; }

  MLS_DEVICE void init() const {
    barrier_init(queries_full(), 1);
    for (int stage = 0; stage < T::kStages; ++stage) {
      barrier_init(keys_full(stage), 1);
      barrier_init(values_full(stage), 1);
      barrier_init(keys_empty(stage), T::kConsumerWarps);
      barrier_init(values_empty(stage), T::kConsumerWarps);
    }
    barrier_init_fence();
  }
};

// What a block works on.
struct HopperForwardWork {
  int first_query, head, kv_head, batch;
  int first_tile, end_tile;  // of keys
};

// Run by one thread of the producer warpgroup.
template <class T>
MLS_DEVICE void produce_keys(const HopperForwardLaunch& launch, const HopperForwardShared<T>& shared,
                             const HopperForwardWork& work) {
  barrier_expect(shared.queries_full(), T::QueryTile::kBytes);
  copy_tile(shared.queries(), launch.q, shared.queries_full(), work.first_query, work.head, work.batch);
  RingPosition<T::kStages> at;
  for (int tile = work.first_tile; tile < work.end_tile; ++tile, at.advance()) {
    Barrier *keys = shared.keys_full(at.stage), *values = shared.values_full(at.stage);
    barrier_wait(shared.keys_empty(at.stage), at.parity ^ 1);  // does not block in the first round
    barrier_expect(keys, T::KeyTile::kBytes);
    copy_tile(shared.keys(at.stage), launch.k, keys, tile * T::kKeys, work.kv_head, work.batch);
    barrier_wait(shared.values_empty(at.stage), at.parity ^ 1);
    barrier_expect(values, T::ValueTile::kBytes);
    copy_tile(shared.values(at.stage), launch.v, values, tile * T::kKeys, work.kv_head, work.batch);
  }
}

// Registers of a consumer warpgroup: S, P and O in the notation of FlashAttention.
template <class T>
struct HopperForwardState {
  float scores[T::kKeys / 8][4];
  uint32_t probabilities[T::kKeys / 16][4];
  float out[T::kValueDim / 8][4];
  RowStatistics rows;
};

// Issues scores = Q K^T, without waiting.
template <class T>
MLS_DEVICE void issue_scores(HopperForwardState<T>& state, const typename T::QueryTile& queries,
                             const typename T::KeyTile& keys, int first_row) {
  hold(state.scores);
  wgmma_fence();
  MLS_UNROLL
  for (int k = 0; k < T::kHeadDim; k += 16)
    Wgmma<typename T::Element, T::kKeys>::template from_shared<false, false>(
        state.scores, queries.along_columns(first_row, k), keys.along_columns(0, k), k > 0);
  wgmma_commit();
}

// Issues out += P V, without waiting.
template <class T>
MLS_DEVICE void issue_output(HopperForwardState<T>& state, const typename T::ValueTile& values) {
  hold(state.out);
  hold(state.probabilities);
  wgmma_fence();
  MLS_UNROLL
  for (int step = 0; step < T::kKeys / 16; ++step)
    multiply_by_rows<typename T::Element>(state.out, state.probabilities[step], values, step * 16);
  wgmma_commit();
}

MLS_DEVICE void release_stage(Barrier* empty) {
  if (lane_id() == 0) barrier_arrive(empty);
}

template <class T>
struct HopperConsumer {
  const HopperForwardShared<T>& shared;
  const Visibility& visibility;
  const KeyBounds& bounds;
  int first_query;  // of the warp
  ScoreMap<T::kCaps> map;

  // scores -> unnormalised probabilities in fp32.
  MLS_DEVICE void softmax(HopperForwardState<T>& state, float (&rescale)[2], int tile) const {
    const int first_key = tile * T::kKeys;
    map.apply(state.scores);
    if (!bounds.covers(first_key, first_key + T::kKeys))
      mask_scores(state.scores, visibility, first_query, first_key);
    online_softmax(state.scores, state.rows, rescale, map.scale_log2);
  }

  MLS_DEVICE void pack_probabilities(HopperForwardState<T>& state) const {
    MLS_UNROLL
    for (int step = 0; step < T::kKeys / 16; ++step)
      to_a<typename T::Element>(state.probabilities[step], state.scores, step);
  }

  MLS_DEVICE void finish_output(HopperForwardState<T>& state, Barrier* empty) const {
    wgmma_wait<0>();
    hold(state.out);
    hold(state.probabilities);
    release_stage(empty);
  }
};

// Ping-pong scheduling: consumer warpgroups issue their products in turn, so that the others compute their
// softmax while the products of one run. The turn of warpgroup i is named barrier 1 + i: the previous
// warpgroup arrives, warpgroup i waits. warpgroup() is recomputed at each use, because keeping its value
// would cost a register.
template <class T>
struct Turn {
  static constexpr int kThreads = 2 * kWarpgroupSize;

  MLS_DEVICE static int warpgroup() { return warp_id() / 4 - 1; }
  MLS_DEVICE static void give(int next) {
    if constexpr (T::kTakesTurns) named_barrier_arrive(1 + next % T::kConsumers, kThreads);
  }
  MLS_DEVICE static void start() {
    if (warpgroup() == T::kConsumers - 1) give(0);
  }
  MLS_DEVICE static void wait() {
    if constexpr (T::kTakesTurns) named_barrier_sync(1 + warpgroup(), kThreads);
  }
  // After the last tile no warpgroup waits for another turn.
  MLS_DEVICE static void pass(bool last_tile) {
    if (!last_tile || warpgroup() < T::kConsumers - 1) give(warpgroup() + 1);
  }
};

// Run by one consumer warpgroup: iterates over all its keys, with products and softmax overlapped.
template <class T>
MLS_DEVICE void consume_keys(HopperForwardState<T>& state, const HopperConsumer<T>& consumer,
                             const HopperForwardWork& work, int first_row) {
  const auto& shared = consumer.shared;
  float rescale[2];
  RingPosition<T::kStages> at, before;
  barrier_wait(shared.queries_full(), 0);
  barrier_wait(shared.keys_full(0), 0);
  issue_scores<T>(state, shared.queries(), shared.keys(0), first_row);
  wgmma_wait<0>();
  hold(state.scores);
  release_stage(shared.keys_empty(0));
  consumer.softmax(state, rescale, work.first_tile);  // out is still zero, so nothing to rescale
  consumer.pack_probabilities(state);
  at.advance();
  int tile = work.first_tile + 1;
  if (tile < work.end_tile) {
    Turn<T>::start();
    barrier_wait(shared.keys_full(at.stage), at.parity);
  }
  while (tile < work.end_tile) {
    barrier_wait(shared.values_full(before.stage), before.parity);
    Turn<T>::wait();
    issue_scores<T>(state, shared.queries(), shared.keys(at.stage), first_row);
    issue_output<T>(state, shared.values(before.stage));
    Turn<T>::pass(tile + 1 == work.end_tile);
    wgmma_wait<1>();  // for the scores; the output product runs concurrently with the softmax
    hold(state.scores);
    release_stage(shared.keys_empty(at.stage));
    consumer.softmax(state, rescale, tile);
    ++tile, at.advance();
    // The wait for the next keys must stay here: ptxas hoists the wait for the output product to the nearest
    // branch, and this is the only branch between that wait and the softmax.
    if (tile < work.end_tile) barrier_wait(shared.keys_full(at.stage), at.parity);
    consumer.finish_output(state, shared.values_empty(before.stage));
    scale_row(state.out, 0, rescale[0]);
    scale_row(state.out, 1, rescale[1]);
    consumer.pack_probabilities(state);
    before.advance();
  }
  barrier_wait(shared.values_full(before.stage), before.parity);
  issue_output<T>(state, shared.values(before.stage));
  consumer.finish_output(state, shared.values_empty(before.stage));
}

template <class T>
MLS_DEVICE void forward_block_sm90(const HopperForwardLaunch& launch, unsigned char* memory) {
  const ForwardParams& params = launch.params;
  const HopperForwardShared<T> shared{memory};
  const Visibility visibility(params.shape, params.mask);
  const WorkOrder::Place place = launch.order.place(static_cast<int>(block_index().x));
  HopperForwardWork work;
  work.first_query = (launch.order.num_tiles - 1 - place.tile) * T::kQueries;
  work.head = place.unit % static_cast<int>(params.shape.num_heads);
  work.batch = place.unit / static_cast<int>(params.shape.num_heads);
  work.kv_head = work.head / static_cast<int>(params.shape.num_heads / params.shape.num_kv_heads);
  const KeyBounds bounds = bounds_of_queries<T::kQueries>(visibility, work.first_query);
  const bool any = bounds.any_first < bounds.any_end;
  work.first_tile = bounds.any_first / T::kKeys;
  work.end_tile = (bounds.any_end + T::kKeys - 1) / T::kKeys;
  if (thread_index().x == 0) shared.init();
  sync_threads();
  if (warp_id() < 4) {
    give_registers<T::kProducerRegisters>();
    if (any && thread_index().x == 0) produce_keys<T>(launch, shared, work);
  } else {
    take_registers<T::kConsumerRegisters>();
    const int first_row = (warp_id() / 4 - 1) * 64,
              warp_query = work.first_query + first_row + warp_id() % 4 * 16;
    HopperForwardState<T> state;
    set_zero(state.out);
    const ScoreMap<T::kCaps> map(params);
    const HopperConsumer<T> consumer{shared, visibility, bounds, warp_query, map};
    if (any) consume_keys<T>(state, consumer, work, first_row);
    const OutputRows target(params, work.batch, work.head, map.scale_log2);
    store_row<typename T::Element>(target, state.out, state.rows, 0, warp_query + fragment_row(0));
    store_row<typename T::Element>(target, state.out, state.rows, 1, warp_query + fragment_row(2));
  }
}

// One block per place of the work order.
template <class T>
MLS_KERNEL(T::kThreads, 1)
attention_forward_sm90(const MLS_GRID_CONSTANT HopperForwardLaunch launch) {
  MLS_SHARED_MEMORY(memory);
  if constexpr (kCompilesSm90a) forward_block_sm90<T>(launch, memory);
}

template <class T>
bool HopperForwardLaunch::describe() {
  const auto& shape = params.shape;
  const ElementType type = params.element_type;
  return make_tensor_map(&q, params.q, {shape.head_dim, shape.num_queries, shape.num_heads, shape.batch},
                         type, T::kQueries) &&
         make_tensor_map(&k, params.k, {shape.head_dim, shape.num_keys, shape.num_kv_heads, shape.batch},
                         type, T::kKeys) &&
         make_tensor_map(&v, params.v, {shape.value_dim, shape.num_keys, shape.num_kv_heads, shape.batch},
                         type, T::kKeys);
}

// Returns what launch_hopper returns.
template <class T>
bool launch_forward_sm90(const ForwardParams& params, void* stream, const char** failure) {
  const auto& shape = params.shape;
  HopperForwardLaunch arguments{params, {}, {}, {}, {}};
  *failure = make_order(&arguments.order, (shape.num_queries + T::kQueries - 1) / T::kQueries,
                        shape.num_heads * shape.batch, key_bytes_of_head(shape));
  if (*failure != nullptr) return true;
  return launch_hopper<T>(&attention_forward_sm90<T>, arguments.order.blocks(), T::kSharedBytes, stream,
                          arguments, failure);
}

}  // namespace mls::cuda
