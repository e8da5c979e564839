// Runs numbered tasks on torch's threads, each with scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace mls::cpu {

constexpr size_t kPage = 4096, kHugePage = 2 << 20;

inline size_t round_up_bytes(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// The workers' scratch memory, kept for the next call of the same thread: getting fresh pages from the
// operating system would take a tenth of the time of a short attention call. It uses huge pages, because a
// block of rows and its keys span more small pages than the TLB holds.
class Scratch {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const size_t size = round_up_bytes(bytes, kHugePage);
      memory_.reset(new (kAlignment) char[size]);
      size_ = size;
#if defined(__linux__)
      madvise(memory_.get(), size_, MADV_HUGEPAGE);  // only advice: may fail without harm
#endif
    }
    return memory_.get();
  }
  void keep_at_most(size_t bytes) {
    if (size_ <= bytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr std::align_val_t kAlignment{kHugePage};
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, kAlignment); }
  };

  std::unique_ptr<char[], Free> memory_;
  size_t size_ = 0;
};

// Each worker takes the next task until none is left. parallel_for gives each thread one index of [0,
// workers), or all of them to one thread; either way there is one worker per index, and tasks start in
// ascending order.
template <class RunTask>
void run_tasks(int64_t num_tasks, size_t scratch_bytes, RunTask run_task) {
  if (num_tasks == 0) return;
  const int64_t workers = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  const size_t stride = round_up_bytes(scratch_bytes, kPage);
  static thread_local Scratch kept;
  char* const scratch = kept.at_least(workers * stride);  // here, because a worker thread must not throw
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < num_tasks;) run_task(task, scratch + worker * stride);
  });
}

}  // namespace mls::cpu
