// Picks the instruction-set variant, once.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace mls::cpu {
namespace {

struct Variant {
  const KernelTable* table;
  bool runs_here;
};

// Fastest first.
std::vector<Variant> variants() {
  return {
#if defined(__x86_64__)
      {&kAvx512Table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&kAvx2Table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kBaselineTable, true},
  };
}

const KernelTable& select() {
  const char* wanted = std::getenv("MLS_CPU_ISA");
  std::string usable;
  for (const Variant& variant : variants()) {
    if (!variant.runs_here) continue;
    if (wanted == nullptr || *wanted == '\0' || variant.table->name == std::string(wanted))
      return *variant.table;
    usable += usable.empty() ? "" : ", ";
    usable += variant.table->name;
  }
  throw std::runtime_error("MLS_CPU_ISA=" + std::string(wanted) +
                           ": this build and machine have no such variant. Use one of: " + usable + ".");
}

}  // namespace

const KernelTable& selected_table() {
  static const KernelTable& table = select();
  return table;
}

}  // namespace mls::cpu
