// The features of compute capability 9.0: mbarriers, TMA copies, two memory proxies, wgmma.
#pragma once
#include <array>
#include <map>
#include <string>
#include <vector>

#include "cuda/emulation/machine.h"

namespace mls::emu {

// A rank-4 tensor, (dim, tokens, heads, batch), copied in boxes of 128 bytes x `rows` tokens to shared memory
// with the 128-byte swizzle.
struct TensorMap {
  const unsigned char* data = nullptr;
  std::array<int64_t, 4> sizes = {};
  std::array<int64_t, 4> strides = {};  // bytes; the first is the element size
  int rows = 0;
};

struct WgmmaCall {
  int columns;
  Format format;
  bool accumulate;
  bool transpose_a, transpose_b;
  const uint32_t* a_registers;  // null: use descriptor_a
  uint64_t descriptor_a, descriptor_b;
};

class Block;

struct Hopper {
  explicit Hopper(Block& block) : block(block) {}

  void reset();
  std::string describe_waits() const;

  // Ordinary stores become visible to the async proxy (wgmma, TMA copies) at the storing thread's proxy
  // fence.
  void note_store(int thread, size_t offset, size_t bytes);
  void proxy_fence();

  void barrier_init(const void* barrier, int count);
  void barrier_arrive(const void* barrier, int transaction_bytes);
  void barrier_wait(const void* barrier, int parity);

  void tensor_copy(const void* target, const TensorMap& map, const void* barrier, std::array<int, 4> at);
  void tensor_reduce_add(const TensorMap& map, const void* source, std::array<int, 4> at);
  void tensor_reduce_commit();
  void tensor_reduce_wait_read();
  // Empty, or a description of what a finished block left incomplete.
  std::string describe_unfinished() const;
  void land_sometimes();
  bool land_one();

  void wgmma(float* accumulator, const WgmmaCall& call);
  void wgmma_fence();
  void wgmma_commit();
  void wgmma_wait(int pending);

 private:
  struct Barrier {
    int count, pending, transaction_bytes, phase;
    Waiters waiters;
  };
  struct PendingCopy {
    size_t target;
    TensorMap map;
    size_t barrier;
    std::array<int, 4> at;
  };
  // A reduction reads shared memory when it is issued or, depending on the seed, only when its thread waits
  // for the read.
  struct PendingReduction {
    int thread;
    size_t source;
    TensorMap map;
    std::array<int, 4> at;
    bool committed = false, read = false;
  };
  struct WgmmaTask {
    WgmmaCall call;
    std::array<const uint32_t*, 128> a_registers;
    float* accumulator;       // that of the first thread; identifies the accumulator
    std::vector<float> a, b;  // 64 x 16 and columns x 16, once read
  };
  // An accumulator with products in flight. Its registers hold NaN until they complete.
  struct InFlight {
    std::array<float*, 128> registers;
    int columns;
    std::vector<float> values;
  };
  enum class WarpgroupStep { kNone, kMma, kFence, kCommit, kWait };
  struct Warpgroup {
    WarpgroupStep step = WarpgroupStep::kNone;
    int arrived = 0;
    bool fenced = false;
    std::array<float*, 128> accumulators = {};
    std::array<const uint32_t*, 128> a_registers = {};
    std::vector<WgmmaTask> open;
    std::vector<std::vector<WgmmaTask>> groups;
    std::map<float*, InFlight> in_flight;
  };

  // Returns true in the last thread to arrive, which acts for all 128.
  bool warpgroup_arrive(WarpgroupStep step);
  void warpgroup_release();
  Warpgroup& warpgroup();
  Barrier& find(const void* barrier);
  void advance(Barrier& barrier);
  void land(const PendingCopy& copy);
  void reduce(PendingReduction& reduction);
  void let_others_run(unsigned turns);
  void check_panels(uint64_t descriptor, int elements);
  void issue(Warpgroup& group, const WgmmaCall& call);
  void read_operands(WgmmaTask& task);
  float element(Format format, uint64_t descriptor, int major, int k, bool transposed);
  void multiply(Warpgroup& group, WgmmaTask& task);
  void write_back(Warpgroup& group);

  Block& block;
  std::vector<unsigned char> async_view;  // shared memory as seen by the async proxy
  std::vector<std::vector<std::pair<size_t, size_t>>> unfenced;
  std::map<size_t, Barrier> barriers;
  std::vector<PendingCopy> copies;
  std::vector<PendingReduction> reductions;
  // Number of turns for which asynchronous work waits before it reads shared memory.
  unsigned product_patience = 1, reduction_patience = 1;
  unsigned laziness = 0;  // a copy completes at one in `laziness` switches; 0: only when every thread waits
  std::vector<Warpgroup> warpgroups;
};

}  // namespace mls::emu
