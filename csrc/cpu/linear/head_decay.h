// Decays of whole heads, or none, within a block.
//
// The decay of a token with itself is 1 whatever the gate is, and stays out of the exponents: with strong
// gates, a gradient through it would be a difference of equals. Differences of sums of gates are taken in
// two parts, so that those of neighbours are exact however far the sums have grown.
#pragma once
#include "../softmax.h"
#include "visible.h"

namespace mls::cpu::MLS_VARIANT {

class HeadDecay {
 public:
  HeadDecay(const LinearParams& params, ScratchCursor& scratch)
      : gates_(params.log_decay),
        key_dim_(params.shape.key_dim),
        between_(new_matrix(scratch, kBlock, kBlock)) {}

  bool decays() const { return gates_.data != nullptr; }

  // The factors of a block.
  void load_gates(const BlockAt& at, const Visible& visible) {
    at_ = at, visible_ = &visible;
    if (!decays()) {
      std::copy_n(visible.reached, kBlock, since_);
      std::copy_n(visible.leaving, kBlock, until_);
      keep_ = visible.kept;
      return;
    }
    const float* gate = gates_.data + at.first * gates_.token_stride + at.batch * gates_.batch_stride +
                        at.head * gates_.head_stride;
    double sum = 0, later[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      later[i] = i < at.count ? double{gate[i * gates_.token_stride]} * kLog2EDouble : 0;
      sum += later[i];
      sums_[i] = static_cast<float>(sum), rest_[i] = static_cast<float>(sum - sums_[i]);
    }
    keep_ = exp2(splat(sums_[kBlock - 1]))[0] * visible.kept;
    sum = 0;
    for (int64_t i = kBlock - 1; i >= 0; --i) {
      until_[i] = static_cast<float>(sum);
      sum += later[i];
    }
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      store(since_ + i, exp2(load(sums_ + i)) * load(visible.reached + i));
      store(until_ + i, exp2(load(until_ + i)) * load(visible.leaving + i));
    }
  }

  // The decay between every two tokens of the block, 0 where one does not see the other.
  void load_pairs() {
    for (int64_t i = 0; i < at_.count; ++i) {
      float* const row = between_.row(i);
      const Vec sum = splat(sums_[i]), rest = splat(rest_[i]);
      for (int64_t c = 0; c <= i; c += kLanes) {
        store(row + c, decays() ? exp2((sum - load(sums_ + c)) + (rest - load(rest_ + c))) : splat(1.0f));
      }
      keep_range(row, visible_->first[i], i + 1, padded(at_.count));
      if (visible_->first[i] <= i) row[i] = 1;
    }
  }

  MLS_INLINE Vec since(int64_t i, int64_t) const { return splat(since_[i]); }
  MLS_INLINE Vec until(int64_t i, int64_t) const { return splat(until_[i]); }
  float kept_factor() const { return keep_; }  // of a state, within the product that adds to it
  void keep(Matrix, int64_t) const {}

  // What a piece multiplies a state by, so far as no delta rule is in it.
  int64_t transition_rows() const { return 1; }
  void start_transition(float* transition) const { transition[0] = 1; }
  void add_to_transition(float* transition) const { transition[0] *= keep_; }

  // For both: keys are k and its transpose.
  void load_keys(Matrix, Matrix k_columns) { k_columns_ = k_columns; }
  // (rows of x) . (keys), decayed; for tokens that see each other.
  void pairs(Matrix x, Matrix result) {
    product(x, k_columns_, result, at_.count, key_dim_, at_.count, Triangle::kResult);
    const int64_t width = padded(at_.count);
    for (int64_t i = 0; i < at_.count; ++i) {
      for (int64_t c = 0; c < width; c += kLanes) {
        float* const to = result.row(i) + c;
        store(to, c <= i ? load(to) * load(between_.row(i) + c) : Vec{});
      }
    }
  }

