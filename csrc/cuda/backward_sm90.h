// Fused attention backward for compute capability 9.0a (an independent implementation of FlashAttention-3's
// structure).
//
// As in backward_sm80.h, a block owns keys of one key/value head, here 128, and iterates over the query tiles
// that see them. In the producer warpgroup, one thread issues TMA copies of Q and dO tiles into a ring
// buffer, one warp writes lse, delta and the mask of each query to the same stage, and two more threads add
// dQ to global memory with TMA reductions, which the L2 cache performs. Two consumer warpgroups with 64 keys
// each use wgmma: S^T = K Q^T and dP^T = V dO^T leave P^T and dS^T in registers as operands of dV and dK.
// Only dS goes through shared memory, for dQ = dS K, of which each consumer computes half the columns. The
// softmax overlaps with dP, dS with dV, the store of dQ with dK, and the two consumers with each other.
#pragma once
#include "cuda/backward_sm90_tiles.h"
#include "cuda/hopper_launch.h"
#include "cuda/softcap.h"

namespace mls::cuda {

// What a consumer warpgroup accumulates for its 64 keys, and its columns of dQ.
template <class T>
struct HopperBackwardState {
  float dk[T::kHeadDim / 8][4];
  float dv[T::kHeadDim / 8][4];
  float dq[T::kDqColumns / 8][4];
  float scores[T::kQueries / 8][4];          // S^T, then P^T
  float grads[T::kQueries / 8][4];           // dP^T, then dS^T
  uint32_t p_operand[T::kQueries / 16][4];   // P^T in 16 bits
  uint32_t ds_operand[T::kQueries / 16][4];  // dS^T in 16 bits
  // K and V of its 64 keys, if they are kept in registers.
  uint32_t keys[T::kHoldsKeys ? T::kHeadDim / 16 : 1][4];
  uint32_t values[T::kHoldsKeys ? T::kHeadDim / 16 : 1][4];
};

// Loads a warp's 16 rows of a tile into registers, as A operands.
template <class Tile, int kSteps>
MLS_DEVICE void load_operands(uint32_t (&a)[kSteps][4], const Tile& tile, int first_row) {
  const int lane = lane_id();
  MLS_UNROLL
  for (int step = 0; step < kSteps; ++step)
    ldmatrix_x4(a[step], tile.chunk(first_row + (lane & 15), step * 2 + (lane >> 4)));
}

// Issues sums = 64 rows in registers times `b` transposed (K Q^T or V dO^T), without waiting.
template <class T, int kSteps>
MLS_DEVICE void issue_transposed(float (&sums)[T::kQueries / 8][4], uint32_t (&a)[kSteps][4],
                                 const typename T::QueryTile& b) {
  hold(sums);
  hold(a);
  wgmma_fence();
  MLS_UNROLL
  for (int step = 0; step < kSteps; ++step)
    Wgmma<typename T::Element, T::kQueries>::template from_registers<false>(
        sums, a[step], b.along_columns(0, step * 16), step > 0);
  wgmma_commit();
}

// The same with the 64 rows in shared memory.
template <class T>
MLS_DEVICE void issue_transposed(float (&sums)[T::kQueries / 8][4], const typename T::KeyTile& a,
                                 int first_row, const typename T::QueryTile& b) {
  hold(sums);
  wgmma_fence();
  MLS_UNROLL
  for (int k = 0; k < T::kHeadDim; k += 16)
    Wgmma<typename T::Element, T::kQueries>::template from_shared<false, false>(
        sums, a.along_columns(first_row, k), b.along_columns(0, k), k > 0);
  wgmma_commit();
}

// Issues grad += the transposed scores times Q or dO, without waiting.
template <class T>
MLS_DEVICE void issue_key_gradient(float (&grad)[T::kHeadDim / 8][4], uint32_t (&scores)[T::kQueries / 16][4],
                                   const typename T::QueryTile& tile) {
  hold(grad);
  hold(scores);
  wgmma_fence();
  MLS_UNROLL
  for (int step = 0; step < T::kQueries / 16; ++step)
    multiply_by_rows<typename T::Element>(grad, scores[step], tile, step * 16);
  wgmma_commit();
}

// Masks S^T of a warp's 16 keys from first_key on: -inf where the query does not see the key.
template <int kTiles, int kQueries>
MLS_DEVICE void mask_transposed(float (&scores)[kTiles][4], const TileRows<kQueries>& rows, int first_key) {
  MLS_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    MLS_UNROLL
    for (int e = 0; e < 4; ++e)
      if (!rows.seen[fragment_column(j, e)].contains(first_key + fragment_row(e))) scores[j][e] = -infinity();
  }
}

