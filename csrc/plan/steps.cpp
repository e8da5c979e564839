#include "steps.h"

#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

namespace mls::plan {
namespace {

// --- blocks ----------------------------------------------------------------------------------------------

// Makes blocks of `count` rows from `first` on against the keys [start, stop), cut where the owner of the
// keys changes and clipped to the keys that the rows see.
void by_key_piece(const Row* first, size_t count, int64_t start, int64_t stop, const Assignment& plan,
                  std::vector<Block>& out) {
  const int64_t length = plan.piece_length(), quantum = plan.quantum;
  start = start / quantum * quantum;
  stop = (stop + quantum - 1) / quantum * quantum;
  for (int64_t piece = start / length; piece < (stop + length - 1) / length; ++piece) {
    const int64_t a = std::max(start, piece * length), b = std::min(stop, (piece + 1) * length);
    for (size_t i = 0; i < count;) {
      Block block{{first[i].start}, {}, std::numeric_limits<int64_t>::max(), 0};
      for (; i < count; ++i) {
        const int64_t pairs = first[i].pairs(a, b);
        if (!pairs) break;
        block.borders.push_back(first[i].stop);
        block.areas.push_back(pairs);
        block.k_start = std::min(block.k_start, first[i].edges.front());
        block.k_stop = std::max(block.k_stop, first[i].last_key());
      }
      if (block.areas.empty()) {
        ++i;
        continue;
      }
      block.k_start = std::max(a, block.k_start / quantum * quantum);
      block.k_stop = std::min(b, (block.k_stop + quantum - 1) / quantum * quantum);
      out.push_back(std::move(block));
    }
  }
}

void kept_blocks(const Assignment& plan, int64_t piece, std::vector<Block>& out) {
  const Row* rows = &plan.rows[piece * plan.grain];
  for (int64_t i = 0; i < plan.grain;) {
    if (rows[i].given) {
      ++i;
      continue;
    }
    const int64_t begin = i;
    int64_t start = rows[i].first_key(), stop = rows[i].last_key();
    for (; i < plan.grain && !rows[i].given && rows[i].taken == rows[begin].taken; ++i) {
      start = std::min(start, rows[i].first_key());
      stop = std::max(stop, rows[i].last_key());
    }
    by_key_piece(rows + begin, i - begin, start, stop, plan, out);
  }
}

bool continues(const Grant& last, const Grant& grant, const Assignment& plan) {
  if (grant.helper != last.helper || grant.row != last.row + 1 || grant.row % plan.grain == 0) return false;
  if (grant.start == last.start && grant.stop == last.stop) return true;
  const Row &a = plan.rows[last.row], &b = plan.rows[grant.row];
  const bool to_the_end = last.stop == a.last_key() && grant.stop == b.last_key();
  const bool from_the_start = last.start == a.edges.front() && grant.start == b.edges.front();
  return to_the_end && (from_the_start || grant.start == last.start);
}

std::vector<std::vector<Block>> blocks_of(const Assignment& plan) {
  std::vector<std::vector<Block>> found(plan.loads.size());
  for (int64_t piece = 0; piece < plan.num_pieces(); ++piece)
    kept_blocks(plan, piece, found[piece % plan.num_ranks()]);
  std::vector<Grant> grants = plan.grants;
  std::sort(grants.begin(), grants.end(), [](const Grant& a, const Grant& b) {
    return std::tie(a.helper, a.row, a.start) < std::tie(b.helper, b.row, b.start);
  });
  for (size_t i = 0; i < grants.size();) {
    const size_t begin = i;
    int64_t start = grants[i].start, stop = grants[i].stop;
    for (++i; i < grants.size() && continues(grants[i - 1], grants[i], plan); ++i) {
      start = std::min(start, grants[i].start);
      stop = std::max(stop, grants[i].stop);
    }
    by_key_piece(&plan.rows[grants[begin].row], i - begin, start, stop, plan, found[grants[begin].helper]);
  }
  return found;
}

// --- cutting ---------------------------------------------------------------------------------------------

using Parts = std::pair<std::optional<Block>, std::optional<Block>>;

Parts cut_in_row(const Block& block, size_t i, double share, int64_t quantum) {
  const int64_t start = block.borders[i], stop = block.borders[i + 1];
  int64_t at = start + static_cast<int64_t>((stop - start) * share / quantum + 0.5) * quantum;
  Block head{{}, {block.areas.begin(), block.areas.begin() + i}, block.k_start, block.k_stop};
  Block tail{{}, {block.areas.begin() + i, block.areas.end()}, block.k_start, block.k_stop};
  if (at >= stop) {
    at = stop;
    head.areas.push_back(block.areas[i]);
    tail.areas.erase(tail.areas.begin());
  } else if (at != start) {
    const int64_t part = block.areas[i] * (at - start) / (stop - start);
    head.areas.push_back(part);
    tail.areas.front() -= part;
  }
  for (const int64_t border : block.borders)
    if (border < at) head.borders.push_back(border);
  head.borders.push_back(at);
  tail.borders.push_back(at);
  for (const int64_t border : block.borders)
    if (border > at) tail.borders.push_back(border);
  Parts parts;
  if (!head.areas.empty()) parts.first = std::move(head);
  if (!tail.areas.empty()) parts.second = std::move(tail);
  return parts;
}

// Cuts the block between two queries, as near to `area` pairs as multiples of `quantum` queries allow.
Parts cut(const Block& block, double area, int64_t quantum) {
  int64_t filled = 0;
  for (size_t i = 0; i < block.areas.size(); ++i) {
    if (static_cast<double>(filled + block.areas[i]) > area)
      return cut_in_row(block, i, (area - static_cast<double>(filled)) / static_cast<double>(block.areas[i]),
                        quantum);
    filled += block.areas[i];
  }
  return {block, std::nullopt};
}

// --- steps -----------------------------------------------------------------------------------------------

class Stage {
 public:
  Stage(const Assignment& plan, int64_t num_steps, double edge, const std::vector<int64_t>& nodes)
      : length_(plan.piece_length()), quantum_(plan.quantum), last_(num_steps - 1), nodes_(nodes) {
    const int64_t total = std::accumulate(plan.loads.begin(), plan.loads.end(), int64_t{0});
    const double mean = static_cast<double>(total) / static_cast<double>(plan.loads.size());
    const double unit = mean / (static_cast<double>(num_steps) - 2 + 2 * edge);
    for (int64_t step = 0; step < last_; ++step) ends_.push_back(unit * (edge + static_cast<double>(step)));
    ends_.push_back(std::numeric_limits<double>::infinity());
  }

