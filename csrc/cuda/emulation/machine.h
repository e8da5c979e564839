// Runs kernels on a CPU. Every CUDA thread is a fiber, and every block runs on one OS thread.
//
// The machine is adversarial wherever the GPU gives no guarantee: the order of warps is drawn from a seed,
// shared memory starts as NaN, asynchronous copies complete only when something waits for them (or at a
// random earlier moment), wgmma reads its operands at issue or at completion depending on the seed, and a
// memory proxy sees ordinary stores only after a fence. It reports mixed collectives, deadlocks, and
// misaligned or out-of-bounds shared addresses, and counts bank conflicts.
//
// It cannot show speed, register pressure, the rounding of ex2.approx and of tensor cores, weak memory order
// between blocks, or misreadings of the PTX ISA that it shares with the primitives. Those need a GPU:
// scripts/gpu_check.sh compares each primitive bit for bit with vectors that this machine wrote.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace mls::emu {

struct Dim3 {
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

enum class Format { kBFloat16, kFloat16 };

enum class Operation {
  kNone,
  kShuffle,
  kSyncWarp,
  kLdmatrix,
  kLdmatrixTransposed,
  kMma,
  kStoreShared,
  kStorePair,
  kStmatrix
};

// Event counts, summed over all blocks since the caller last cleared them.
struct Statistics {
  uint64_t mma, ldmatrix, shuffles, barriers, async_copies, wgmma, bank_conflicts;
};

struct Options {
  uint64_t seed = 1;
  int threads = 1;
  bool refuses_tensor_maps = false;  // simulates a driver that refuses them
};

// One CUDA thread, and its operands of the warp collective that it waits in.
struct Lane {
  void* stack_pointer = nullptr;
  Dim3 index;
  Operation operation = Operation::kNone;
  const void* address = nullptr;
  uint32_t* registers = nullptr;
  uint32_t value = 0, second_value = 0;
  int lane_mask = 0;
  Format format = Format::kBFloat16;
  float* accumulator = nullptr;
  const uint32_t* a = nullptr;
  uint32_t b[2] = {};
};

struct AsyncCopy {
  unsigned char* target;
  unsigned char data[16];
};

// cp.async groups of one thread; the last one is still open.
using CopyGroups = std::deque<std::vector<AsyncCopy>>;

// A set of threads that wait for one event, as one mask of lanes per warp.
using Waiters = std::vector<uint32_t>;

struct NamedBarrier {
  int expected = 0;
  int arrived = 0;
  Waiters waiters;
};

struct Hopper;

// One running block.
class Block {
 public:
  Block(Dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
        const Options& options);
  ~Block();
  Block(const Block&) = delete;

  // Returns an empty string, or what the kernel did wrong.
  std::string run(Dim3 index);

  static Block& current();
  Lane& lane() { return *lane_; }
  int thread() const { return static_cast<int>(lane_ - lanes_.data()); }
  int num_threads() const { return static_cast<int>(lanes_.size()); }
  Dim3 index() const { return index_; }
  Dim3 grid() const { return grid_; }
  unsigned char* shared() { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }

  void collective(Operation operation);
  void barrier(int id, int expected, bool wait);
  void copy_async(void* target, const void* source, bool valid);
  void copy_async_commit();
  void copy_async_wait(int pending);

  // Aborts this block with an error.
  [[noreturn]] void fail(const std::string& what);
  // Checks that `address` is in shared memory of this block, aligned to and valid for `bytes`. Returns its
  // offset.
  size_t check_shared(const void* address, size_t bytes);
  // Suspends the running thread and adds it to `waiters`.
  void sleep(Waiters& waiters);
  void wake(Waiters& waiters);
  // Lets any warp that can run continue first.
  void yield();
  // Reproducible from the seed.
  uint32_t random();
  Hopper& hopper() { return *hopper_; }

  Statistics statistics = {};

 private:
  friend void enter_fiber();
  void start_threads();
  void switch_away(void** save);
  bool choose_warp();
  std::string describe_deadlock() const;
  std::string describe_unfinished() const;
  void execute(Lane* lanes, Operation operation);
  void shuffle(Lane* lanes);
  void ldmatrix(Lane* lanes, bool transposed);
  void mma(Lane* lanes);
  void store_shared(Lane* lanes, size_t words);
  void stmatrix(Lane* lanes);
  void put_word(Lane& lane, size_t offset, uint32_t value);

  Dim3 grid_, index_;
  const std::function<void()>& kernel_;
  uint64_t seed_;
  uint64_t random_state_ = 1;
  std::vector<Lane> lanes_;
  std::vector<uint32_t> ready_;    // per warp, lanes that can run
  std::vector<uint32_t> arrived_;  // per warp, lanes inside the current collective
  std::map<int, NamedBarrier> barriers_;
  std::vector<CopyGroups> copies_;
  int warp_ = 0;
  int finished_ = 0;
  Lane* lane_ = nullptr;
  void* main_stack_pointer_ = nullptr;
  std::string failure_;
  unsigned char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
  std::vector<unsigned char> shared_storage_;
  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  Hopper* hopper_ = nullptr;
};

// Runs a grid. Returns an empty string, or the error of the first block that failed.
std::string run_grid(Dim3 blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

Options& options();
Statistics& statistics();

float to_float(Format format, uint16_t bits);
uint16_t from_float(Format format, float value);

}  // namespace mls::emu
