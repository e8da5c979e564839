// Included once by each variant_*.cpp, after its target pragma: the whole kernel, in that variant's
// namespace.
#include "backward.h"
#include "backward_vector.h"
#include "float_words.h"
#include "forward.h"
#include "forward_vector.h"
#include "peak.h"
#include "row_dots.h"

namespace mls::cpu::MLS_VARIANT {

template <class Forward, class Backward>
constexpr Kernel make_kernel(double (*peak_work)(int64_t iterations)) {
  return {forward_workload<Forward>, forward_task<Forward>,   backward_workload<Backward>,
          init_turns<Backward>,      backward_task<Backward>, peak_work};
}

template <class Operands>
constexpr Kernel vector_kernel() {
  return make_kernel<VectorForward<Operands>, VectorBackward<Operands>>(
      vector_peak_work<typename Operands::Words>);
}

template <class Bf16Operands = Widened<BFloat16>>
constexpr KernelTable vector_table(const char* name) {
  constexpr Kernel float32 = vector_kernel<Widened<Float32>>();
  constexpr Kernel bfloat16 = vector_kernel<Bf16Operands>();
  return {name, float32, float32, bfloat16, float32, bfloat16, attention_delta};
}

}  // namespace mls::cpu::MLS_VARIANT
