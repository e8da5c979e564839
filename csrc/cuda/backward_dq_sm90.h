// dQ alone on compute capability 9.0a, bitwise reproducible: each block owns 128 queries and iterates over
// the keys that they see in a fixed order. It is structured like forward_sm90.h: a producer thread issues TMA
// copies of K and V tiles into a ring buffer, and two consumer warpgroups with 64 queries each keep dQ in
// registers.
#pragma once
#include "cuda/gradients.h"
#include "cuda/hopper_launch.h"
#include "cuda/panels.h"
#include "cuda/softcap.h"
#include "cuda/work_order.h"

namespace mls::cuda {

template <class Element_, int kHeadDim_>
struct HopperDqTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = 128;
  static constexpr bool kCaps = false;  // see softcap.h
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kStages = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters == 168 * (1 + kConsumers));
  using QueryTile = PanelTile<kQueries, kHeadDim>;
  using KeyTile = PanelTile<kKeys, kHeadDim>;
  static constexpr int kTileBytes = 2 * QueryTile::kBytes + 2 * kStages * KeyTile::kBytes;
  static constexpr int kSharedBytes = kTileBytes + (1 + 2 * kStages) * static_cast<int>(sizeof(Barrier));
  static_assert(kSharedBytes <= 227 * 1024);
};

template <class T>
struct HopperDqShared {
  unsigned char* base;
  MLS_DEVICE typename T::QueryTile queries() const { return {base}; }
  MLS_DEVICE typename T::QueryTile grads() const { return {base + T::QueryTile::kBytes}; }
  MLS_DEVICE typename T::KeyTile keys(int stage) const {
    return {base + 2 * T::QueryTile::kBytes + stage * T::KeyTile::kBytes};
  }
  MLS_DEVICE typename T::KeyTile values(int stage) const { return keys(T::kStages + stage); }
  MLS_DEVICE Barrier* queries_full() const { return reinterpret_cast<Barrier*>(base + T::kTileBytes); }
  MLS_DEVICE Barrier* keys_full(int stage) const { return queries_full() + 1 + stage; }
  MLS_DEVICE Barrier* keys_empty(int stage) const { return keys_full(T::kStages + stage); }

  MLS_DEVICE void init() const {
    barrier_init(queries_full(), 1);
    for (int stage = 0; stage < T::kStages; ++stage) {
      barrier_init(keys_full(stage), 1);
      barrier_init(keys_empty(stage), T::kConsumers * 4);
    }
    barrier_init_fence();
  }
};

struct HopperDqLaunch {
  BackwardParams params;
  WorkOrder order;
  TensorMap q, k, v, dout;
  template <class T>
  bool describe();  // creates the tensor maps; false if the driver refuses them
};

// What a block works on.
struct HopperDqWork {
  int first_query, head, kv_head, batch;
  int first_tile, end_tile;  // of keys
};

// Run by one producer thread: copies Q, dO, and every tile of K and V.
template <class T>
MLS_DEVICE void produce_keys_and_values(const HopperDqLaunch& launch, const HopperDqShared<T>& shared,
                                        const HopperDqWork& work) {
  barrier_expect(shared.queries_full(), 2 * T::QueryTile::kBytes);
  copy_tile(shared.queries(), launch.q, shared.queries_full(), work.first_query, work.head, work.batch);
  copy_tile(shared.grads(), launch.dout, shared.queries_full(), work.first_query, work.head, work.batch);
  RingPosition<T::kStages> at;
  for (int tile = work.first_tile; tile < work.end_tile; ++tile, at.advance()) {
    Barrier* full = shared.keys_full(at.stage);
    barrier_wait(shared.keys_empty(at.stage), at.parity ^ 1);  // does not block in the first round
    barrier_expect(full, 2 * T::KeyTile::kBytes);
    copy_tile(shared.keys(at.stage), launch.k, full, tile * T::kKeys, work.kv_head, work.batch);
    copy_tile(shared.values(at.stage), launch.v, full, tile * T::kKeys, work.kv_head, work.batch);
  }
}

