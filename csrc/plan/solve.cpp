#include "solve.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

namespace mls::plan {
namespace {

constexpr size_t kDonorsLookedAt = 12;
constexpr int64_t kAllKeys = std::numeric_limits<int64_t>::max();

struct Offer {
  double cost;
  std::vector<int64_t> rows;
  int64_t stop;  // kAllKeys: whole rows
};

using Numbers = std::vector<int64_t>;

class Solver {
 public:
  Solver(Assignment& plan, const Prices& prices, std::vector<int64_t> nodes, double level, double slack)
      : plan_(plan),
        rows_(plan.rows),
        prices_(prices),
        nodes_(std::move(nodes)),
        level_(level),
        slack_(slack),
        quantum_(plan.quantum),
        present_(plan.loads.size()) {
    for (int64_t piece = 0; piece < plan.num_pieces(); ++piece) {
      const auto* first = &rows_[piece * plan_.grain];
      int64_t begin = first->start;
      for (int64_t i = 0; i < plan_.grain; ++i) begin = std::min(begin, first[i].edges.front());
      present_[piece % plan.num_ranks()].push_back({begin, first[plan_.grain - 1].stop});
    }
  }

  void run() {
    surplus_.assign(plan_.num_ranks(), 0.0);
    Numbers helpers;
    for (int64_t p = 0; p < plan_.num_ranks(); ++p) {
      const double load = static_cast<double>(plan_.loads[p]);
      if (load > level_ + slack_) donors_.push_back(p), surplus_[p] = load - level_;
      if (load < level_) helpers.push_back(p);
    }
    std::stable_sort(helpers.begin(), helpers.end(),
                     [&](int64_t a, int64_t b) { return plan_.loads[a] < plan_.loads[b]; });
    for (const int64_t helper : helpers)
      while (!donors_.empty() && level_ - static_cast<double>(plan_.loads[helper]) > slack_)
        if (!serve(helper)) break;
  }

 private:
  bool serve(int64_t helper) {
    const double lacking = level_ - static_cast<double>(plan_.loads[helper]);
    Numbers donors = donors_;
    std::sort(donors.begin(), donors.end(), [&](int64_t a, int64_t b) {
      return surplus_[a] != surplus_[b] ? surplus_[a] > surplus_[b] : a < b;
    });
    std::vector<std::pair<int64_t, Offer>> offers;
    for (size_t i = 0; i < donors.size(); ++i) {
      const int64_t donor = donors[i];
      if (i >= kDonorsLookedAt && nodes_[donor] != nodes_[helper]) continue;
      if (auto offer = best_offer(donor, helper, std::min(surplus_[donor], lacking)))
        offers.push_back({donor, std::move(*offer)});
    }
    std::sort(offers.begin(), offers.end(), [](const auto& a, const auto& b) {
      return std::tie(a.second.cost, a.first) < std::tie(b.second.cost, b.first);
    });
    for (const auto& [donor, offer] : offers) {
      const int64_t moved = move(helper, offer, std::min(surplus_[donor], lacking));
      if (!moved) continue;
      plan_.loads[helper] += moved;
      plan_.loads[donor] -= moved;
      surplus_[donor] -= static_cast<double>(moved);
      if (surplus_[donor] <= slack_) donors_.erase(std::find(donors_.begin(), donors_.end(), donor));
      return true;
    }
    return false;
  }

  std::optional<Offer> best_offer(int64_t donor, int64_t helper, double want) {
    const double factor = nodes_[donor] == nodes_[helper] ? 1.0 : prices_.far;
    const double query = prices_.query * factor, key = prices_.key * factor;
    std::vector<Numbers> documents;
    Numbers short_rows;
    for (int64_t piece = donor; piece < plan_.num_pieces(); piece += plan_.num_ranks())
      for (int64_t i = 0; i < plan_.grain; ++i) bundle(piece * plan_.grain + i, documents, short_rows);
    std::optional<Offer> best = short_rows_offer(short_rows, want, query, key);
    for (const Numbers& numbers : documents) offer_of_document(numbers, helper, want, query, key, best);
    return best;
  }

  // Puts a row to those that share its keys, or to those of short documents.
  void bundle(int64_t number, std::vector<Numbers>& documents, Numbers& short_rows) const {
    const Row& row = rows_[number];
    if (row.given) return;
    if (row.shared - row.edges.front() > row.length()) {
      const auto same = std::find_if(documents.begin(), documents.end(), [&](const Numbers& other) {
        const Row& first = rows_[other.front()];
        return first.document == row.document && first.taken == row.taken;
      });
      if (same == documents.end())
        documents.push_back({number});
      else
        same->push_back(number);
    } else if (row.left()) {
      short_rows.push_back(number);
    }
  }

  std::optional<Offer> short_rows_offer(const Numbers& numbers, double want, double query, double key) {
    const double most = want + slack_ / 2;
    std::vector<std::pair<int64_t, int64_t>> fitting;
    for (const int64_t number : numbers)
      if (static_cast<double>(rows_[number].left()) <= most)
        fitting.push_back({rows_[number].left(), number});
    std::sort(fitting.begin(), fitting.end());
    int64_t moved = 0, tokens = 0;
    size_t count = 0;
    while (count < fitting.size()) {
      const auto& [left, number] = fitting[fitting.size() - ++count];
      moved += left;
      tokens += rows_[number].length();
      if (static_cast<double>(moved) >= want) break;
    }
    if (!moved) return std::nullopt;
    Numbers chosen;
    for (size_t i = fitting.size() - count; i < fitting.size(); ++i) chosen.push_back(fitting[i].second);
    const double useful = std::min(static_cast<double>(moved), want);
    return Offer{(query * tokens * (useful / moved) + key * tokens) / useful, std::move(chosen), kAllKeys};
  }

