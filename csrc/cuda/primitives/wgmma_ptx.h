// wgmma in PTX: 64 x N accumulators (N = 16, 32, 64, 80, 128, 256), 16-bit operands from shared memory or,
// for A, registers.
#pragma once
#include "cuda/primitives/sm80_ptx.h"

namespace mls::cuda {

MLS_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

MLS_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the warpgroup's groups are in flight.
template <int kPending>
MLS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from computing values that depend on x before this point.
MLS_DEVICE void keep_here(uint32_t& x) {
  asm volatile("" : "+r"(x));
}

// Keeps the compiler from moving uses of these registers across this point. It does not know that wgmma
// accesses them between its issue and its wait.
template <int kTiles>
MLS_DEVICE void hold(float (&registers)[kTiles][4]) {
  MLS_UNROLL
  for (int j = 0; j < kTiles; ++j)
    asm volatile(""
                 : "+f"(registers[j][0]), "+f"(registers[j][1]), "+f"(registers[j][2]),
                   "+f"(registers[j][3])::"memory");
}

template <int kSteps>
MLS_DEVICE void hold(uint32_t (&registers)[kSteps][4]) {
  MLS_UNROLL
  for (int j = 0; j < kSteps; ++j)
    asm volatile(""
                 : "+r"(registers[j][0]), "+r"(registers[j][1]), "+r"(registers[j][2]),
                   "+r"(registers[j][3])::"memory");
}

// Accumulator registers: their numbers in PTX, and the asm operands.
#define MLS_REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MLS_REGISTERS_16 MLS_REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MLS_REGISTERS_32 MLS_REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MLS_REGISTERS_40 MLS_REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define MLS_REGISTERS_64                                                                               \
  MLS_REGISTERS_32                                                                                     \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%" \
  "56,%57,%58,%59,%60,%61,%62,%63"
#define MLS_REGISTERS_128                                                                              \
  MLS_REGISTERS_64                                                                                     \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%" \
  "88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%" \
  "110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MLS_OPERANDS_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MLS_OPERANDS_8(i) MLS_OPERANDS_4(i), MLS_OPERANDS_4(i + 1)
#define MLS_OPERANDS_16(i) MLS_OPERANDS_8(i), MLS_OPERANDS_8(i + 2)
#define MLS_OPERANDS_32(i) MLS_OPERANDS_16(i), MLS_OPERANDS_16(i + 4)
#define MLS_OPERANDS_40(i) MLS_OPERANDS_32(i), MLS_OPERANDS_8(i + 8)
#define MLS_OPERANDS_64(i) MLS_OPERANDS_32(i), MLS_OPERANDS_32(i + 8)
#define MLS_OPERANDS_128(i) MLS_OPERANDS_64(i), MLS_OPERANDS_64(i + 16)

template <class Element, int kColumns>
struct Wgmma;

// d (64 x N) = a b, or d += a b. By default an operand's k dimension is contiguous in shared memory; with
// kTransposeA, A's rows dimension (M) is, with kTransposeB, B's columns dimension (N). P0.. are the numbers
// of the operands that follow the accumulator.
#define MLS_DEFINE_WGMMA(Element, TYPE, N, R, P0, P1, P2, P3, P4, P5, P6)                                    \
  template <>                                                                                                \
  struct Wgmma<Element, N> {                                                                                 \
    template <bool kTransposeA, bool kTransposeB>                                                            \
    static MLS_DEVICE void from_shared(float (&d)[N / 8][4], uint64_t a, uint64_t b, int accumulate) {       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                    \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MLS_REGISTERS_##R    \
                   "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}\n"                                        \
                   : MLS_OPERANDS_##R(0)                                                                     \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB));                   \
    }                                                                                                        \
    template <bool kTransposeB>                                                                              \
    static MLS_DEVICE void from_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,          \
                                          int accumulate) {                                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                    \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MLS_REGISTERS_##R    \
                   "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n}\n"                      \
                   : MLS_OPERANDS_##R(0)                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB)); \
    }                                                                                                        \
  };

MLS_DEFINE_WGMMA(BFloat16, "bf16", 16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
MLS_DEFINE_WGMMA(Float16, "f16", 16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
MLS_DEFINE_WGMMA(BFloat16, "bf16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
MLS_DEFINE_WGMMA(Float16, "f16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
MLS_DEFINE_WGMMA(BFloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
MLS_DEFINE_WGMMA(Float16, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
MLS_DEFINE_WGMMA(BFloat16, "bf16", 80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
MLS_DEFINE_WGMMA(Float16, "f16", 80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
MLS_DEFINE_WGMMA(BFloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
MLS_DEFINE_WGMMA(Float16, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
MLS_DEFINE_WGMMA(BFloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
MLS_DEFINE_WGMMA(Float16, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

}  // namespace mls::cuda
