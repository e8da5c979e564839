// One block of one head: its inputs, what follows from them without a state, and the steps of states and of
// their gradients. For every kind of linear attention, with R the right side of the delta rule:
//
//   U = (I + L)^-1 (beta V - into S), or V       out = queries S + scores U       S' = keep S + keys^T U
//
// and backward, dS' being the gradient of the state behind the block:
//
//   dU = scores^T dout + keys dS'                dR = (I + L)^-T dU               L = beta (K K^T), decayed
//   dS = keep dS' + queries^T dout - into^T dR
#pragma once
#include "visible.h"

namespace mls::cpu::MLS_VARIANT {

template <class Element>
void load_rows_of(const TokenTensor<const void>& tensor, int64_t head, const BlockAt& at, int64_t dim,
                  Matrix rows) {
  const auto values = typed<Element>(tensor);
  const auto* from = values.data + at.first * values.token_stride + at.batch * values.batch_stride +
                     head * values.head_stride;
  for (int64_t i = 0; i < at.count; ++i, from += values.token_stride)
    load_row<Element>(from, dim, rows.row(i));
}

// Rows of a block, and zeros behind them to whole vectors.
[[gnu::noinline]] inline void load_rows(ElementType type, const TokenTensor<const void>& tensor, int64_t head,
                                        const BlockAt& at, int64_t dim, Matrix rows) {
  if (type == ElementType::kFloat32) {
    load_rows_of<Float32>(tensor, head, at, dim, rows);
  } else {
    load_rows_of<BFloat16>(tensor, head, at, dim, rows);
  }
  clear(rows, at.count, padded(at.count));
}

// Stores rows of a block; with `add`, adds them to those of another head, which are in fp32.
[[gnu::noinline]] inline void store_rows(const LinearResult& to, int64_t head, const BlockAt& at, int64_t dim,
                                         Matrix rows, float factor, bool add) {
  const auto offset = [&](const auto& t, int64_t i) {
    return t.data + (at.first + i) * t.token_stride + at.batch * t.batch_stride + head * t.head_stride;
  };
  for (int64_t i = 0; i < at.count; ++i) {
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec value = load(rows.row(i) + c) * factor;
      if (to.rounded.data != nullptr) {
        store_some<BFloat16>(offset(to.rounded, i) + c, value, dim - c);
      } else if (!add) {
        store_some<Float32>(offset(to.exact, i) + c, value, dim - c);
      } else {
        float* const sum = offset(to.exact, i) + c;
        alignas(MLS_VEC_BYTES) float values[kLanes];
        store(values, value);
        for (int64_t d = 0; d < std::min<int64_t>(kLanes, dim - c); ++d) sum[d] += values[d];
      }
    }
  }
}

template <class Decay>
class LinearBlock {
 public:
  LinearBlock(const LinearParams& params, ScratchCursor& scratch)
      : params_(params),
        shape_(params.shape),
        decay(params, scratch),
        k(new_matrix(scratch, kBlock, shape_.key_dim)),
        v(new_matrix(scratch, kBlock, shape_.value_dim)),
        q(new_matrix(scratch, kBlock, shape_.key_dim)),
        keys(new_matrix(scratch, kBlock, shape_.key_dim)),
        queries(new_matrix(scratch, kBlock, shape_.key_dim)),
        into(new_matrix(scratch, kBlock, shape_.key_dim)),
        scores(new_matrix(scratch, kBlock, kBlock)),
        lower(new_matrix(scratch, kBlock, kBlock)),
        k_columns_(new_matrix(scratch, shape_.key_dim, kBlock)) {}

  bool has_rule() const { return params_.beta.data != nullptr; }

  // Which block, and its decays.
  void load_gates(const BlockAt& block) {
    at = block;
    visible_.load(params_.documents, at);
    decay.load_gates(at, visible_);
  }
  // Keys, values, and with the delta rule its triangular matrix. `pairs` holds the decayed products of keys;
  // they are computed unless they are known.
  void load_keys(Matrix pairs, bool known = false) {
    load_rows(params_.element_type, params_.k, head_of(shape_.k_heads), at, shape_.key_dim, k);
    load_rows(params_.element_type, params_.v, head_of(shape_.v_heads), at, shape_.value_dim, v);
    for_vectors(at.count, k.stride, [&](int64_t i, int64_t c) {
      store(keys.row(i) + c, load(k.row(i) + c) * decay.until(i, c));
    });
    has_pairs_ = false;
    if (has_rule()) load_rule(pairs, known);
  }
  void load_queries() {
    load_rows(params_.element_type, params_.q, head_of(shape_.q_heads), at, shape_.key_dim, q);
    for_vectors(at.count, q.stride, [&](int64_t i, int64_t c) {
      const Vec scaled = load(q.row(i) + c) * params_.scale;
      store(q.row(i) + c, scaled);
      store(queries.row(i) + c, scaled * decay.since(i, c));
    });
  }
  // Needs keys and queries.
  void load_scores() {
    load_pairs();
    decay.pairs(q, scores);
  }

