// megatron_lightseq._plan: the C++ solver of the `balanced` method. It does not use torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "steps.h"

namespace py = pybind11;
using namespace mls::plan;

namespace {

// (start, stop, edges, sums, shared, document, density)
using PythonRow =
    std::tuple<int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>, int64_t, int64_t, int64_t>;

constexpr size_t kFields = 7;  // step, rank, q_start, q_stop, k_start, k_stop, area

py::bytes blocks_as_bytes(const std::vector<Timed>& timed) {
  std::vector<int64_t> flat;
  flat.reserve(timed.size() * kFields);
  for (const auto& [step, rank, block] : timed)
    flat.insert(flat.end(),
                {step, rank, block.q_start(), block.q_stop(), block.k_start, block.k_stop, block.area()});
  return py::bytes(reinterpret_cast<const char*>(flat.data()), flat.size() * sizeof(int64_t));
}

py::bytes plan(std::vector<Row> rows, int64_t grain, int64_t quantum, double query, double key, double far,
               const std::vector<int64_t>& nodes, double target, double tolerance, int64_t num_steps,
               double edge) {
  if (grain < 1 || quantum < 1 || num_steps < 3 || nodes.empty() || rows.empty() ||
      rows.size() % (nodes.size() * static_cast<size_t>(grain)))
    throw std::invalid_argument(
        "plan: there must be `grain` rows per piece, a multiple of the number of nodes as pieces, and 3 "
        "steps or more");
  py::gil_scoped_release release;
  const Assignment assignment =
      solve(std::move(rows), grain, {query, key, far}, nodes, target, tolerance, quantum);
  const std::vector<Timed> timed = stage(assignment, num_steps, edge, nodes);
  py::gil_scoped_acquire acquire;
  return blocks_as_bytes(timed);
}

py::bytes plan_documents(const std::vector<int64_t>& documents, int64_t grain, int64_t batch_rows,
                         int64_t quantum, double query, double key, double far,
                         const std::vector<int64_t>& nodes, double target, double tolerance,
                         int64_t num_steps, double edge) {
  if (documents.size() < 2 || documents.front() != 0 || grain < 1 || batch_rows < 1 || quantum < 1 ||
      nodes.empty())
    throw std::invalid_argument("plan_documents: borders must begin with 0 and end with the sequence length");
  const std::vector<int64_t> borders =
      row_borders(documents.back(), batch_rows * nodes.size(), grain, quantum);
  return plan(rows_of_documents(documents, borders), grain, quantum, query, key, far, nodes, target,
              tolerance, num_steps, edge);
}

py::bytes plan_rows(const std::vector<PythonRow>& given, int64_t grain, int64_t quantum, double query,
                    double key, double far, const std::vector<int64_t>& nodes, double target,
                    double tolerance, int64_t num_steps, double edge) {
  std::vector<Row> rows;
  rows.reserve(given.size());
  for (const auto& [start, stop, edges, sums, shared, document, density] : given) {
    if (edges.size() < 2 || edges.size() != sums.size())
      throw std::invalid_argument(
          "plan_rows: a row must have as many sums as edges, and at least two of each");
    rows.push_back({start, stop, edges, sums, shared, document, density});
  }
  return plan(std::move(rows), grain, quantum, query, key, far, nodes, target, tolerance, num_steps, edge);
}

}  // namespace

PYBIND11_MODULE(_plan, module) {
  module.doc() = "Plans for the `balanced` method: which rank computes which block at which step.";
  const char* result =
      "Blocks as int64 (step, rank, q_start, q_stop, k_start, k_stop, area), in tokens of the sequence.";
  module.def("plan_documents", &plan_documents, py::arg("documents"), py::arg("grain"), py::arg("batch_rows"),
             py::arg("quantum"), py::kw_only(), py::arg("query"), py::arg("key"), py::arg("far"),
             py::arg("nodes"), py::arg("target"), py::arg("tolerance"), py::arg("num_steps"), py::arg("edge"),
             result);
  module.def("plan_rows", &plan_rows, py::arg("rows"), py::arg("grain"), py::arg("quantum"), py::kw_only(),
             py::arg("query"), py::arg("key"), py::arg("far"), py::arg("nodes"), py::arg("target"),
             py::arg("tolerance"), py::arg("num_steps"), py::arg("edge"), result);
}
