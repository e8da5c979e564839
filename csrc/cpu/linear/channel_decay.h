// Decays of channels within a block.
//
// A product of two tokens decays in every channel by another factor. No exponent may be above zero, so
// factors of both sides meet at the start of a sub-block; within a sub-block, decays are applied pair by
// pair.
#pragma once
#include "../softmax.h"
#include "visible.h"

namespace mls::cpu::MLS_VARIANT {

class ChannelDecay {
 public:
  ChannelDecay(const LinearParams& params, ScratchCursor& scratch)
      : tensor_(params.log_decay),
        key_dim_(params.shape.key_dim),
        width_(padded(key_dim_)),
        gates_(new_matrix(scratch, kBlock, key_dim_)),
        since_(new_matrix(scratch, kBlock, key_dim_)),
        until_(new_matrix(scratch, kBlock, key_dim_)),
        alpha_(new_matrix(scratch, kBlock, key_dim_)),
        to_own_(new_matrix(scratch, kBlock, key_dim_)),
        to_end_(new_matrix(scratch, kBlock, key_dim_)),
        totals_(new_matrix(scratch, kBlock / kNear, key_dim_)),
        keep_(new_matrix(scratch, 1, key_dim_)),
        far_(new_matrix(scratch, kBlock, key_dim_)),
        far_columns_(new_matrix(scratch, key_dim_, kBlock)),
        rows_(new_matrix(scratch, kNear, key_dim_)),
        product_(new_matrix(scratch, kBlock, key_dim_)),
        factors_(new_matrix(scratch, kBlock, key_dim_)),
        dx_(new_matrix(scratch, kBlock, key_dim_)),
        dk_(new_matrix(scratch, kBlock, key_dim_)),
        before_(new_matrix(scratch, kBlock, key_dim_)),
        behind_(new_matrix(scratch, kBlock, key_dim_)),
        of_keep_(new_matrix(scratch, 1, key_dim_)) {}

  // The factors of a block.
  void load_gates(const BlockAt& at, const Visible& visible) {
    at_ = at, visible_ = &visible;
    const float* const gate = tensor_.data + at.first * tensor_.token_stride +
                              at.batch * tensor_.batch_stride + at.head * tensor_.head_stride;
    for (int64_t i = 0; i < at.count; ++i)
      load_row<Float32>(gate + i * tensor_.token_stride, key_dim_, gates_.row(i));
    for (int64_t c = 0; c < width_; c += kLanes) {
      Vec sum{}, later{};
      for (int64_t i = 0; i < at.count; ++i) {
        const Vec log2 = load_vec(gates_, i, c) * kLog2E;
        sum += log2;
        store(gates_.row(i) + c, log2);
        store(since_.row(i) + c, exp2(sum) * visible.reached[i]);
      }
      store(keep_.row(0) + c, exp2(sum) * visible.kept);
      for (int64_t i = at.count - 1; i >= 0; --i) {
        store(until_.row(i) + c, exp2(later) * visible.leaving[i]);
        later += load_vec(gates_, i, c);
      }
    }
  }

  // The factors within and between sub-blocks.
  void load_pairs() {
    for (int64_t c = 0; c < width_; c += kLanes) {
      Vec sum{};
      for (int64_t i = 0; i < at_.count; ++i) {
        const Vec log2 = load_vec(gates_, i, c);
        sum = i % kNear == 0 ? log2 : sum + log2;
        store(alpha_.row(i) + c, exp2(log2));
        store(to_own_.row(i) + c, exp2(sum));
      }
      sum = Vec{};
      for (int64_t i = at_.count - 1; i >= 0; --i) {
        if (i % kNear == kNear - 1) sum = Vec{};
        store(to_end_.row(i) + c, exp2(sum));
        sum += load_vec(gates_, i, c);
        if (i % kNear == 0) store(totals_.row(i / kNear) + c, exp2(sum));
      }
    }
  }

  MLS_INLINE Vec since(int64_t i, int64_t c) const { return load_vec(since_, i, c); }
  MLS_INLINE Vec until(int64_t i, int64_t c) const { return load_vec(until_, i, c); }
  float kept_factor() const { return 1; }
  void keep(Matrix state, int64_t width) const {
    for (int64_t d = 0; d < key_dim_; ++d) {
      const Vec factor = splat(keep_.row(0)[d]);
      for (int64_t c = 0; c < padded(width); c += kLanes)
        store(state.row(d) + c, load_vec(state, d, c) * factor);
    }
  }

