// Selects the instruction-set variant, once per process.
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
#include "visible_keys.h"

namespace mls::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

// Whether the processor has AMX tiles with bf16 products and the operating system lets this process use them:
// their 8 KiB of state are saved only for processes that have asked for it.
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
  const LinearKernel* linear;
  bool runs_here;
  bool automatic = true;  // may be selected without being named in MLS_CPU_ISA
};

// Fastest first.
std::vector<Variant> variants() {
  return {
#if defined(__x86_64__)
      {&kAmxTable, &kAvx512Linear, has_avx512() && has_amx()},
      {&kAmxTilesTable, &kAvx512Linear, has_avx512() && has_amx(), false},
      // AMD processors multiply bf16 pairs at twice the rate of fp32 values, Intel processors at half that
      // rate.
      {&kAvx512Bf16Table, &kAvx512Linear, has_avx512_bf16(), __builtin_cpu_is("amd") != 0},
      {&kAvx512Table, &kAvx512Linear, has_avx512()},
      {&kAvx2Table, &kAvx2Linear, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kBaselineTable, &kBaselineLinear, true},
  };
}

const Variant& select() {
  const char* variable = std::getenv("MLS_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  std::string usable;
  static const std::vector<Variant> all = variants();
  for (const Variant& variant : all) {
    if (!variant.runs_here) continue;
    if (wanted.empty() ? variant.automatic : wanted == variant.table->name) return variant;
    usable += usable.empty() ? "" : ", ";
    usable += variant.table->name;
  }
  throw std::runtime_error("MLS_CPU_ISA=" + wanted +
                           ": this build and machine have no such variant. Use one of: " + usable + ".");
}

const Variant& selected() {
  static const Variant& variant = select();
  return variant;
}

}  // namespace

const Kernel& KernelTable::of_float32(const AttentionShape& shape, const KeyMask& mask) const {
  // Below about 256 visible keys per row (or rows per key), packing for AMX costs more than it saves.
  // Measured crossover.
  constexpr int64_t kFewPairs = 256;
  const int64_t pairs = visible_pairs(shape, mask);
  const bool few_keys = pairs < kFewPairs * shape.num_queries;
  const bool few_rows = pairs * shape.heads_per_group() < kFewPairs * shape.num_keys;
  return few_keys || few_rows ? sparse_float32 : float32;
}

const KernelTable& selected_table() {
  return *selected().table;
}

const LinearKernel& selected_linear() {
  return *selected().linear;
}

}  // namespace mls::cpu