  // What the block writes, U, for a state of `width` columns that enters it; with no values, what it makes of
  // the state alone. `written` is v itself without the delta rule.
  Matrix written(Matrix state, int64_t width, bool has_values, Matrix result) {
    if (!has_rule()) return v;
    if (has_values) {
      for_vectors(at.count, v.stride,
                  [&](int64_t i, int64_t c) { store(result.row(i) + c, load(v.row(i) + c) * beta[i]); });
    }
    product(into, state, result, at.count, shape_.key_dim, width, Triangle::kNone, has_values, -1);
    solve<false>(lower, result, at.count, width);
    return result;
  }
  // The state behind the block.
  void step(Matrix state, Matrix written, int64_t width) {
    decay.keep(state, width);
    transposed_product(keys, written, state, shape_.key_dim, at.count, width, Triangle::kNone,
                       decay.kept_factor());
  }

  // dR, or dU without the delta rule; for the gradient of the state behind the block.
  void gradient_of_written(Matrix dout, Matrix dstate, Matrix result) {
    transposed_product(scores, dout, result, at.count, at.count, shape_.value_dim, Triangle::kLeft);
    product(keys, dstate, result, at.count, shape_.key_dim, shape_.value_dim, Triangle::kNone, 1);
    if (has_rule()) solve<true>(lower, result, at.count, shape_.value_dim);
  }
  // The gradient of the state that enters the block.
  void step_back(Matrix dout, Matrix dwritten, Matrix dstate) {
    decay.keep(dstate, shape_.value_dim);
    transposed_product(queries, dout, dstate, shape_.key_dim, at.count, shape_.value_dim, Triangle::kNone,
                       decay.kept_factor());
    if (has_rule()) {
      transposed_product(into, dwritten, dstate, shape_.key_dim, at.count, shape_.value_dim, Triangle::kNone,
                         1, -1);
    }
  }

  int64_t head_of(int64_t heads) const { return at.head / (shape_.heads / heads); }
  bool is_first_of(int64_t heads) const { return at.head % (shape_.heads / heads) == 0; }
  // The factors that make a pair visible are 0 or not; so is the gradient of what is not seen.
  void hide(Matrix pairs) const {
    for (int64_t i = 0; i < at.count; ++i)
      keep_range(pairs.row(i), visible_.first[i], i + 1, padded(at.count));
  }

 private:
  const LinearParams& params_;
  const LinearShape& shape_;

 public:
  BlockAt at{};
  Decay decay;
  float beta[kBlock];
  const Matrix k, v, q;        // rows of the inputs; q scaled
  const Matrix keys, queries;  // decayed to the end of the block, and from its start
  const Matrix into;           // what is taken from values for each row of a state
  const Matrix scores, lower;  // C x C

 private:
  void load_pairs() {
    if (has_pairs_) return;
    has_pairs_ = true;
    transpose_into(k, k_columns_, at.count, shape_.key_dim);
    decay.load_pairs();
    decay.load_keys(k, k_columns_);
  }
  void load_rule(Matrix pairs, bool known) {
    const auto& strength = params_.beta;
    const float* const from = strength.data + at.first * strength.token_stride +
                              at.batch * strength.batch_stride + at.head * strength.head_stride;
    for (int64_t i = 0; i < at.count; ++i) beta[i] = from[i * strength.token_stride];
    if (!known) {
      load_pairs();
      decay.pairs(k, pairs);
    }
    for_vectors(at.count, padded(at.count),
                [&](int64_t i, int64_t c) { store(lower.row(i) + c, load(pairs.row(i) + c) * beta[i]); });
    for_vectors(at.count, k.stride, [&](int64_t i, int64_t c) {
      store(into.row(i) + c, load(k.row(i) + c) * decay.since(i, c) * beta[i]);
    });
  }

  const Matrix k_columns_;
  Visible visible_;
  bool has_pairs_ = false;
};

}  // namespace mls::cpu::MLS_VARIANT