template <class T>
struct HopperBackwardConsumer {
  const HopperBackwardShared<T>& shared;
  HopperBackwardBarriers<T>& barriers;
  int consumer;   // index among the consumer warpgroups
  int warp_row;   // first of the warp's 16 keys, within the block's tile
  int first_key;  // first key of the block
  const BackwardParams& params;

  MLS_DEVICE void issue_scores(HopperBackwardState<T>& state, int stage) const {
    if constexpr (T::kHoldsKeys)
      issue_transposed<T>(state.scores, state.keys, shared.queries(stage));
    else
      issue_transposed<T>(state.scores, shared.keys(), consumer * 64, shared.queries(stage));
  }

  MLS_DEVICE void issue_probability_gradients(HopperBackwardState<T>& state, int stage) const {
    if constexpr (T::kHoldsKeys)
      issue_transposed<T>(state.grads, state.values, shared.grads(stage));
    else
      issue_transposed<T>(state.grads, shared.values(), consumer * 64, shared.grads(stage));
  }

  // S^T -> P^T
  MLS_DEVICE void make_probabilities(HopperBackwardState<T>& state, int stage) const {
    const auto& rows = shared.rows(stage);
    const ScoreMap<T::kCaps> map(params);
    map.apply(state.scores);
    if (rows.masked) mask_transposed(state.scores, rows, first_key + warp_row);
    MLS_UNROLL
    for (int step = 0; step < T::kQueries / 16; ++step) {
      MLS_UNROLL
      for (int j = 2 * step; j < 2 * step + 2; ++j) {
        MLS_UNROLL
        for (int e = 0; e < 4; ++e) {
          state.scores[j][e] =
              exp2_approx(state.scores[j][e] * map.scale_log2 - rows.lse_log2[fragment_column(j, e)]);
        }
      }
      to_a<typename T::Element>(state.p_operand[step], state.scores, step);
    }
  }

  // dP^T -> dS^T = P^T (dP^T - delta), without the softmax scale, which is applied to dQ and dK at the end.
  MLS_DEVICE void make_score_gradients(HopperBackwardState<T>& state, int stage) const {
    const auto& rows = shared.rows(stage);
    const ScoreMap<T::kCaps> map(params);
    MLS_UNROLL
    for (int step = 0; step < T::kQueries / 16; ++step) {
      MLS_UNROLL
      for (int j = 2 * step; j < 2 * step + 2; ++j) {
        MLS_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int query = fragment_column(j, e);
          // In this order, because the other one spills registers.
          if constexpr (T::kCaps)
            state.scores[j][e] *= map.slope_of_probability(state.scores[j][e], rows.lse_log2[query]);
          state.grads[j][e] = state.scores[j][e] * (state.grads[j][e] - rows.delta[query]);
        }
      }
      to_a<typename T::Element>(state.ds_operand[step], state.grads, step);
    }
  }

  // Writes dS^T to shared memory for all consumers. The fragments of 16 queries already have the layout of
  // four 8 x 8 matrices.
  MLS_DEVICE void share_score_gradients(const HopperBackwardState<T>& state, int score_stage) const {
    const int lane = lane_id(), row = warp_row + (lane & 15), second = lane >> 4;
    const auto tile = shared.scores(score_stage);
    MLS_UNROLL
    for (int step = 0; step < T::kQueries / 16; ++step)
      stmatrix_x4(tile.chunk(row, step * 2 + second), state.ds_operand[step]);
    proxy_fence();
    named_barrier_sync(1, T::kConsumers * kWarpgroupSize);
  }

  // Issues dq = dS K, without waiting.
  MLS_DEVICE void issue_query_gradient(HopperBackwardState<T>& state, int score_stage) const {
    hold(state.dq);
    wgmma_fence();
    MLS_UNROLL
    for (int k = 0; k < T::kKeys; k += 16)
      Wgmma<typename T::Element, T::kDqColumns>::template from_shared<true, true>(
          state.dq, shared.scores(score_stage).along_rows(0, k),
          shared.keys().along_rows(consumer * T::kDqColumns, k), k > 0);
    wgmma_commit();
  }

  MLS_DEVICE void store_query_gradient(HopperBackwardState<T>& state, int turn) const {
    hold(state.dq);
    barrier_wait(&barriers.dq_empty[consumer], turn ^ 1);  // does not block the first time
    store_fragments(shared.query_gradient(consumer), state.dq, warp_row % 64, params.softmax_scale);
    proxy_fence();
    arrive_as_warp(&barriers.dq_full[consumer]);
  }
};

