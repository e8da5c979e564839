#include "cuda/backward_sm90_instances.h"

namespace mls::cuda {

#define MLS_DEFINE(D, Dv)                          \
  MLS_DEFINE_BACKWARD_SM90(BFloat16, D, Dv, false) \
  MLS_DEFINE_BACKWARD_SM90(Float16, D, Dv, false)
MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(MLS_DEFINE)

}  // namespace mls::cuda
