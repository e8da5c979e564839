// The four operations on pieces. A task is one piece of the heads that share q, k or v.
#pragma once
#include <numeric>

#include "block.h"
#include "kernel.h"

namespace mls::cpu::MLS_VARIANT {

// Heads that share nothing with others' go to different tasks.
inline int64_t groups_of(const LinearShape& shape) {
  return std::gcd(std::gcd(shape.q_heads, shape.k_heads), std::gcd(shape.v_heads, shape.heads));
}

inline int64_t blocks_of(const LinearShape& shape) {
  return ceil_div(shape.piece, kBlock);
}

template <class Decay>
class LinearPiece {
 public:
  LinearPiece(const LinearParams& params, ScratchCursor& scratch)
      : p_(params),
        s_(params.shape),
        block_(params, scratch),
        pairs_(new_matrix(scratch, kBlock, kBlock)),
        state_(new_matrix(scratch, s_.key_dim, s_.value_dim)),
        written_(new_matrix(scratch, kBlock, s_.value_dim)),
        rows_(new_matrix(scratch, kBlock, s_.value_dim)) {}

  void at(int64_t piece, int64_t batch, int64_t head) {
    piece_ = piece, batch_ = batch, head_ = head;
    map_ = (piece * s_.batch + batch) * s_.heads + head;
  }

  // The piece as a map of states, from a state of zero and from a unit matrix.
  void summarise(Matrix unit, Matrix unit_written) {
    const int64_t rows = block_.has_rule() ? s_.key_dim : block_.decay.transition_rows();
    float* const transition = p_.transition + map_ * rows * (block_.has_rule() ? s_.key_dim : 1);
    clear(state_, 0, padded(s_.key_dim));
    if (block_.has_rule()) {
      clear(unit, 0, padded(s_.key_dim));
      for (int64_t d = 0; d < s_.key_dim; ++d) unit.row(d)[d] = 1;
    } else {
      block_.decay.start_transition(transition);
    }
    for (int64_t b = 0; b < blocks_of(s_); ++b) {
      block_.load_gates(block_at(b));
      block_.load_keys(pairs_);
      block_.step(state_, block_.written(state_, s_.value_dim, true, written_), s_.value_dim);
      if (block_.has_rule()) {
        block_.step(unit, block_.written(unit, s_.key_dim, false, unit_written), s_.key_dim);
      } else {
        block_.decay.add_to_transition(transition);
      }
    }
    if (block_.has_rule()) store_matrix(unit, s_.key_dim, s_.key_dim, transition);
    store_matrix(state_, s_.key_dim, s_.value_dim, state_at(p_.write));
  }

  // The output, from the state that enters the piece.
  void forward() {
    load_matrix(state_at(p_.states), state_);
    for (int64_t b = 0; b < blocks_of(s_); ++b) {
      block_.load_gates(block_at(b));
      block_.load_keys(pairs_);
      block_.load_queries();
      block_.load_scores();
      const Matrix written = block_.written(state_, s_.value_dim, true, written_);
      const int64_t count = block_.at.count;
      product(block_.queries, state_, rows_, count, s_.key_dim, s_.value_dim);
      product(block_.scores, written, rows_, count, count, s_.value_dim, Triangle::kLeft, 1);
      store_rows(p_.out, head_, block_.at, s_.value_dim, rows_, 1, false);
      block_.step(state_, written, s_.value_dim);
    }
  }

  // The gradient of the entering state by the piece's own outputs.
  void summarise_backward() {
    clear(state_, 0, padded(s_.key_dim));
    for (int64_t b = blocks_of(s_) - 1; b >= 0; --b) {
      block_.load_gates(block_at(b));
      block_.load_queries();
      load_rows(p_.element_type, p_.dout, head_, block_.at, s_.value_dim, rows_);
      if (block_.has_rule()) {
        block_.load_keys(pairs_);
        block_.load_scores();
        block_.gradient_of_written(rows_, state_, written_);
      }
      block_.step_back(rows_, written_, state_);
    }
    store_matrix(state_, s_.key_dim, s_.value_dim, state_at(p_.gives));
  }