// Issues sums = 64 rows of `a` times `b` transposed (Q K^T or dO V^T), without waiting.
template <class T>
MLS_DEVICE void issue_rows(float (&sums)[T::kKeys / 8][4], const typename T::QueryTile& a, int first_row,
                           const typename T::KeyTile& b) {
  hold(sums);
  wgmma_fence();
  MLS_UNROLL
  for (int k = 0; k < T::kHeadDim; k += 16)
    Wgmma<typename T::Element, T::kKeys>::template from_shared<false, false>(
        sums, a.along_columns(first_row, k), b.along_columns(0, k), k > 0);
  wgmma_commit();
}

// Issues dq += dS K, without waiting.
template <class T>
MLS_DEVICE void issue_dq(float (&dq)[T::kHeadDim / 8][4], uint32_t (&ds)[T::kKeys / 16][4],
                         const typename T::KeyTile& keys) {
  hold(dq);
  hold(ds);
  wgmma_fence();
  MLS_UNROLL
  for (int step = 0; step < T::kKeys / 16; ++step)
    multiply_by_rows<typename T::Element>(dq, ds[step], keys, step * 16);
  wgmma_commit();
}

// Per-query data of the two query rows that a thread holds in its fragments.
template <bool kCaps>
struct DqRows {
  QueryRow rows[2];
  ScoreMap<kCaps> map;

  // Scores -> probabilities, with a softcap times the slopes of the scores. `masked`: some query may not see
  // every key of the tile.
  template <int kTiles>
  MLS_DEVICE void to_probabilities(float (&scores)[kTiles][4], int first_key, bool masked) const {
    map.apply(scores);
    if (masked) {
      MLS_UNROLL
      for (int i = 0; i < 4 * kTiles; ++i)
        if (!rows[i % 4 / 2].seen.contains(first_key + fragment_column(i / 4, i % 4)))
          scores[i / 4][i % 4] = -infinity();
    }
    MLS_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& score = scores[i / 4][i % 4];
      const float probability = exp2_approx(score * map.scale_log2 - rows[i % 4 / 2].lse_log2);
      if constexpr (kCaps)
        score = probability * map.slope(score);
      else
        score = probability;
    }
  }

  // dP -> dS = P (dP - delta), converted to an A operand. The softmax scale is applied to dQ at the end.
  template <class Element, int kTiles>
  MLS_DEVICE void to_operand(uint32_t (&ds)[kTiles / 2][4], float (&grads)[kTiles][4],
                             const float (&probabilities)[kTiles][4]) const {
    MLS_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i)
      grads[i / 4][i % 4] = probabilities[i / 4][i % 4] * (grads[i / 4][i % 4] - rows[i % 4 / 2].delta);
    MLS_UNROLL
    for (int step = 0; step < kTiles / 2; ++step) to_a<Element>(ds[step], grads, step);
  }
};

// Run by one consumer warpgroup: accumulates dq over all keys, without the softmax scale.
template <class T>
MLS_DEVICE void consume_keys(float (&dq)[T::kHeadDim / 8][4], const HopperDqShared<T>& shared,
                             const HopperDqWork& work, const DqRows<T::kCaps>& rows,
                             const KeyBounds& bounds) {
  float scores[T::kKeys / 8][4], grads[T::kKeys / 8][4];
  uint32_t ds[T::kKeys / 16][4];
  const int first_row = (warpgroup_id() - 1) * 64;
  RingPosition<T::kStages> at;
  barrier_wait(shared.queries_full(), 0);
  barrier_wait(shared.keys_full(at.stage), at.parity);
  for (int tile = work.first_tile; tile < work.end_tile;) {
    const int first_key = tile * T::kKeys, stage = at.stage;
    issue_rows<T>(scores, shared.queries(), first_row, shared.keys(stage));
    issue_rows<T>(grads, shared.grads(), first_row, shared.values(stage));
    wgmma_wait<1>();  // for the scores; dP is computed concurrently with the probabilities
    hold(scores);
    rows.to_probabilities(scores, first_key, !bounds.covers(first_key, first_key + T::kKeys));
    ++tile, at.advance();
    // As in forward_sm90.h: without a branch here, ptxas hoists the wait for dP above the probabilities.
    if (tile < work.end_tile) barrier_wait(shared.keys_full(at.stage), at.parity);
    wgmma_wait<0>();
    hold(grads);
    rows.template to_operand<typename T::Element>(ds, grads, scores);
    issue_dq<T>(dq, ds, shared.keys(stage));
    wgmma_wait<0>();
    hold(dq);
    hold(ds);
    arrive_as_warp(shared.keys_empty(stage));
  }
}

