// ISA dispatch table: each variant provides one KernelTable, and no other code depends on the instruction
// set.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "attention_params.h"
#include "linear/kernel.h"

namespace mls::cpu {

// Work is split into numbered tasks; a worker takes the lowest task not yet taken. Results are bitwise
// identical on any number of cores, because the order of every sum depends only on shape and mask.
struct Workload {
  int64_t num_tasks;
  size_t scratch_bytes;  // per worker
  int64_t block_tiles;   // forward: row tiles per task
  int64_t num_turns;     // backward: number of ChunkTurns, one per row tile
  int64_t num_dq_sums;   // backward: number of floats in dq_sums
};

// Backward: chunks [first, last) of keys add to dQ of one row tile, in this order; it is the turn of chunk
// `next`.
struct ChunkTurns {
  int32_t first, last;
  std::atomic<int32_t> next;
};

// State shared by the workers of a backward call.
struct BackwardState {
  ChunkTurns* turns;  // one per row tile
  float* dq_sums;     // fp32 dQ of each row tile, if it is rounded at the end
};

// The kernel for one element type in one variant.
struct Kernel {
  Workload (*forward_workload)(const ForwardParams&, int64_t workers);
  void (*forward_task)(const ForwardParams&, int64_t block_tiles, int64_t task, void* scratch);
  Workload (*backward_workload)(const BackwardParams&);
  void (*init_turns)(const BackwardParams&, ChunkTurns* turns);
  void (*backward_task)(const BackwardParams&, int64_t task, void* scratch, const BackwardState& state);
  double (*peak_work)(int64_t iterations);  // runs products of registers; returns floating-point operations
};

struct KernelTable {
  const char* name;
  Kernel float32;
  Kernel sparse_float32;  // for masks where rows see few keys, or keys are seen by few rows
  Kernel bfloat16;
  Kernel capped_float32;   // for scores with a softcap, which AMX engines do not apply
  Kernel capped_bfloat16;  // the same
  void (*delta)(const DeltaParams&, int64_t first, int64_t last);  // for tokens [first, last)

  // The kernel for a call, chosen by type, softcap, shape and mask.
  template <class Params>
  const Kernel& of(const Params& params) const {
    const bool is_float32 = params.element_type == ElementType::kFloat32;
    if (params.softcap != 0) return is_float32 ? capped_float32 : capped_bfloat16;
    return is_float32 ? of_float32(params.shape, params.mask) : bfloat16;
  }
  const Kernel& of_float32(const AttentionShape& shape, const KeyMask& mask) const;
};

extern const KernelTable kBaselineTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAvx512Bf16Table;
extern const KernelTable kAmxTable;
extern const KernelTable kAmxTilesTable;  // for tests: uses tiles even where kAmxTable uses vectors
#endif

// The fastest variant for this machine, or the one that MLS_CPU_ISA names. Throws if that one cannot run
// here.
const KernelTable& selected_table();
// Linear attention in the same variant, or in the one whose vectors it uses.
const LinearKernel& selected_linear();

}  // namespace mls::cpu
