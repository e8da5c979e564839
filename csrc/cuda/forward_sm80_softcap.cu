#include "cuda/forward_sm80_instances.h"

namespace mls::cuda {

#define MLS_DEFINE(D, Dv) \
  MLS_DEFINE_FORWARD_SM80(BFloat16, D, Dv, true) MLS_DEFINE_FORWARD_SM80(Float16, D, Dv, true)
MLS_FOR_EACH_HEAD_DIM(MLS_DEFINE)

}  // namespace mls::cuda
