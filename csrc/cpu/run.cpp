#include "run.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernel_table.h"

namespace mls::cpu {
namespace {

constexpr std::align_val_t kScratchAlignment{4096};

struct FreeScratch {
  void operator()(char* memory) const { ::operator delete[](memory, kScratchAlignment); }
};

// Workers take the next task until none is left. at::parallel_for hands each one index of [0, workers), or
// all of them to one thread; either way one worker runs per call, and tasks start in ascending order.
template <class RunTask>
void run_tasks(const Workload& work, RunTask run_task) {
  if (work.num_tasks == 0) return;
  const int64_t workers = std::min<int64_t>(work.num_tasks, torch::stable::get_num_threads());
  const size_t stride = (work.scratch_bytes + 4095) / 4096 * 4096;
  // Allocated here: an exception must not leave a worker thread.
  const std::unique_ptr<char[], FreeScratch> scratch(new (kScratchAlignment) char[workers * stride]);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < work.num_tasks;)
      run_task(task, scratch.get() + worker * stride);
  });
}

}  // namespace

const char* isa_name() {
  return selected_table().name;
}

void run_forward(const ForwardParams& params) {
  const Kernel& kernel = selected_table().of(params.element_type);
  const Workload work = kernel.forward_workload(params, torch::stable::get_num_threads());
  run_tasks(work, [&](int64_t task, void* scratch) {
    kernel.forward_task(params, work.block_tiles, task, scratch);
  });
}

void run_backward(const BackwardParams& params) {
  const Kernel& kernel = selected_table().of(params.element_type);
  const Workload work = kernel.backward_workload(params);
  std::vector<ChunkTurns> turns(work.num_turns);
  kernel.init_turns(params, turns.data());
  run_tasks(work,
            [&](int64_t task, void* scratch) { kernel.backward_task(params, task, scratch, turns.data()); });
}

}  // namespace mls::cpu
