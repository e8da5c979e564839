// The AMX kernels compiled with emulated instructions, as a library that tests load: one C function per
// direction.
#define MLS_EMULATE_AMX
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/variant_amx.cpp"

namespace mls::cpu {
namespace {

// Runs all tasks in order, in scratch memory that is filled with NaN.
template <class RunTask>
void run_tasks(const Workload& work, RunTask run_task) {
  constexpr size_t kPage = 4096;
  const size_t bytes = (work.scratch_bytes / kPage + 1) * kPage;
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(kPage, bytes), std::free);
  std::memset(scratch.get(), 0xff, bytes);
  for (int64_t task = 0; task < work.num_tasks; ++task) run_task(task, scratch.get());
}

const Kernel& kernel_of(ElementType type) {
  return type == ElementType::kFloat32 ? kAmxTilesTable.float32 : kAmxTilesTable.bfloat16;
}

}  // namespace
}  // namespace mls::cpu

extern "C" {

void mls_emulated_amx_forward(const mls::ForwardParams* params) {
  const mls::cpu::Kernel& kernel = mls::cpu::kernel_of(params->element_type);
  const mls::cpu::Workload work = kernel.forward_workload(*params, 1);
  mls::cpu::run_tasks(work, [&](int64_t task, void* scratch) {
    kernel.forward_task(*params, work.block_tiles, task, scratch);
  });
}

void mls_emulated_amx_backward(const mls::BackwardParams* params) {
  const mls::cpu::Kernel& kernel = mls::cpu::kernel_of(params->element_type);
  const mls::cpu::Workload work = kernel.backward_workload(*params);
  std::vector<mls::cpu::ChunkTurns> turns(work.num_turns);
  std::vector<float> dq_sums(work.num_dq_sums);
  kernel.init_turns(*params, turns.data());
  const mls::cpu::BackwardState state{turns.data(), dq_sums.data()};
  mls::cpu::run_tasks(
      work, [&](int64_t task, void* scratch) { kernel.backward_task(*params, task, scratch, state); });
}

}  // extern "C"