 protected:
  BlockAt block_at(int64_t b) const {
    const int64_t first = b * kBlock;
    return {batch_, head_, piece_ * s_.piece + first, std::min(kBlock, s_.piece - first)};
  }
  template <typename T>
  T* state_at(T* states) const {
    return states + map_ * s_.key_dim * s_.value_dim;
  }
  void load_matrix(const float* from, Matrix to) const {
    for (int64_t d = 0; d < s_.key_dim; ++d)
      load_row<Float32>(from + d * s_.value_dim, s_.value_dim, to.row(d));
    clear(to, s_.key_dim, padded(s_.key_dim));
  }
  static void store_matrix(Matrix from, int64_t rows, int64_t columns, float* to) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from.row(i), columns, to + i * columns);
  }

  const LinearParams& p_;
  const LinearShape& s_;
  LinearBlock<Decay> block_;
  const Matrix pairs_, state_, written_, rows_;
  int64_t piece_ = 0, batch_ = 0, head_ = 0, map_ = 0;
};

template <class Decay>
class LinearPieceBackward : LinearPiece<Decay> {
  using Base = LinearPiece<Decay>;
  using Base::block_, Base::p_, Base::s_, Base::state_, Base::written_, Base::rows_, Base::head_;

 public:
  using Base::at;

  LinearPieceBackward(const LinearParams& params, ScratchCursor& scratch)
      : Base(params, scratch),
        // Of every block of the piece: the state that enters it, what it writes, products of its keys.
        states_(many(scratch, s_.key_dim, s_.value_dim)),
        written_by_(block_.has_rule() ? many(scratch, kBlock, s_.value_dim) : Matrix{}),
        pairs_of_(block_.has_rule() ? many(scratch, kBlock, kBlock) : Matrix{}),
        dwritten_(new_matrix(scratch, kBlock, s_.value_dim)),
        columns_(new_matrix(scratch, s_.value_dim, std::max(kBlock, s_.key_dim))),
        state_columns_(new_matrix(scratch, s_.value_dim, s_.key_dim)),
        through_(new_matrix(scratch, kBlock, kBlock)),
        into_(new_matrix(scratch, kBlock, s_.key_dim)),
        dq_(new_matrix(scratch, kBlock, s_.key_dim)),
        dk_(new_matrix(scratch, kBlock, s_.key_dim)) {}

  // All gradients, from the entering state and the gradient of the state behind the piece.
  void backward() {
    this->load_matrix(this->state_at(p_.states), state_);
    for (int64_t b = 0; b < blocks_of(s_); ++b) enter(b);
    this->load_matrix(this->state_at(p_.behind), state_);
    for (int64_t b = blocks_of(s_) - 1; b >= 0; --b) leave(b);
  }

 private:
  Matrix many(ScratchCursor& scratch, int64_t rows, int64_t columns) const {
    return new_matrix(scratch, blocks_of(s_) * padded(rows), columns);
  }
  Matrix of_block(Matrix all, int64_t b, int64_t rows) const {
    return {all.data == nullptr ? nullptr : all.row(b * padded(rows)), all.stride};
  }

  // Keeps what the backward pass over a block needs, and steps to the next.
  void enter(int64_t b) {
    const Matrix kept = of_block(states_, b, s_.key_dim);
    std::memcpy(kept.data, state_.data, padded(s_.key_dim) * state_.stride * sizeof(float));
    if (b + 1 == blocks_of(s_) && !block_.has_rule()) return;
    block_.load_gates(this->block_at(b));
    block_.load_keys(of_block(pairs_of_, b, kBlock));
    const Matrix result = of_block(written_by_, b, kBlock);
    const Matrix written = block_.written(state_, s_.value_dim, true, result);
    if (block_.has_rule()) clear(written, block_.at.count, padded(block_.at.count));
    block_.step(state_, written, s_.value_dim);
  }

