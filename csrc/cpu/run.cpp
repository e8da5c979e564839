#include "run.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernel_table.h"
#include "tasks.h"

namespace mls::cpu {
namespace {

// The dQ sums grow with the sequence; beyond this size, allocating them costs little compared with the work.
constexpr size_t kMostKeptSumBytes = 64 << 20;

// One row of `other` merged into one of `out`: a weighted mean, whose weight of the other is `weight`. A row
// that has seen no key keeps out of the sum altogether, whatever its memory holds.
void merge_row(float* out, const float* other, float weight, int64_t value_dim) {
  if (weight == 0) return;
  if (weight == 1) {
    std::copy(other, other + value_dim, out);
  } else {
    const float kept = 1 - weight;
    for (int64_t d = 0; d < value_dim; ++d) out[d] = kept * out[d] + weight * other[d];
  }
}

void merge_token(const MergeParams& p, int64_t token) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.num_heads; ++h) {
      float& lse = p.lse.data[b * p.lse.batch_stride + h * p.lse.head_stride + token * p.lse.query_stride];
      const float other = p.other_lse.data[b * p.other_lse.batch_stride + h * p.other_lse.head_stride +
                                           token * p.other_lse.query_stride];
      if (other == -std::numeric_limits<float>::infinity()) continue;
      const float apart = lse == other ? 0 : std::abs(lse - other);  // NaN where either is
      const float total = std::max(lse, other) + std::log1p(std::exp(-apart));
      float* const row =
          p.out.data + token * p.out.token_stride + b * p.out.batch_stride + h * p.out.head_stride;
      merge_row(row,
                p.other_out.data + token * p.other_out.token_stride + b * p.other_out.batch_stride +
                    h * p.other_out.head_stride,
                std::exp(other - total), p.value_dim);
      lse = total;
    }
}

}  // namespace

const char* isa_name() {
  return selected_table().name;
}

void run_forward(const ForwardParams& params) {
  const Kernel& kernel = selected_table().of(params);
  const Workload work = kernel.forward_workload(params, torch::stable::get_num_threads());
  run_tasks(work.num_tasks, work.scratch_bytes, [&](int64_t task, void* scratch) {
    kernel.forward_task(params, work.block_tiles, task, scratch);
  });
}

void run_backward(const BackwardParams& params) {
  const Kernel& kernel = selected_table().of(params);
  const Workload work = kernel.backward_workload(params);
  std::vector<ChunkTurns> turns(work.num_turns);
  kernel.init_turns(params, turns.data());
  static thread_local Scratch sums;
  const size_t sum_bytes = work.num_dq_sums * sizeof(float);
  const BackwardState state{turns.data(), reinterpret_cast<float*>(sums.at_least(sum_bytes))};
  run_tasks(work.num_tasks, work.scratch_bytes,
            [&](int64_t task, void* scratch) { kernel.backward_task(params, task, scratch, state); });
  sums.keep_at_most(kMostKeptSumBytes);
}

// A row is summed by one thread, so the result does not depend on the number of threads.
void run_delta(const DeltaParams& params) {
  constexpr int64_t kWorthAThread = 64 * 1024;  // products, about 10 us on one thread
  const int64_t products_per_token = std::max<int64_t>(1, params.batch * params.num_heads * params.value_dim);
  const int64_t tokens_per_thread = std::max<int64_t>(1, kWorthAThread / products_per_token);
  torch::stable::parallel_for(0, params.num_queries, tokens_per_thread, [&](int64_t first, int64_t last) {
    selected_table().delta(params, first, last);
  });
}

// A row is merged by one thread.
void run_merge(const MergeParams& params) {
  constexpr int64_t kWorthAThread = 64 * 1024;  // elements, about 10 us on one thread
  const int64_t per_token = std::max<int64_t>(1, params.batch * params.num_heads * params.value_dim);
  const int64_t tokens_per_thread = std::max<int64_t>(1, kWorthAThread / per_token);
  torch::stable::parallel_for(0, params.num_queries, tokens_per_thread, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) merge_token(params, token);
  });
}

}  // namespace mls::cpu
