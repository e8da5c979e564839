// The seam of instruction-set variants: every variant fills one table, and nothing else knows them apart.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "attention_params.h"

namespace mls::cpu {

// Work is cut into numbered tasks; a worker takes the lowest task not yet taken. Results are bit for bit the
// same on any number of cores: the order of every sum depends on the shape alone.
struct Workload {
  int64_t num_tasks;
  size_t scratch_bytes;  // per worker
  int64_t block_tiles;   // forward: row tiles of a task
  int64_t num_turns;     // backward: of all row tiles
  int64_t num_dq_sums;   // backward: values
};

// Backward: chunks [first, last) of keys add to dQ of one row tile, in this order; whose turn it is.
struct ChunkTurns {
  int32_t first, last;
  std::atomic<int32_t> next;
};

// What the workers of a backward share.
struct BackwardState {
  ChunkTurns* turns;  // of each row tile
  float* dq_sums;     // dQ of each row tile, where it is rounded at the end
};

// The kernel of one element type in one variant.
struct Kernel {
  Workload (*forward_workload)(const ForwardParams&, int64_t workers);
  void (*forward_task)(const ForwardParams&, int64_t block_tiles, int64_t task, void* scratch);
  Workload (*backward_workload)(const BackwardParams&);
  void (*init_turns)(const BackwardParams&, ChunkTurns* turns);
  void (*backward_task)(const BackwardParams&, int64_t task, void* scratch, const BackwardState& state);
  double (*peak_work)(int64_t iterations);  // floating-point operations of products in registers only
};

struct KernelTable {
  const char* name;
  Kernel float32;
  Kernel sparse_float32;  // where a row sees few keys, or a key is seen by few rows
  Kernel bfloat16;
  void (*delta)(const DeltaParams&, int64_t first, int64_t last);  // of the tokens [first, last)

  // The kernel of a call; the shape and the mask alone decide.
  const Kernel& of(ElementType type, const AttentionShape& shape, const KeyMask& mask) const;
};

extern const KernelTable kBaselineTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAvx512Bf16Table;
extern const KernelTable kAmxTable;
extern const KernelTable kAmxTilesTable;  // tiles for all that kAmxTable computes by vectors: for tests
#endif

// The fastest variant this machine runs, or the one named by MLS_CPU_ISA (tests). Throws if it cannot run.
const KernelTable& selected_table();

}  // namespace mls::cpu
