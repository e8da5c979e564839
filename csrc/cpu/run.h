// Runs one attention tile, the computation of delta that precedes a backward, or the merge of two partial
// results, on torch's threads.
#pragma once
#include "attention_params.h"

namespace mls::cpu {

const char* isa_name();
void run_forward(const ForwardParams& params);
void run_backward(const BackwardParams& params);
void run_delta(const DeltaParams& params);
void run_merge(const MergeParams& params);

}  // namespace mls::cpu