  // Gradients. `through` of a pair is the gradient of its product, which is 0 for tokens that do not see each
  // other; it is overwritten.
  void start_gradients() {
    std::fill_n(by_pairs_, kBlock, 0.0f);
    std::fill_n(before_, kBlock, 0.0f);
    std::fill_n(behind_, kBlock, 0.0f);
    of_keep_ = 0;
  }
  // The gradient of the pairs of x: to dx those of its rows, to dk those of the keys.
  void add_pairs(Matrix through, Matrix products, Matrix x, Matrix k, Matrix dx, Matrix dk) {
    if (decays()) add_gates_between(through, products);
    for (int64_t i = 0; i < at_.count; ++i) {
      for (int64_t c = 0; c <= i; c += kLanes) {
        float* const to = through.row(i) + c;
        store(to, load(to) * load(between_.row(i) + c));
      }
    }
    product(through, k, dx, at_.count, at_.count, key_dim_, Triangle::kLeft, 1);
    transposed_product(through, x, dk, at_.count, at_.count, key_dim_, Triangle::kLeft, 1);
  }
  // The gradient of a row that decayed from the start of the block.
  MLS_INLINE void add_since(int64_t i, const float* row, const float* gradient) {
    if (decays()) before_[i] += dot(row, gradient, padded(key_dim_));
  }
  // The gradient of a row that decayed to the end of the block.
  MLS_INLINE void add_until(int64_t i, const float* row, const float* gradient) {
    if (decays()) behind_[i] += dot(row, gradient, padded(key_dim_));
  }
  void add_keep(Matrix state, Matrix gradient, int64_t width) {
    if (!decays() || keep_ == 0) return;
    float sum = 0;
    for (int64_t d = 0; d < key_dim_; ++d) sum += dot(state.row(d), gradient.row(d), padded(width));
    of_keep_ = sum * keep_;
  }
  void store_gradients(const TokenTensor<float>& to) {
    if (!decays()) return;
    float* const first =
        to.data + at_.first * to.token_stride + at_.batch * to.batch_stride + at_.head * to.head_stride;
    float later = 0, gradients[kBlock];
    for (int64_t i = at_.count - 1; i >= 0; --i) gradients[i] = later += before_[i];
    float earlier = of_keep_;
    for (int64_t i = 0; i < at_.count; ++i) {
      first[i * to.token_stride] = gradients[i] + by_pairs_[i] + earlier;
      earlier += behind_[i];
    }
  }

 private:
  static constexpr double kLog2EDouble = 1.4426950408889634074;

  // A gate acts on the pairs of an earlier token with its own or a later one: their sum, without a
  // difference.
  void add_gates_between(Matrix through, Matrix products) {
    alignas(MLS_VEC_BYTES) float sums[kBlock]{};
    alignas(MLS_VEC_BYTES) float own[kBlock];
    for (int64_t i = at_.count - 1; i > 0; --i) {
      const int64_t width = padded(i + 1);
      for (int64_t c = 0; c < width; c += kLanes)
        store(own + c, load(through.row(i) + c) * load(products.row(i) + c));
      keep_range(own, 0, i, width);
      Vec total{};
      keep_range(sums, 0, i, width);
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vec sum = load(sums + c) + load(own + c);
        store(sums + c, sum);
        total += sum;
      }
      by_pairs_[i] += sum_lanes(total);
    }
  }

  const TokenTensor<const float> gates_;
  const int64_t key_dim_;
  const Matrix between_;
  Matrix k_columns_{};
  BlockAt at_{};
  const Visible* visible_ = nullptr;
  float keep_ = 1;
  alignas(MLS_VEC_BYTES) float since_[kBlock], until_[kBlock];
  alignas(MLS_VEC_BYTES) float sums_[kBlock], rest_[kBlock];  // of gates / ln 2, to behind each token
  float by_pairs_[kBlock], before_[kBlock], behind_[kBlock], of_keep_ = 0;
};

}  // namespace mls::cpu::MLS_VARIANT
