// Shared memory layout and producer warps of backward_sm90.h.
#pragma once
#include "cuda/gradients.h"
#include "cuda/panels.h"
#include "cuda/work_order.h"

namespace mls::cuda {

// kWithDq = false computes dK and dV alone, for reproducible gradients. A launch takes at most 64 * kMaxTiles
// queries.
template <class Element_, int kHeadDim_, bool kWithDq_, int kMaxTiles_>
struct HopperBackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWithDq = kWithDq_;
  static constexpr bool kCaps = false;  // see softcap.h
  static constexpr int kMaxTiles = kMaxTiles_;
  static constexpr int kQueries = 64;
  static constexpr int kConsumers = 2;  // warpgroups
  // At D = 64 there are enough registers to hold K and V. Reading them from shared memory for each query tile
  // would take a seventh of its bandwidth.
  static constexpr bool kHoldsKeys = kHeadDim == 64;
  static constexpr int kKeys = 64 * kConsumers;
  static constexpr int kStages = 2;
  static constexpr int kScoreStages = 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
  static constexpr int kConsumerWarps = kConsumers * 4;
  // A block starts with 168 registers for each of its 384 threads; these numbers redistribute them.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters == 168 * (1 + kConsumers));
  using KeyTile = PanelTile<kKeys, kHeadDim>;
  using QueryTile = PanelTile<kQueries, kHeadDim>;
  using ScoreTile = PanelTile<kKeys, kQueries>;
  // Each consumer computes kDqColumns columns of dQ, for all queries of a tile. At D = 80 and 96 the second
  // one has the last 16 or 32 columns, and zeros from the padding of K, which are not added to dQ.
  static constexpr int kDqColumns = KeyTile::kPanels * kSwizzleColumns / kConsumers;
  using QueryGradient = FloatPanelTile<kQueries, kDqColumns>;
  static constexpr int kScoreBytes = kWithDq ? kScoreStages * ScoreTile::kBytes : 0;
  static constexpr int kGradientBytes = kWithDq ? kConsumers * QueryGradient::kBytes : 0;
  static constexpr int kTileBytes =
      2 * KeyTile::kBytes + 2 * kStages * QueryTile::kBytes + kScoreBytes + kGradientBytes;
};

// Per-query data of a tile of queries; see QueryRow.
template <int kQueries>
struct alignas(16) TileRows {
  float lse_log2[kQueries];
  float delta[kQueries];
  KeyInterval seen[kQueries];  // valid for masked tiles only
  bool any;                    // false: there are no more tiles
  bool masked;
};

// A stage is `full` once it is filled, and `empty` once all of its readers are done with it.
template <class T>
struct HopperBackwardBarriers {
  Barrier keys_full;
  Barrier queries_full[T::kStages];  // Q and its TileRows
  Barrier grads_full[T::kStages];    // dO
  Barrier tile_empty[T::kStages];    // Q, its TileRows and dO
  Barrier dq_full[T::kConsumers], dq_empty[T::kConsumers];

  MLS_DEVICE void init() {
    barrier_init(&keys_full, 1);
    for (int stage = 0; stage < T::kStages; ++stage) {
      barrier_init(&queries_full[stage], 1 + kWarpSize);
      barrier_init(&grads_full[stage], 1);
      barrier_init(&tile_empty[stage], T::kConsumerWarps);
    }
    for (int consumer = 0; consumer < T::kConsumers; ++consumer) {
      barrier_init(&dq_full[consumer], 4);
      barrier_init(&dq_empty[consumer], 1);
    }
    barrier_init_fence();
  }
};

enum class TileKind : unsigned char { kUnseen, kMasked, kWhole };

template <class T>
struct HopperBackwardShared {
  using Rows = TileRows<T::kQueries>;
  static constexpr int kBytes =
      T::kTileBytes + static_cast<int>(T::kStages * sizeof(Rows) + sizeof(HopperBackwardBarriers<T>)) +
      T::kMaxTiles;
  static_assert(kBytes <= 227 * 1024);