// Run by one consumer warpgroup: iterates over all its queries. ptxas does not allow a product to be in
// flight across iterations of the loop.
template <class T>
MLS_DEVICE void consume_queries(HopperBackwardState<T>& state, const HopperBackwardConsumer<T>& consumer) {
  const auto& shared = consumer.shared;
  auto& barriers = consumer.barriers;
  RingPosition<T::kStages> at;
  barrier_wait(&barriers.keys_full, 0);
  if constexpr (T::kHoldsKeys) {
    load_operands(state.keys, shared.keys(), consumer.warp_row);
    load_operands(state.values, shared.values(), consumer.warp_row);
  }
  for (int turn = 0;; turn ^= 1, at.advance()) {  // stage of dS, and parity of dQ's barriers
    barrier_wait(&barriers.queries_full[at.stage], at.parity);
    if (!any_lane(shared.rows(at.stage).any)) return;
    consumer.issue_scores(state, at.stage);
    barrier_wait(&barriers.grads_full[at.stage], at.parity);
    consumer.issue_probability_gradients(state, at.stage);
    wgmma_wait<1>();
    hold(state.scores);
    consumer.make_probabilities(state, at.stage);
    issue_key_gradient<T>(state.dv, state.p_operand, shared.grads(at.stage));
    wgmma_wait<1>();  // all but dV
    hold(state.grads);
    consumer.make_score_gradients(state, at.stage);
    if constexpr (T::kWithDq) {
      consumer.share_score_gradients(state, turn);
      consumer.issue_query_gradient(state, turn);
    }
    issue_key_gradient<T>(state.dk, state.ds_operand, shared.queries(at.stage));
    wgmma_wait<1>();  // all but dK
    hold(state.dv);
    hold(state.p_operand);
    if constexpr (T::kWithDq) consumer.store_query_gradient(state, turn);
    wgmma_wait<0>();
    hold(state.dk);
    hold(state.ds_operand);
    arrive_as_warp(&barriers.tile_empty[at.stage]);
  }
}

// Like write_rows, but for rows that other blocks add to concurrently.
template <int kTiles>
MLS_DEVICE void add_shared_rows(const GradientRows& target, const float (&grad)[kTiles][4], int first_row,
                                float scale) {
  MLS_UNROLL
  for (int e = 0; e < 4; e += 2) {
    const int row = first_row + fragment_row(e);
    if (row >= target.num_rows) continue;
    float* sums = target.sums + row * target.stride;
    MLS_UNROLL
    for (int j = 0; j < kTiles; ++j)
      atomic_add_pair(sums + fragment_column(j, 0), grad[j][e] * scale, grad[j][e + 1] * scale);
  }
}

template <class T>
MLS_DEVICE void consume(const HopperBackwardLaunch& launch, const HopperBackwardShared<T>& shared,
                        const HopperBackwardWork& work) {
  const BackwardParams& params = launch.params;
  take_registers<T::kConsumerRegisters>();
  const int warp_row = (warpgroup_id() - 1) * 64 + warp_id() % 4 * 16;
  HopperBackwardState<T> state;
  set_zero(state.dk);
  set_zero(state.dv);
  consume_queries<T>(state,
                     {shared, shared.barriers(), warpgroup_id() - 1, warp_row, work.first_key, params});
  const int first_row = work.first_key + warp_row;
  if (launch.head_parts > 1) {
    add_shared_rows(work.dk(launch), state.dk, first_row, params.softmax_scale);
    add_shared_rows(work.dv(launch), state.dv, first_row, 1.0f);
    return;
  }
  write_rows<typename T::Element>(work.dk(launch), state.dk, first_row, 0, params.softmax_scale);
  write_rows<typename T::Element>(work.dv(launch), state.dv, first_row, 0, 1.0f);
}

// The keys, heads and sequence of this block.
template <class T>
MLS_DEVICE HopperBackwardWork place_of_block(const HopperBackwardLaunch& launch) {
  const WorkOrder::Place place = launch.order.place(static_cast<int>(block_index().x));
  const auto& shape = launch.params.shape;
  const int num_kv_heads = static_cast<int>(shape.num_kv_heads),
            heads = static_cast<int>(shape.num_heads) / (num_kv_heads * launch.head_parts);
  const int kv_unit = place.unit / launch.head_parts, part = place.unit % launch.head_parts;
  HopperBackwardWork work;
  work.first_key = place.tile * T::kKeys;
  work.batch = kv_unit / num_kv_heads;
  work.kv_head = kv_unit % num_kv_heads;
  work.first_head = (work.kv_head * launch.head_parts + part) * heads;
  work.end_head = work.first_head + heads;
  return work;
}

