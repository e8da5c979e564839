// Runs one attention tile, or the computation of delta that precedes a backward, on torch's threads.
#pragma once
#include "attention_params.h"

namespace mls::cpu {

const char* isa_name();
void run_forward(const ForwardParams& params);
void run_backward(const BackwardParams& params);
void run_delta(const DeltaParams& params);

}  // namespace mls::cpu
