// Decides which rank computes what. megatron_lightseq/schedule/balance/solve.py explains the algorithm and
// is the oracle of this file: operations and their order are the same, so both produce the same plan bit for
// bit.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "rows.h"

namespace mls::plan {

struct Prices {
  double query, key, far;
};

struct Grant {
  int64_t helper, row, start, stop;
};

struct Assignment {
  std::vector<Row> rows;
  std::vector<Grant> grants;
  std::vector<int64_t> loads;
  int64_t grain;
  int64_t quantum;  // tokens that all cuts are multiples of

  int64_t num_ranks() const { return static_cast<int64_t>(loads.size()); }
  int64_t num_pieces() const { return static_cast<int64_t>(rows.size()) / grain; }  // piece p: rank p % ranks
  int64_t piece_length() const { return rows.back().stop / num_pieces(); }
};

Assignment solve(std::vector<Row> rows, int64_t grain, const Prices& prices, std::vector<int64_t> nodes,
                 double target, double tolerance, int64_t quantum);

}  // namespace mls::plan
