// Runs linear attention on torch's threads.
#pragma once
#include "kernel.h"

namespace mls::cpu {

void run_linear(const LinearParams& params, LinearOperation operation);

}  // namespace mls::cpu
