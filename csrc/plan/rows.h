// The work that a mask requires in every row. megatron_lightseq/schedule/balance/rows.py defines rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace mls::plan {

struct Row {
  int64_t start, stop;
  std::vector<int64_t> edges, sums;
  int64_t shared, document, density;
  int64_t taken = 0;
  bool given = false;

  // Number of pairs with keys before `position`, interpolated linearly between edges.
  int64_t before(int64_t position) const {
    if (position >= edges.back()) return sums.back();
    if (position < edges.front()) return 0;
    const size_t i = std::upper_bound(edges.begin(), edges.end(), position) - edges.begin() - 1;
    return sums[i] + (sums[i + 1] - sums[i]) * (position - edges[i]) / (edges[i + 1] - edges[i]);
  }
  int64_t pairs(int64_t from, int64_t to) const { return to > from ? before(to) - before(from) : 0; }
  int64_t first_key() const { return std::max(edges.front(), taken); }
  int64_t last_key() const { return edges.back(); }
  int64_t left() const { return given ? 0 : sums.back() - (taken ? before(taken) : 0); }
  int64_t length() const { return stop - start; }
};

// The borders of all rows: each of `num_pieces` equal pieces of the sequence is cut into `grain` rows.
inline std::vector<int64_t> row_borders(int64_t seq_length, int64_t num_pieces, int64_t grain,
                                        int64_t quantum) {
  const int64_t length = seq_length / num_pieces;
  std::vector<int64_t> borders;
  borders.reserve(num_pieces * grain + 1);
  for (int64_t piece = 0; piece < num_pieces; ++piece)
    for (int64_t row = 0; row < grain; ++row)
      borders.push_back(piece * length + row * (length / quantum) / grain * quantum);
  borders.push_back(seq_length);
  return borders;
}

// Rows for packed causal documents, in one pass over documents and rows.
inline std::vector<Row> rows_of_documents(const std::vector<int64_t>& documents,
                                          const std::vector<int64_t>& borders) {
  std::vector<Row> rows;
  rows.reserve(borders.size() - 1);
  size_t document = 0;
  for (size_t i = 0; i + 1 < borders.size(); ++i) {
    const int64_t at = borders[i], end = borders[i + 1];
    while (documents[document + 1] <= at) ++document;
    const int64_t start = documents[document];
    const int64_t seeing = std::min(documents[document + 1], end) - at;
    int64_t diagonal = seeing * (seeing + 1) / 2;
    while (documents[document + 1] < end) {
      ++document;
      const int64_t length = std::min(documents[document + 1], end) - documents[document];
      diagonal += length * (length + 1) / 2;
    }
    const int64_t before = seeing * (at - start);
    if (start < at)
      rows.push_back({at, end, {start, at, end}, {0, before, before + diagonal}, at, start, seeing});
    else
      rows.push_back({at, end, {at, end}, {0, diagonal}, at, start, seeing});
  }
  return rows;
}

}  // namespace mls::plan
