// Launches kernels that need compute capability 9.0a, and reports why they cannot run.
#pragma once
#include <atomic>
#include <string>

#include "cuda/primitives/sm90.h"

namespace mls::cuda {

// Why this thread's last launch used a kernel for compute capability 8.0 on Hopper; empty if there is nothing
// to report.
inline std::string& pending_fallback() {
  static thread_local std::string text;
  return text;
}

// Returns the pending report and clears it; null if there is none. The text stays valid until the thread's
// next call.
inline const char* take_fallback() {
  static thread_local std::string taken;
  taken.swap(pending_fallback());
  pending_fallback().clear();
  return taken.empty() ? nullptr : taken.c_str();
}

// Each kernel T is reported once per process: the fallback is slower but correct, and a training run makes
// the same call millions of times.
template <class T>
void report_fallback(const std::string& reason) {
  static std::atomic<bool> is_reported{false};
  if (is_reported.exchange(true)) return;
  pending_fallback() = "attention with head dim " + std::to_string(T::kHeadDim) +
                       " runs the kernel for compute capability 8.0 on this Hopper GPU, at about half the "
                       "speed of the Hopper kernel: " +
                       reason;
}

// Returns false, without launching, if CUDA has no sm_90a code of the kernel or the driver refuses its tensor
// maps. The caller then launches the kernel for compute capability 8.0.
template <class T, class Kernel, class Arguments>
bool launch_hopper(Kernel kernel, Dim3 blocks, int shared_bytes, void* stream, Arguments& arguments,
                   const char** failure) {
  static const bool has_code = has_sm90a_code(kernel);  // T identifies the kernel
  if (!has_code || !arguments.template describe<T>()) {
    report_fallback<T>(has_code ? tensor_map_refusal() : "this build contains no sm_90a code for it");
    return false;
  }
  *failure = launch(kernel, blocks, T::kThreads, shared_bytes, stream, arguments);
  return true;
}

}  // namespace mls::cuda
