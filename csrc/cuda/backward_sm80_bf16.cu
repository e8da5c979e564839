#include "cuda/backward_sm80_instances.h"

namespace mls::cuda {

#define MLS_DEFINE(D, Dv) MLS_DEFINE_BACKWARD_SM80(BFloat16, D, Dv, false)
MLS_FOR_EACH_HEAD_DIM(MLS_DEFINE)

}  // namespace mls::cuda
