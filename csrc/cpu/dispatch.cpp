// Picks the instruction-set variant, once.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernel_table.h"

namespace mls::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// The processor has tiles for bf16, and the kernel lets this process use them: their 8 KiB of state are only
// saved for processes that asked.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16Bit = 1u << 22, kAmxTileBit = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kAmxBf16Bit) == 0 || (d & kAmxTileBit) == 0 || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr long kRequestPermission = 0x1023,
                 kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Variant {
  const KernelTable* table;
  bool runs_here;
};

// Fastest first.
std::vector<Variant> variants() {
  return {
#if defined(__x86_64__)
      {&kAmxTable, has_avx512() && has_amx()},
      {&kAvx512Table, has_avx512()},
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