  void leave(int64_t b) {
    const Matrix state = of_block(states_, b, s_.key_dim), pairs = of_block(pairs_of_, b, kBlock);
    block_.load_gates(this->block_at(b));
    block_.load_keys(pairs, true);
    block_.load_queries();
    block_.load_scores();
    load_rows(p_.element_type, p_.dout, head_, block_.at, s_.value_dim, rows_);
    const Matrix written = block_.has_rule() ? of_block(written_by_, b, kBlock) : block_.v;
    block_.decay.start_gradients();
    block_.decay.add_keep(state, state_, s_.value_dim);
    add_outer_keys(written);
    block_.gradient_of_written(rows_, state_, dwritten_);
    add_outer_queries(state);
    transpose_into(written, columns_, block_.at.count, s_.value_dim);
    if (block_.has_rule()) add_rule(pairs);
    add_scores();
    store_gradients();
    block_.step_back(rows_, dwritten_, state_);
  }

  // Through keys^T U, which went into the state behind the block.
  void add_outer_keys(Matrix written) {
    const int64_t count = block_.at.count;
    transpose_into(state_, columns_, s_.key_dim, s_.value_dim);
    product(written, columns_, dk_, count, s_.value_dim, s_.key_dim);
    for (int64_t i = 0; i < count; ++i) {
      block_.decay.add_until(i, block_.keys.row(i), dk_.row(i));
      for (int64_t c = 0; c < dk_.stride; c += kLanes)
        store(dk_.row(i) + c, load(dk_.row(i) + c) * block_.decay.until(i, c));
    }
  }

  // Through queries S, and with the delta rule into S.
  void add_outer_queries(Matrix state) {
    const int64_t count = block_.at.count;
    transpose_into(state, state_columns_, s_.key_dim, s_.value_dim);
    product(rows_, state_columns_, dq_, count, s_.value_dim, s_.key_dim);
    for (int64_t i = 0; i < count; ++i) {
      block_.decay.add_since(i, block_.queries.row(i), dq_.row(i));
      for (int64_t c = 0; c < dq_.stride; c += kLanes)
        store(dq_.row(i) + c, load(dq_.row(i) + c) * block_.decay.since(i, c));
    }
    if (!block_.has_rule()) return;
    product(dwritten_, state_columns_, into_, count, s_.value_dim, s_.key_dim, Triangle::kNone, 0, -1);
    for (int64_t i = 0; i < count; ++i) {
      block_.decay.add_since(i, block_.into.row(i), into_.row(i));
      Vec sum{};
      for (int64_t c = 0; c < dk_.stride; c += kLanes) {
        const Vec decayed = load(into_.row(i) + c) * block_.decay.since(i, c);
        sum += decayed * load(block_.k.row(i) + c);
        store(dk_.row(i) + c, load(dk_.row(i) + c) + decayed * block_.beta[i]);
      }
      dbeta_[i] = sum_lanes(sum) + dot(dwritten_.row(i), block_.v.row(i), dwritten_.stride);
    }
  }

  // Through the triangular matrix of the delta rule.
  void add_rule(Matrix pairs) {
    const int64_t count = block_.at.count;
    product(dwritten_, columns_, through_, count, s_.value_dim, count, Triangle::kResult, 0, -1);
    block_.hide(through_);
    for (int64_t i = 0; i < count; ++i) {
      float* const row = through_.row(i);
      row[i] = 0;
      dbeta_[i] += dot(row, pairs.row(i), padded(count));
      for (int64_t c = 0; c < padded(count); c += kLanes) store(row + c, load(row + c) * block_.beta[i]);
    }
    block_.decay.add_pairs(through_, pairs, block_.k, block_.k, dk_, dk_);
  }