  unsigned char* base;
  MLS_DEVICE typename T::KeyTile keys() const { return {base}; }
  MLS_DEVICE typename T::KeyTile values() const { return {base + T::KeyTile::kBytes}; }
  MLS_DEVICE typename T::QueryTile queries(int stage) const {
    return {base + 2 * T::KeyTile::kBytes + stage * T::QueryTile::kBytes};
  }
  MLS_DEVICE typename T::QueryTile grads(int stage) const { return queries(T::kStages + stage); }
  MLS_DEVICE typename T::ScoreTile scores(int stage) const {
    return {queries(2 * T::kStages).base + stage * T::ScoreTile::kBytes};
  }
  MLS_DEVICE typename T::QueryGradient query_gradient(int consumer) const {
    return {scores(0).base + T::kScoreBytes + consumer * T::QueryGradient::kBytes};
  }
  MLS_DEVICE Rows& rows(int stage) const { return reinterpret_cast<Rows*>(base + T::kTileBytes)[stage]; }
  MLS_DEVICE HopperBackwardBarriers<T>& barriers() const {
    return *reinterpret_cast<HopperBackwardBarriers<T>*>(&rows(T::kStages));
  }
  MLS_DEVICE TileKind* kinds() const { return reinterpret_cast<TileKind*>(&barriers() + 1); }
};

struct HopperBackwardLaunch {
  BackwardParams params;
  WorkOrder order;
  int head_parts;  // see BackwardOptions
  TensorMap q, k, v, dout, dq;
  template <class T>
  bool describe();  // creates the tensor maps; false if the driver refuses them
};

// What a block works on: keys of one key/value head, and the query tiles that see some of them by the band of
// the mask.
struct HopperBackwardWork {
  int first_key, kv_head, batch;
  int first_head, end_head;  // query heads
  int first_tile, end_tile;

  MLS_DEVICE GradientRows rows(const HopperBackwardLaunch& launch, const TokenTensor<float>& sums,
                               const TokenTensor<uint16_t>& rounded) const {
    // Blocks that share keys add to zero-initialised gradients.
    return {sums,
            rounded,
            batch,
            kv_head,
            launch.params.shape.num_keys,
            launch.params.accumulate || launch.head_parts > 1};
  }
  MLS_DEVICE GradientRows dk(const HopperBackwardLaunch& launch) const {
    return rows(launch, launch.params.dk, launch.params.rounded_dk);
  }
  MLS_DEVICE GradientRows dv(const HopperBackwardLaunch& launch) const {
    return rows(launch, launch.params.dv, launch.params.rounded_dv);
  }
};

// Run by all warps of the block: finds out which of its query tiles see its keys. The caller must synchronise
// the block afterwards.
template <class T>
MLS_DEVICE void classify_tiles(TileKind* kinds, const Visibility& visibility,
                               const HopperBackwardWork& work) {
  for (int tile = work.first_tile + warp_id(); tile < work.end_tile; tile += T::kThreads / kWarpSize) {
    const KeyBounds bounds = bounds_of_queries<T::kQueries>(visibility, tile * T::kQueries);
    const int end_key = work.first_key + T::kKeys;
    if (lane_id() == 0)
      kinds[tile] = bounds.misses(work.first_key, smaller(end_key, visibility.num_keys)) ? TileKind::kUnseen
                    : bounds.covers(work.first_key, end_key)                             ? TileKind::kWhole
                                                                                         : TileKind::kMasked;
  }
}

// Iterates over the tiles of a block, query head by query head. All of its warps use this order.
struct TileCursor {
  const TileKind* kinds;
  int first_tile, end_tile, end_head;
  int tile, head;  // done when head == end_head

  MLS_DEVICE TileCursor(const TileKind* kinds, const HopperBackwardWork& work)
      : kinds(kinds),
        first_tile(work.first_tile),
        end_tile(work.end_tile),
        end_head(work.end_head),
        tile(work.first_tile - 1),
        head(work.first_head) {
    advance();
  }
  MLS_DEVICE bool done() const { return head == end_head; }
  MLS_DEVICE void advance() {
    do {
      if (++tile < end_tile) continue;
      tile = first_tile;
      ++head;
    } while (head < end_head && kinds[tile] == TileKind::kUnseen);
  }
};

// Run by one producer thread: copies K, V, and every tile of Q and dO.
template <class T>
MLS_DEVICE void produce_tiles(const HopperBackwardLaunch& launch, const HopperBackwardShared<T>& shared,
                              const HopperBackwardWork& work) {
  HopperBackwardBarriers<T>& barriers = shared.barriers();
  barrier_expect(&barriers.keys_full, 2 * T::KeyTile::kBytes);
  copy_tile(shared.keys(), launch.k, &barriers.keys_full, work.first_key, work.kv_head, work.batch);
  copy_tile(shared.values(), launch.v, &barriers.keys_full, work.first_key, work.kv_head, work.batch);
  RingPosition<T::kStages> at;
  TileCursor cursor(shared.kinds(), work);
  for (; !cursor.done(); cursor.advance(), at.advance()) {
    Barrier *queries = &barriers.queries_full[at.stage], *grads = &barriers.grads_full[at.stage];
    const int first_query = cursor.tile * T::kQueries;
    barrier_wait(&barriers.tile_empty[at.stage], at.parity ^ 1);  // does not block in the first round
    barrier_expect(queries, T::QueryTile::kBytes);
    copy_tile(shared.queries(at.stage), launch.q, queries, first_query, cursor.head, work.batch);
    barrier_expect(grads, T::QueryTile::kBytes);
    copy_tile(shared.grads(at.stage), launch.dout, grads, first_query, cursor.head, work.batch);
  }
  barrier_wait(&barriers.tile_empty[at.stage], at.parity ^ 1);
  barrier_arrive(&barriers.queries_full[at.stage]);
}

