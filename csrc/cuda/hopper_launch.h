// How kernels that need compute capability 9.0a are started.
#pragma once
#include "cuda/primitives/sm90.h"

namespace mls::cuda {

// False, and nothing is started, where CUDA has no sm_90a code of the kernel or cannot describe its tensors:
// other kernels then take them.
template <class T, class Kernel, class Arguments>
bool launch_hopper(Kernel kernel, Dim3 blocks, int shared_bytes, void* stream, Arguments& arguments,
                   const char** failure) {
  static const bool has_code = has_sm90a_code(kernel);  // T names the kernel
  if (!has_code || !arguments.template describe<T>()) return false;
  *failure = launch(kernel, blocks, T::kThreads, shared_bytes, stream, arguments);
  return true;
}

}  // namespace mls::cuda