  void add_scores() {
    const int64_t count = block_.at.count;
    product(rows_, columns_, through_, count, s_.value_dim, count, Triangle::kResult);
    block_.hide(through_);
    block_.decay.add_pairs(through_, block_.scores, block_.q, block_.k, dq_, dk_);
  }

  void store_gradients() {
    const BlockAt& at = block_.at;
    store_rows(p_.dq, block_.head_of(s_.q_heads), at, s_.key_dim, dq_, p_.scale,
               !block_.is_first_of(s_.q_heads));
    store_rows(p_.dk, block_.head_of(s_.k_heads), at, s_.key_dim, dk_, 1, !block_.is_first_of(s_.k_heads));
    Matrix dv = dwritten_;
    if (block_.has_rule()) {
      dv = written_;
      for_vectors(at.count, dv.stride, [&](int64_t i, int64_t c) {
        store(dv.row(i) + c, load(dwritten_.row(i) + c) * block_.beta[i]);
      });
      float* const first = p_.dbeta.data + at.first * p_.dbeta.token_stride +
                           at.batch * p_.dbeta.batch_stride + at.head * p_.dbeta.head_stride;
      for (int64_t i = 0; i < at.count; ++i) first[i * p_.dbeta.token_stride] = dbeta_[i];
    }
    store_rows(p_.dv, block_.head_of(s_.v_heads), at, s_.value_dim, dv, 1, !block_.is_first_of(s_.v_heads));
    block_.decay.store_gradients(p_.dlog_decay);
  }

  const Matrix states_, written_by_, pairs_of_;
  const Matrix dwritten_, columns_, state_columns_, through_, into_, dq_, dk_;
  float dbeta_[kBlock];
};

// Calls f(piece, batch, head) for the heads of a task.
template <class F>
MLS_INLINE void for_heads(const LinearShape& shape, int64_t task, F f) {
  const int64_t groups = groups_of(shape), heads = shape.heads / groups;
  const int64_t group = task % groups, batch = task / groups % shape.batch,
                piece = task / groups / shape.batch;
  for (int64_t h = 0; h < heads; ++h) f(piece, batch, group * heads + h);
}

// One task of one operation; with a null scratch it only counts bytes.
template <class Decay>
size_t linear_task(const LinearParams& params, LinearOperation operation, int64_t task, void* memory) {
  ScratchCursor scratch(memory);
  if (operation == LinearOperation::kBackward) {
    LinearPieceBackward<Decay> piece(params, scratch);
    if (memory != nullptr) {
      for_heads(params.shape, task,
                [&](int64_t n, int64_t b, int64_t h) { piece.at(n, b, h), piece.backward(); });
    }
    return scratch.used();
  }
  LinearPiece<Decay> piece(params, scratch);
  const bool maps = operation == LinearOperation::kSummarise && params.beta.data != nullptr;
  const Matrix unit = maps ? new_matrix(scratch, params.shape.key_dim, params.shape.key_dim) : Matrix{};
  const Matrix unit_written = maps ? new_matrix(scratch, kBlock, params.shape.key_dim) : Matrix{};
  if (memory == nullptr) return scratch.used();
  for_heads(params.shape, task, [&](int64_t n, int64_t b, int64_t h) {
    piece.at(n, b, h);
    if (operation == LinearOperation::kSummarise) piece.summarise(unit, unit_written);
    if (operation == LinearOperation::kForward) piece.forward();
    if (operation == LinearOperation::kSummariseBackward) piece.summarise_backward();
  });
  return scratch.used();
}

inline size_t any_linear_task(const LinearParams& params, LinearOperation operation, int64_t task,
                              void* memory) {
  return params.decays_channels ? linear_task<ChannelDecay>(params, operation, task, memory)
                                : linear_task<HeadDecay>(params, operation, task, memory);
}

inline int64_t linear_tasks(const LinearShape& shape) {
  return shape.pieces() * shape.batch * groups_of(shape);
}

}  // namespace mls::cpu::MLS_VARIANT
