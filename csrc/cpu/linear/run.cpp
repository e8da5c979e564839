#include "run.h"

#include "../kernel_table.h"
#include "../tasks.h"

namespace mls::cpu {

// A task is computed by one thread, so the result does not depend on the number of threads.
void run_linear(const LinearParams& params, LinearOperation operation) {
  const LinearKernel& kernel = selected_linear();
  run_tasks(kernel.tasks(params.shape), kernel.run(params, operation, 0, nullptr),
            [&](int64_t task, void* scratch) { kernel.run(params, operation, task, scratch); });
}

}  // namespace mls::cpu