  int64_t transition_rows() const { return key_dim_; }
  void start_transition(float* transition) const { std::fill_n(transition, key_dim_, 1.0f); }
  void add_to_transition(float* transition) const {
    for (int64_t d = 0; d < key_dim_; ++d) transition[d] *= keep_.row(0)[d];
  }

  void load_keys(Matrix k, Matrix) { k_ = k; }
  void pairs(Matrix x, Matrix result) {
    for_vectors(at_.count, width_, [&](int64_t i, int64_t c) {
      store(far_.row(i) + c, load_vec(k_, i, c) * load_vec(to_end_, i, c));
    });
    clear(far_, at_.count, padded(at_.count));
    transpose_into(far_, far_columns_, at_.count, key_dim_);
    for (int64_t start = 0; start < at_.count; start += kNear) {
      const int64_t count = std::min(kNear, at_.count - start);
      if (start > 0) {
        decay_columns(start / kNear - 1);
        load_own(x, start, count);
        product(rows_, far_columns_, {result.row(start), result.stride}, count, key_dim_, start);
      }
      for (int64_t i = start; i < start + count; ++i) {
        near_products(x.row(i), i, start, result.row(i));
        keep_range(result.row(i), visible_->first[i], i + 1, padded(at_.count));
      }
    }
  }

  void start_gradients() {
    clear(before_, 0, at_.count), clear(behind_, 0, at_.count);
    clear(of_keep_, 0, 1);
  }
  void add_pairs(Matrix through, Matrix, Matrix x, Matrix k, Matrix dx, Matrix dk) {
    clear(dx_, 0, at_.count), clear(dk_, 0, at_.count);
    for (int64_t start = 0; start < at_.count; start += kNear) {
      const int64_t count = std::min(kNear, at_.count - start);
      if (start > 0) add_far({through.row(start), through.stride}, x, k, start, count);
      for (int64_t i = start; i < start + count; ++i) add_near(through.row(i), x, k, i, start);
    }
    for (int64_t i = 0; i < at_.count; ++i) {
      const Vec own = splat(through.row(i)[i]);
      for (int64_t c = 0; c < width_; c += kLanes) {
        const Vec xi = load_vec(x, i, c), ki = load_vec(k, i, c);
        const Vec dxi = load_vec(dx_, i, c), dki = load_vec(dk_, i, c);
        add_vec(before_, i, c, xi * dxi - ki * dki);
        add_vec(dx, i, c, dxi + own * ki);
        add_vec(dk, i, c, dki + own * xi);
      }
    }
  }
  void add_since(int64_t i, const float* row, const float* gradient) { add_rows(before_, i, row, gradient); }
  void add_until(int64_t i, const float* row, const float* gradient) { add_rows(behind_, i, row, gradient); }
  void add_keep(Matrix state, Matrix gradient, int64_t width) {
    for (int64_t d = 0; d < key_dim_; ++d) {
      const float kept = keep_.row(0)[d];
      of_keep_.row(0)[d] = kept == 0 ? 0 : kept * dot(state.row(d), gradient.row(d), padded(width));
    }
  }
  void store_gradients(const TokenTensor<float>& to) {
    float* const first =
        to.data + at_.first * to.token_stride + at_.batch * to.batch_stride + at_.head * to.head_stride;
    for (int64_t c = 0; c < width_; c += kLanes) {
      Vec later{}, earlier = load(of_keep_.row(0) + c);
      for (int64_t i = at_.count - 1; i >= 0; --i) {
        later += load_vec(before_, i, c);
        store(before_.row(i) + c, later);
      }
      for (int64_t i = 0; i < at_.count; ++i) {
        store_some<Float32>(first + i * to.token_stride + c, load_vec(before_, i, c) + earlier, key_dim_ - c);
        earlier += load_vec(behind_, i, c);
      }
    }
  }

 private:
  static constexpr int64_t kNear = 8;  // tokens of a sub-block

  static MLS_INLINE Vec load_vec(Matrix m, int64_t i, int64_t c) { return load(m.row(i) + c); }
  static MLS_INLINE void add_vec(Matrix m, int64_t i, int64_t c, Vec x) {
    store(m.row(i) + c, load(m.row(i) + c) + x);
  }
  void add_rows(Matrix to, int64_t i, const float* a, const float* b) {
    for (int64_t c = 0; c < width_; c += kLanes) add_vec(to, i, c, load(a + c) * load(b + c));
  }

