// Runs one attention tile on the CPU with torch's threads, and what comes before its backward.
#pragma once
#include "attention_params.h"

namespace mls::cpu {

const char* isa_name();
void run_forward(const ForwardParams& params);
void run_backward(const BackwardParams& params);
void run_delta(const DeltaParams& params);

}  // namespace mls::cpu
