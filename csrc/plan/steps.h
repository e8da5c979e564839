// Turns an assignment into rectangles and decides when each is computed. Their oracles are blocks.py and
// steps.py in megatron_lightseq/schedule/balance.
#pragma once
#include <cstdint>
#include <vector>

#include "solve.h"

namespace mls::plan {

struct Block {
  std::vector<int64_t> borders, areas;
  int64_t k_start, k_stop;

  int64_t q_start() const { return borders.front(); }
  int64_t q_stop() const { return borders.back(); }
  int64_t area() const {
    int64_t sum = 0;
    for (const int64_t pairs : areas) sum += pairs;
    return sum;
  }
};

struct Timed {
  int64_t step, rank;
  Block block;
};

// All blocks, ordered by rank and, within a rank, by when they were assigned a step.
std::vector<Timed> stage(const Assignment& assignment, int64_t num_steps, double edge,
                         const std::vector<int64_t>& nodes);

}  // namespace mls::plan