  // Keys that decayed to the end of their own sub-block decay to that of the next.
  void decay_columns(int64_t sub_block) {
    const IntVec lane = lane_numbers();
    const auto columns = static_cast<int32_t>(sub_block * kNear);
    for (int64_t d = 0; d < key_dim_; ++d) {
      const Vec total = splat(totals_.row(sub_block)[d]);
      for (int32_t c = 0; c < columns; c += kLanes) {
        const Vec factor = select(lane + c < splat_int(columns), total, splat(1.0f));
        store(far_columns_.row(d) + c, load_vec(far_columns_, d, c) * factor);
      }
    }
  }
  // Rows of a sub-block, decayed from its start.
  void load_own(Matrix x, int64_t start, int64_t count) {
    for_vectors(count, width_, [&](int64_t i, int64_t c) {
      store(rows_.row(i) + c, load_vec(x, start + i, c) * load_vec(to_own_, start + i, c));
    });
  }
  void near_products(const float* x, int64_t i, int64_t start, float* result) {
    const int64_t first = std::max(start, visible_->first[i]);
    if (first > i) return;
    Vec sums[kNear]{};
    for (int64_t c = 0; c < width_; c += kLanes) {
      Vec decayed = load(x + c);
      for (int64_t j = i;; --j) {
        sums[j - start] += decayed * load_vec(k_, j, c);
        if (j == first) break;
        decayed *= load_vec(alpha_, j, c);
      }
    }
    for (int64_t j = first; j <= i; ++j) result[j] = sum_lanes(sums[j - start]);
  }
  void add_near(const float* through, Matrix x, Matrix k, int64_t i, int64_t start) {
    const int64_t first = std::max(start, visible_->first[i]);
    for (int64_t c = 0; c < width_; c += kLanes) {
      const Vec xi = load_vec(x, i, c);
      Vec decay = splat(1.0f), sum{};
      for (int64_t j = i - 1; j >= first; --j) {
        decay *= load_vec(alpha_, j + 1, c);
        const Vec weight = decay * through[j];
        sum += weight * load_vec(k, j, c);
        add_vec(dk_, j, c, weight * xi);
      }
      add_vec(dx_, i, c, sum);
    }
  }
  void add_far(Matrix through, Matrix x, Matrix k, int64_t start, int64_t count) {
    const int64_t last = start - kNear;  // where the sub-block before begins
    for_vectors(last, width_, [&](int64_t j, int64_t c) {
      store(factors_.row(j) + c, load_vec(factors_, j, c) * load_vec(totals_, last / kNear, c));
    });
    for_vectors(kNear, width_, [&](int64_t j, int64_t c) {
      store(factors_.row(last + j) + c, load_vec(to_end_, last + j, c));
    });
    for_vectors(start, width_, [&](int64_t j, int64_t c) {
      store(far_.row(j) + c, load_vec(k, j, c) * load_vec(factors_, j, c));
    });
    product(through, far_, product_, count, start, key_dim_);
    for_vectors(count, width_, [&](int64_t i, int64_t c) {
      add_vec(dx_, start + i, c, load_vec(product_, i, c) * load_vec(to_own_, start + i, c));
    });
    load_own(x, start, count);
    transposed_product(through, rows_, product_, start, count, key_dim_);
    for_vectors(start, width_, [&](int64_t j, int64_t c) {
      add_vec(dk_, j, c, load_vec(product_, j, c) * load_vec(factors_, j, c));
    });
  }

  const TokenTensor<const float> tensor_;
  const int64_t key_dim_, width_;
  const Matrix gates_;                     // divided by ln 2
  const Matrix since_, until_, alpha_;     // from the start of the block, to its end, of one token
  const Matrix to_own_, to_end_, totals_;  // within a sub-block, and over it
  const Matrix keep_;                      // over the block
  const Matrix far_, far_columns_, rows_, product_, factors_;  // factors of earlier sub-blocks and of one
  const Matrix dx_, dk_, before_, behind_, of_keep_;
  Matrix k_{};
  BlockAt at_{};
  const Visible* visible_ = nullptr;
};

}  // namespace mls::cpu::MLS_VARIANT
