// Included once by each variant's source, after its target pragma: linear attention in that variant's
// namespace.
#include "channel_decay.h"
#include "head_decay.h"
#include "pieces.h"

namespace mls::cpu::MLS_VARIANT {

constexpr LinearKernel linear_kernel() {
  return {linear_tasks, any_linear_task};
}

}  // namespace mls::cpu::MLS_VARIANT
