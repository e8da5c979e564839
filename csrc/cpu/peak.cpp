// torch.ops.mls.cpu_peak_gflops: the measured peak that benchmarks compare with.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <ctime>

#include "checks.h"
#include "kernel_table.h"

namespace mls::cpu {
namespace {

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// GFLOP/s of one core, in the units that the selected variant uses for this element type. The best of several
// short runs, because disturbances can only make a run slower.
double peak_gflops(bool bfloat16, int64_t repetitions) {
  MLS_CHECK(repetitions > 0, "repetitions is ", repetitions, ": it must be at least 1.");
  constexpr int64_t kIterations = 200000;
  const Kernel& kernel = bfloat16 ? selected_table().bfloat16 : selected_table().float32;
  double best = 0;
  for (int64_t r = 0; r < repetitions; ++r) {
    const double start = thread_seconds();
    const double work = kernel.peak_work(kIterations);
    best = std::max(best, work / (thread_seconds() - start));
  }
  return best * 1e-9;
}

}  // namespace
}  // namespace mls::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(mls, m) {
  m.def("cpu_peak_gflops(bool bfloat16, int repetitions) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(mls, CompositeExplicitAutograd, m) {
  m.impl("cpu_peak_gflops", TORCH_BOX(&mls::cpu::peak_gflops));
}