  void offer_of_document(const Numbers& numbers, int64_t helper, double want, double query, double key,
                         std::optional<Offer>& best) {
    const Row &first = rows_[numbers.front()], &last = rows_[numbers.back()];
    const int64_t begin = first.first_key(), room = first.shared - begin;
    const auto consider = [&](double cost, size_t count, int64_t stop) {
      if (!best || cost < best->cost) best = Offer{cost, Numbers(numbers.end() - count, numbers.end()), stop};
    };
    if (static_cast<double>(last.left()) <= want + slack_ / 2) {
      int64_t moved = 0, tokens = 0;
      const size_t count = last_rows(numbers, want, moved, tokens, [](const Row& row) { return row.left(); });
      const double useful = std::min(static_cast<double>(moved), want);
      const int64_t keys = missing(helper, begin, last.last_key());
      consider((query * tokens * (useful / moved) + key * keys) / useful, count, kAllKeys);
    }
    if (room < quantum_) return;
    int64_t density = 0;
    for (const int64_t number : numbers) density += rows_[number].density;
    const double ideal = key != 0 ? std::sqrt(query * want / key) : static_cast<double>(room);
    const int64_t there = room - missing(helper, begin, begin + room);
    int64_t stops[3], num_stops = 0;
    for (const double wished : {static_cast<double>(there), ideal, static_cast<double>(room)}) {
      const double least = std::max({wished, want / density, static_cast<double>(quantum_)});
      const int64_t stop = aligned(begin + std::min(static_cast<double>(room), least));
      if (stop <= begin || std::find(stops, stops + num_stops, stop) != stops + num_stops) continue;
      stops[num_stops++] = stop;
      int64_t moved = 0, tokens = 0;
      const size_t count = last_rows(numbers, want, moved, tokens,
                                     [&](const Row& row) { return row.density * (stop - begin); });
      double cost = query * tokens + key * missing(helper, begin, stop);
      if (count == numbers.size()) {
        const int64_t own = rows_[numbers.front() / plan_.grain * plan_.grain].start;
        cost -= key * std::max<int64_t>(0, std::min(stop, own) - begin);
      }
      consider(cost / std::min(static_cast<double>(moved), want), count, stop);
    }
  }

  // The number of rows, counted from the last, that together hold at least `want` pairs. Adds up their pairs
  // in `moved` and their tokens in `tokens`.
  template <class Pairs>
  size_t last_rows(const Numbers& numbers, double want, int64_t& moved, int64_t& tokens, Pairs pairs) {
    size_t count = 0;
    while (count < numbers.size()) {
      const Row& row = rows_[numbers[numbers.size() - ++count]];
      moved += pairs(row);
      tokens += row.length();
      if (static_cast<double>(moved) >= want) break;
    }
    return count;
  }

  int64_t missing(int64_t rank, int64_t start, int64_t stop) const {
    int64_t gap = stop - start;
    for (const auto& [a, b] : present_[rank])
      gap -= std::max<int64_t>(0, std::min(b, stop) - std::max(a, start));
    return std::max<int64_t>(0, gap);
  }

  int64_t move(int64_t helper, const Offer& offer, double want) {
    int64_t moved = 0;
    for (size_t i = offer.rows.size(); i-- > 0;) {
      const int64_t number = offer.rows[i];
      Row& row = rows_[number];
      const double room = want - static_cast<double>(moved) + slack_ / 2;
      if (room <= slack_ / 2) break;
      if (offer.stop == kAllKeys && static_cast<double>(row.left()) <= room) {
        moved += row.left();
        grant(helper, number, row.first_key(), row.last_key());
        row.given = true;
      } else {
        moved += move_prefix(helper, number, std::min(offer.stop, row.shared), room);
      }
    }
    return moved;
  }

  int64_t move_prefix(int64_t helper, int64_t number, int64_t stop, double room) {
    Row& row = rows_[number];
    const int64_t first = row.first_key();
    if (row.density && static_cast<double>(stop - first) > room / row.density)
      stop = aligned(first + room / row.density);
    const int64_t pairs = row.pairs(first, stop);
    if (!pairs) return 0;
    grant(helper, number, first, stop);
    row.taken = stop;
    return pairs;
  }

  void grant(int64_t helper, int64_t number, int64_t start, int64_t stop) {
    plan_.grants.push_back({helper, number, start, stop});
    present_[helper].push_back({start, stop});
  }

  int64_t aligned(double position) const { return static_cast<int64_t>(position) / quantum_ * quantum_; }

  Assignment& plan_;
  std::vector<Row>& rows_;
  Prices prices_;
  std::vector<int64_t> nodes_;
  double level_, slack_;
  int64_t quantum_;
  std::vector<std::vector<std::pair<int64_t, int64_t>>> present_;
  std::vector<double> surplus_;
  Numbers donors_;
};

}  // namespace

Assignment solve(std::vector<Row> rows, int64_t grain, const Prices& prices, std::vector<int64_t> nodes,
                 double target, double tolerance, int64_t quantum) {
  const int64_t num_ranks = static_cast<int64_t>(nodes.size());
  Assignment plan{std::move(rows), {}, std::vector<int64_t>(num_ranks, 0), grain, quantum};
  for (size_t i = 0; i < plan.rows.size(); ++i) plan.loads[i / grain % num_ranks] += plan.rows[i].left();
  const int64_t total = std::accumulate(plan.loads.begin(), plan.loads.end(), int64_t{0});
  const double mean = static_cast<double>(total) / static_cast<double>(num_ranks);
  Solver(plan, prices, std::move(nodes), mean * target, mean * tolerance).run();
  return plan;
}

}  // namespace mls::plan
