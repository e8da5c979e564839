#include "cuda/sm90_instances.h"

namespace mls::cuda {

#define MLS_DEFINE(D, Dv) MLS_DEFINE_FORWARD_SM90(Float16, D, Dv, false)
MLS_FOR_EACH_HOPPER_HEAD_DIM(MLS_DEFINE)

}  // namespace mls::cuda