template <class T>
MLS_DEVICE void backward_block_sm90(const HopperBackwardLaunch& launch, unsigned char* memory) {
  const BackwardParams& params = launch.params;
  const HopperBackwardShared<T> shared{memory};
  const Visibility visibility(params.shape, params.mask);
  HopperBackwardWork work = place_of_block<T>(launch);
  const int end_key = smaller(work.first_key + T::kKeys, visibility.num_keys);
  work.first_tile = larger(work.first_key - visibility.band_hi, 0) / T::kQueries;
  work.end_tile =
      (smaller(end_key - visibility.band_lo, visibility.num_queries) + T::kQueries - 1) / T::kQueries;
  if (work.first_tile >= work.end_tile) {
    write_empty_rows<T::kKeys, T::kHeadDim, T::kThreads>(work.dk(launch), work.first_key);
    write_empty_rows<T::kKeys, T::kHeadDim, T::kThreads>(work.dv(launch), work.first_key);
    return;
  }
  if (thread_index().x == 0) shared.barriers().init();
  classify_tiles<T>(shared.kinds(), visibility, work);
  sync_threads();
  if (warp_id() < 4)
    produce<T>(launch, shared, work);
  else
    consume<T>(launch, shared, work);
}

// One block per place of the work order.
template <class T>
MLS_KERNEL(T::kThreads, 1)
attention_backward_sm90(const MLS_GRID_CONSTANT HopperBackwardLaunch launch) {
  MLS_SHARED_MEMORY(memory);
  if constexpr (kCompilesSm90a) backward_block_sm90<T>(launch, memory);
}

// At most `most` queries from first_query on, with the same keys.
inline BackwardParams queries_from(const BackwardParams& params, int64_t first_query, int64_t most) {
  BackwardParams part = params;
  part.accumulate = params.accumulate || first_query > 0;
  const int64_t left = params.shape.num_queries - first_query;
  part.shape.num_queries = left < most ? left : most;
  for (TokenTensor<const void>* input : {&part.q, &part.dout})
    input->data = static_cast<const uint16_t*>(input->data) + first_query * input->token_stride;
  if (part.dq.data != nullptr) part.dq.data += first_query * part.dq.token_stride;
  part.lse.data += first_query * part.lse.query_stride;
  part.delta.data += first_query * part.delta.query_stride;
  part.mask.band_lo += first_query;
  part.mask.band_hi += first_query;
  if (part.mask.range_begin != nullptr) {
    part.mask.range_begin += first_query;
    part.mask.range_end += first_query;
  }
  return part;
}

constexpr const char* kRoundedTooLong =
    "dk and dv must be fp32 when the queries need several launches, whose results are added";

template <class T>
bool HopperBackwardLaunch::describe() {
  const auto& shape = params.shape;
  const int64_t queries[] = {shape.head_dim, shape.num_queries, shape.num_heads, shape.batch};
  const int64_t keys[] = {shape.head_dim, shape.num_keys, shape.num_kv_heads, shape.batch};
  const ElementType type = params.element_type;
  return make_tensor_map(&q, params.q, queries, type, T::kQueries) &&
         make_tensor_map(&dout, params.dout, queries, type, T::kQueries) &&
         make_tensor_map(&k, params.k, keys, type, T::kKeys) &&
         make_tensor_map(&v, params.v, keys, type, T::kKeys) &&
         (!T::kWithDq || make_tensor_map(&dq, params.dq, queries, T::kQueries));
}

// Like launch_hopper, but with several launches if there are more than kMaxTiles query tiles.
template <class T>
bool launch_backward_sm90(const BackwardParams& params, const BackwardOptions& options, void* stream,
                          const char** failure) {
  constexpr int64_t kMost = static_cast<int64_t>(T::kMaxTiles) * T::kQueries;
  const auto& shape = params.shape;
  if (shape.num_queries > kMost && (params.dk.data == nullptr || params.dv.data == nullptr)) {
    *failure = kRoundedTooLong;
    return true;
  }
  WorkOrder order;
  // A block processes its query heads one after another, so it uses the queries of one head at a time.
  *failure = make_order(&order, (shape.num_keys + T::kKeys - 1) / T::kKeys,
                        shape.num_kv_heads * shape.batch * options.head_parts, query_bytes_of_head(shape));
  for (int64_t first = 0; first < shape.num_queries && *failure == nullptr; first += kMost) {
    HopperBackwardLaunch arguments{
        queries_from(params, first, kMost), order, options.head_parts, {}, {}, {}, {}, {}};
    // Support depends only on strides and alignment, so if any launch is refused, the first one is.
    if (!launch_hopper<T>(&attention_backward_sm90<T>, order.blocks(), HopperBackwardShared<T>::kBytes,
                          stream, arguments, failure))
      return false;
  }
  return true;
}

}  // namespace mls::cuda