// One loop per array, because the producer has few registers.
template <int kQueries>
MLS_DEVICE void fill_numbers(TileRows<kQueries>& rows, const BackwardParams& params, int batch, int head,
                             int first_query) {
  MLS_NO_UNROLL
  for (int i = lane_id(); i < kQueries; i += kWarpSize)
    rows.lse_log2[i] = lse_log2_of(params, batch, head, first_query + i);
  MLS_NO_UNROLL
  for (int i = lane_id(); i < kQueries; i += kWarpSize)
    rows.delta[i] = delta_of(params, batch, head, first_query + i);
}

template <int kQueries>
MLS_DEVICE void fill_intervals(TileRows<kQueries>& rows, const Visibility& visibility, int first_query) {
  MLS_NO_UNROLL
  for (int i = lane_id(); i < kQueries; i += kWarpSize) rows.seen[i] = visibility.keys_of(first_query + i);
}

// Run by one producer warp: writes the TileRows of every tile, then signals that there are no more tiles.
template <class T>
MLS_DEVICE void produce_rows(const BackwardParams& params, const HopperBackwardShared<T>& shared,
                             const HopperBackwardWork& work) {
  HopperBackwardBarriers<T>& barriers = shared.barriers();
  RingPosition<T::kStages> at;
  TileCursor cursor(shared.kinds(), work);
  for (bool any = true; any; cursor.advance(), at.advance()) {
    any = !cursor.done();
    barrier_wait(&barriers.tile_empty[at.stage], at.parity ^ 1);
    TileRows<T::kQueries>& rows = shared.rows(at.stage);
    const int first_query = cursor.tile * T::kQueries;
    if (any) fill_numbers(rows, params, work.batch, cursor.head, first_query);
    const bool masked = any && cursor.kinds[cursor.tile] == TileKind::kMasked;
    if (masked) fill_intervals(rows, Visibility(params.shape, params.mask), first_query);
    rows.any = any;
    rows.masked = masked;
    barrier_arrive(&barriers.queries_full[at.stage]);
  }
}

// Run by one producer thread per consumer: adds the consumer's columns of dQ to global memory, tile by tile.
template <class T>
MLS_DEVICE void send_query_gradient(const HopperBackwardLaunch& launch, const HopperBackwardShared<T>& shared,
                                    const HopperBackwardWork& work, int consumer) {
  using Gradient = typename T::QueryGradient;
  Barrier *full = &shared.barriers().dq_full[consumer], *empty = &shared.barriers().dq_empty[consumer];
  const Gradient gradient = shared.query_gradient(consumer);
  TileCursor cursor(shared.kinds(), work);
  for (int parity = 0; !cursor.done(); cursor.advance(), parity ^= 1) {
    barrier_wait(full, parity);
    MLS_UNROLL
    for (int panel = 0; panel < Gradient::kPanels; ++panel) {
      const int first_column = consumer * T::kDqColumns + panel * Gradient::kPanelColumns;
      if (first_column < T::kHeadDim)
        tensor_reduce_add(launch.dq, gradient.base + panel * Gradient::kPanelBytes, first_column,
                          cursor.tile * T::kQueries, cursor.head, work.batch);
    }
    tensor_reduce_commit();
    tensor_reduce_wait_read();
    barrier_arrive(empty);
  }
}

// Assigns the warps of the producer warpgroup to their tasks.
template <class T>
MLS_DEVICE void produce(const HopperBackwardLaunch& launch, const HopperBackwardShared<T>& shared,
                        const HopperBackwardWork& work) {
  give_registers<T::kProducerRegisters>();
  if (warp_id() == 3)
    produce_rows<T>(launch.params, shared, work);
  else if (lane_id() == 0 && warp_id() == 2)
    produce_tiles<T>(launch, shared, work);
  else if (T::kWithDq && lane_id() == 0)
    send_query_gradient<T>(launch, shared, work, warp_id());
}

}  // namespace mls::cuda