template <class T>
MLS_DEVICE GradientRows gradient_of(const BackwardParams& params, const HopperDqWork& work) {
  return {params.dq, params.rounded_dq, work.batch, work.head, params.shape.num_queries, params.accumulate};
}

template <class T>
MLS_DEVICE void dq_block_sm90(const HopperDqLaunch& launch, unsigned char* memory) {
  const BackwardParams& params = launch.params;
  const HopperDqShared<T> shared{memory};
  const Visibility visibility(params.shape, params.mask);
  const WorkOrder::Place place = launch.order.place(static_cast<int>(block_index().x));
  HopperDqWork work;
  work.first_query = (launch.order.num_tiles - 1 - place.tile) * T::kQueries;
  work.head = place.unit % static_cast<int>(params.shape.num_heads);
  work.batch = place.unit / static_cast<int>(params.shape.num_heads);
  work.kv_head = work.head / static_cast<int>(params.shape.num_heads / params.shape.num_kv_heads);
  const KeyBounds bounds = bounds_of_queries<T::kQueries>(visibility, work.first_query);
  if (bounds.any_first >= bounds.any_end)
    return write_empty_rows<T::kQueries, T::kHeadDim, T::kThreads>(gradient_of<T>(params, work),
                                                                   work.first_query);
  work.first_tile = bounds.any_first / T::kKeys;
  work.end_tile = (bounds.any_end + T::kKeys - 1) / T::kKeys;
  if (thread_index().x == 0) shared.init();
  sync_threads();
  if (warp_id() < 4) {
    give_registers<T::kProducerRegisters>();
    if (thread_index().x == 0) produce_keys_and_values<T>(launch, shared, work);
  } else {
    take_registers<T::kConsumerRegisters>();
    const int warp_query = work.first_query + (warp_id() - 4) * 16;
    const DqRows<T::kCaps> rows{
        {query_row(params, visibility, work.batch, work.head, warp_query + fragment_row(0)),
         query_row(params, visibility, work.batch, work.head, warp_query + fragment_row(2))},
        ScoreMap<T::kCaps>(params)};
    float dq[T::kHeadDim / 8][4];
    set_zero(dq);
    consume_keys<T>(dq, shared, work, rows, bounds);
    write_rows<typename T::Element>(gradient_of<T>(params, work), dq, warp_query, 0, params.softmax_scale);
  }
}

// One block per place of the work order.
template <class T>
MLS_KERNEL(T::kThreads, 1)
attention_backward_dq_sm90(const MLS_GRID_CONSTANT HopperDqLaunch launch) {
  MLS_SHARED_MEMORY(memory);
  if constexpr (kCompilesSm90a) dq_block_sm90<T>(launch, memory);
}

template <class T>
bool HopperDqLaunch::describe() {
  const auto& shape = params.shape;
  const ElementType type = params.element_type;
  const int64_t queries[] = {shape.head_dim, shape.num_queries, shape.num_heads, shape.batch};
  const int64_t keys[] = {shape.head_dim, shape.num_keys, shape.num_kv_heads, shape.batch};
  return make_tensor_map(&q, params.q, queries, type, T::kQueries) &&
         make_tensor_map(&dout, params.dout, queries, type, T::kQueries) &&
         make_tensor_map(&k, params.k, keys, type, T::kKeys) &&
         make_tensor_map(&v, params.v, keys, type, T::kKeys);
}

// Returns null, or an error message.
template <class T>
const char* launch_dq_sm90(const BackwardParams& params, void* stream) {
  const auto& shape = params.shape;
  HopperDqLaunch arguments{params, {}, {}, {}, {}, {}};
  const char* failure = make_order(&arguments.order, (shape.num_queries + T::kQueries - 1) / T::kQueries,
                                   shape.num_heads * shape.batch, key_bytes_of_head(shape));
  if (failure != nullptr) return failure;
  const bool is_started = launch_hopper<T>(&attention_backward_dq_sm90<T>, arguments.order.blocks(),
                                           T::kSharedBytes, stream, arguments, &failure);
  return is_started ? failure
                    : "the driver accepted the tensor maps of q, k, v and dout for dk and dv, but not for dq";
}

}  // namespace mls::cuda
