// Included once by each variant_*.cpp, after its target pragma: the whole kernel in that variant's namespace.
#include "backward.h"
#include "backward_vector.h"
#include "forward.h"
#include "forward_vector.h"
#include "peak.h"

namespace mls::cpu::MLS_VARIANT {

template <class Forward, class Backward>
constexpr Kernel make_kernel() {
  return {forward_workload<Forward>, forward_task<Forward>,   backward_workload<Backward>,
          init_turns<Backward>,      backward_task<Backward>, vector_peak_work};
}

template <class Element>
constexpr Kernel vector_kernel() {
  return make_kernel<VectorForward<Element>, VectorBackward<Element>>();
}

constexpr KernelTable vector_table(const char* name) {
  return {name, vector_kernel<Float32>(), vector_kernel<Float32>(), vector_kernel<BFloat16>()};
}

}  // namespace mls::cpu::MLS_VARIANT