  void rank(int64_t rank, std::vector<Block> blocks) {
    std::vector<Block> own, remote;
    for (Block& block : blocks) {
      const bool mine = owner(block.q_start()) == rank && owner(block.k_start) == rank;
      (mine ? own : remote).push_back(std::move(block));
    }
    std::stable_sort(own.begin(), own.end(), [](const Block& a, const Block& b) {
      return std::make_pair(a.q_start(), a.k_start) < std::make_pair(b.q_start(), b.k_start);
    });
    std::stable_sort(remote.begin(), remote.end(),
                     [&](const Block& a, const Block& b) { return order(a, rank) < order(b, rank); });
    double total = 0;
    for (const Block& block : own) total += static_cast<double>(block.area());
    std::vector<Block> rest;
    double filled = cut_head(own, std::min(ends_.front(), total / 2), rank, rest);
    for (const Block& block : remote) {
      spread(block, filled, 1, last_ - (owner(block.q_start()) != rank), rank);
      filled += static_cast<double>(block.area());
    }
    for (const Block& block : rest) {
      spread(block, filled, 0, last_, rank);
      filled += static_cast<double>(block.area());
    }
  }

  int64_t owner(int64_t position) const { return position / length_ % static_cast<int64_t>(nodes_.size()); }

  std::vector<Timed> take() { return std::move(out_); }

 private:
  // Puts the blocks that hold the first `area` pairs into step 0 and the others into `rest`. Returns the area
  // of step 0.
  double cut_head(const std::vector<Block>& own, double area, int64_t rank, std::vector<Block>& rest) {
    double filled = 0;
    size_t i = 0;
    for (; i < own.size() && static_cast<double>(own[i].area()) <= area; ++i) {
      area -= static_cast<double>(own[i].area());
      filled += static_cast<double>(own[i].area());
      out_.push_back({0, rank, own[i]});
    }
    if (i < own.size()) {
      Parts parts = cut(own[i++], area, quantum_);
      if (parts.first) {
        filled += static_cast<double>(parts.first->area());
        out_.push_back({0, rank, std::move(*parts.first)});
      }
      if (parts.second) rest.push_back(std::move(*parts.second));
    }
    rest.insert(rest.end(), own.begin() + i, own.end());
    return filled;
  }

  void spread(Block block, double filled, int64_t earliest, int64_t latest, int64_t rank) {
    int64_t step = earliest;
    for (; step < latest; ++step) {
      if (filled >= ends_[step]) continue;
      Parts parts = cut(block, ends_[step] - filled, quantum_);
      if (parts.first) {
        filled += static_cast<double>(parts.first->area());
        out_.push_back({step, rank, std::move(*parts.first)});
      }
      if (!parts.second) return;
      block = std::move(*parts.second);
    }
    out_.push_back({step, rank, std::move(block)});
  }

  // Sort key: blocks whose inputs are on the same node first and, among those, blocks whose results go to
  // another rank.
  std::tuple<bool, bool, int64_t, int64_t, int64_t> order(const Block& block, int64_t rank) const {
    const int64_t q_rank = owner(block.q_start()), k_rank = owner(block.k_start);
    const bool far = nodes_[q_rank] != nodes_[rank] || nodes_[k_rank] != nodes_[rank];
    return {far, q_rank == rank, std::abs(rank - k_rank), block.q_start(), block.k_start};
  }

  int64_t length_, quantum_, last_;
  const std::vector<int64_t>& nodes_;
  std::vector<double> ends_;
  std::vector<Timed> out_;
};

}  // namespace

std::vector<Timed> stage(const Assignment& assignment, int64_t num_steps, double edge,
                         const std::vector<int64_t>& nodes) {
  Stage stage(assignment, num_steps, edge, nodes);
  std::vector<std::vector<Block>> blocks = blocks_of(assignment);
  for (size_t rank = 0; rank < blocks.size(); ++rank) stage.rank(rank, std::move(blocks[rank]));
  return stage.take();
}

}  // namespace mls::plan
