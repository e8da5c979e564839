// Runs one attention tile on the CPU with torch's threads.
#pragma once
#include "attention_params.h"

namespace mls::cpu {

const char* isa_name();
void run_forward(const ForwardParams& params);
void run_backward(const BackwardParams& params);

}  // namespace mls::cpu
