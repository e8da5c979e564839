#include "cuda/emulation/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>

#include "cuda/emulation/hopper.h"
#include "cuda/emulation/switch_fiber.h"

namespace mls::emu {
namespace {

constexpr size_t kStackBytes = 96 * 1024;
constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr size_t kSharedAlignment = 1024;

thread_local Block* running_block = nullptr;

uint32_t bit_of(int thread) {
  return 1u << (thread % 32);
}

void land(std::vector<AsyncCopy>& group) {
  for (const AsyncCopy& copy : group) std::memcpy(copy.target, copy.data, sizeof copy.data);
  group.clear();
}

// Bank conflicts of one access: the largest number of different words requested from one of the 32 four-byte
// banks, minus one.
uint64_t extra_wavefronts(const std::vector<size_t>& words) {
  std::map<size_t, std::vector<size_t>> banks;
  size_t most = 1;
  for (size_t word : words) {
    std::vector<size_t>& asked = banks[word % 32];
    if (std::find(asked.begin(), asked.end(), word) == asked.end()) asked.push_back(word);
    most = std::max(most, asked.size());
  }
  return most - 1;
}

}  // namespace

void enter_fiber() {
  Block& block = Block::current();
  block.kernel_();
  ++block.finished_;
  void* never_resumed;
  block.switch_away(&never_resumed);
  __builtin_unreachable();
}

Block::Block(Dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
             const Options& options)
    : grid_(grid), kernel_(kernel), seed_(options.seed), lanes_(threads), copies_(threads) {
  stacks_bytes_ = static_cast<size_t>(threads) * kStackBytes;
  stacks_ = static_cast<unsigned char*>(mmap(nullptr, stacks_bytes_, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  shared_storage_.resize(shared_bytes + kSharedAlignment);
  const auto address = reinterpret_cast<uintptr_t>(shared_storage_.data());
  shared_ = shared_storage_.data() + (kSharedAlignment - address % kSharedAlignment);
  shared_bytes_ = shared_bytes;
  hopper_ = new Hopper(*this);
}

Block::~Block() {
  delete hopper_;
  munmap(stacks_, stacks_bytes_);
}

Block& Block::current() {
  return *running_block;
}

uint32_t Block::random() {  // xorshift64
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<uint32_t>(random_state_ >> 32);
}

std::string Block::run(Dim3 index) {
  const uint64_t number =
      index.x + static_cast<uint64_t>(grid_.x) * (index.y + static_cast<uint64_t>(grid_.y) * index.z);
  index_ = index;
  random_state_ = (seed_ * 0x9E3779B97F4A7C15ull ^ (number + 1) * 0xD1B54A32D192ED03ull) | 1;
  failure_.clear();
  std::memset(shared_, 0xff, shared_bytes_);  // NaN in every format
  start_threads();
  hopper_->reset();
  running_block = this;
  lane_ = nullptr;
  switch_away(&main_stack_pointer_);
  running_block = nullptr;
  return failure_.empty() ? describe_unfinished() : failure_;
}

// Empty, or a description of what a finished block left incomplete.
std::string Block::describe_unfinished() const {
  for (const auto& [id, barrier] : barriers_)
    if (barrier.arrived) return "a block ended with arrivals at barrier " + std::to_string(id);
  return hopper_->describe_unfinished();
}

void Block::start_threads() {
  const int warps = num_threads() / 32;
  ready_.assign(warps, kWholeWarp);
  arrived_.assign(warps, 0);
  barriers_.clear();
  finished_ = 0;
  warp_ = static_cast<int>(random() % warps);
  for (int i = 0; i < num_threads(); ++i) {
    lanes_[i] = Lane{};
    lanes_[i].index = Dim3(i, 0, 0);
    lanes_[i].stack_pointer = new_fiber(stacks_ + (i + 1) * kStackBytes);
    copies_[i].assign(1, {});
  }
}

void Block::fail(const std::string& what) {
  failure_ = what + " (block " + std::to_string(index_.x) + "," + std::to_string(index_.y) + "," +
             std::to_string(index_.z) + ", thread " + (lane_ ? std::to_string(thread()) : "none") + ")";
  void* never_resumed;
  switch_fiber(&never_resumed, main_stack_pointer_);
  __builtin_unreachable();
}

// Usually continues the current warp; otherwise picks any warp that can run.
bool Block::choose_warp() {
  const int warps = static_cast<int>(ready_.size());
  if (ready_[warp_] && random() % 64) return true;
  const int first = static_cast<int>(random() % warps);
  for (int i = 0; i < warps; ++i) {
    const int warp = (first + i) % warps;
    if (ready_[warp]) {
      warp_ = warp;
      return true;
    }
  }
  return false;
}

void Block::switch_away(void** save) {
  hopper_->land_sometimes();
  while (!choose_warp()) {
    if (hopper_->land_one()) continue;  // all threads may be waiting for a copy in flight
    if (finished_ == num_threads()) {
      lane_ = nullptr;
      switch_fiber(save, main_stack_pointer_);
      return;
    }
    fail(describe_deadlock());
  }
  const int lane = std::countr_zero(ready_[warp_]);
  ready_[warp_] &= ~(1u << lane);
  Lane* next = &lanes_[warp_ * 32 + lane];
  if (next == lane_) return;
  lane_ = next;
  switch_fiber(save, next->stack_pointer);
}

std::string Block::describe_deadlock() const {
  std::string text = "deadlock: " + std::to_string(finished_) + " of " + std::to_string(num_threads()) +
                     " threads have ended";
  for (size_t warp = 0; warp < arrived_.size(); ++warp)
    if (arrived_[warp])
      text += "; warp " + std::to_string(warp) + " has only " +
              std::to_string(std::popcount(arrived_[warp])) + " lanes in a collective operation";
  for (const auto& [id, barrier] : barriers_)
    if (barrier.arrived)
      text += "; barrier " + std::to_string(id) + " has " + std::to_string(barrier.arrived) + " of " +
              std::to_string(barrier.expected) + " threads";
  return text + hopper_->describe_waits();
}

void Block::sleep(Waiters& waiters) {
  waiters.resize(ready_.size());
  waiters[thread() / 32] |= bit_of(thread());
  switch_away(&lane_->stack_pointer);
}

void Block::wake(Waiters& waiters) {
  for (size_t warp = 0; warp < waiters.size(); ++warp) ready_[warp] |= waiters[warp];
  waiters.clear();
}

void Block::yield() {
  ready_[thread() / 32] |= bit_of(thread());
  warp_ = static_cast<int>(random() % ready_.size());
  switch_away(&lane_->stack_pointer);
}

void Block::collective(Operation operation) {
  const int warp = thread() / 32;
  lane_->operation = operation;
  arrived_[warp] |= bit_of(thread());
  if (arrived_[warp] != kWholeWarp) {
    switch_away(&lane_->stack_pointer);
    return;
  }
  Lane* lanes = &lanes_[warp * 32];
  for (int i = 0; i < 32; ++i)
    if (lanes[i].operation != operation) fail("lanes of one warp are in different collective operations");
  execute(lanes, operation);
  arrived_[warp] = 0;
  ready_[warp] = kWholeWarp & ~bit_of(thread());
}

// bar.sync (wait) and bar.arrive.
void Block::barrier(int id, int expected, bool wait) {
  NamedBarrier& barrier = barriers_[id];
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected)
    fail("threads disagree on the number of threads at barrier " + std::to_string(id));
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++statistics.barriers;
    wake(barrier.waiters);
    if (!wait) return;
    yield();
    return;
  }
  if (wait) sleep(barrier.waiters);
}

size_t Block::check_shared(const void* address, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < shared_ || p + bytes > shared_ + shared_bytes_) fail("shared memory access out of bounds");
  const auto offset = static_cast<size_t>(p - shared_);
  if (offset % bytes) fail("misaligned shared memory access");
  return offset;
}

void Block::copy_async(void* target, const void* source, bool valid) {
  check_shared(target, 16);
  AsyncCopy copy{static_cast<unsigned char*>(target), {}};
  if (valid && reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async: misaligned global address");
  if (valid) std::memcpy(copy.data, source, 16);
  std::memset(target, 0xff, 16);
  copies_[thread()].back().push_back(copy);
  ++statistics.async_copies;
}

void Block::copy_async_commit() {
  copies_[thread()].emplace_back();
}

void Block::copy_async_wait(int pending) {
  CopyGroups& groups = copies_[thread()];
  while (static_cast<int>(groups.size()) - 1 > pending) {
    land(groups.front());
    groups.pop_front();
  }
}

void Block::execute(Lane* lanes, Operation operation) {
  switch (operation) {
    case Operation::kShuffle:
      return shuffle(lanes);
    case Operation::kLdmatrix:
      return ldmatrix(lanes, false);
    case Operation::kLdmatrixTransposed:
      return ldmatrix(lanes, true);
    case Operation::kMma:
      return mma(lanes);
    case Operation::kStoreShared:
      return store_shared(lanes, 1);
    case Operation::kStorePair:
      return store_shared(lanes, 2);
    case Operation::kStmatrix:
      return stmatrix(lanes);
    case Operation::kSyncWarp:
    case Operation::kNone:
      return;
  }
}

void Block::shuffle(Lane* lanes) {
  ++statistics.shuffles;
  uint32_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = lanes[i].value;
  for (int i = 0; i < 32; ++i) lanes[i].value = values[i ^ lanes[i].lane_mask];
}

void Block::ldmatrix(Lane* lanes, bool transposed) {
  ++statistics.ldmatrix;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    unsigned columns = 0;
    for (int r = 0; r < 8; ++r) {
      const void* address = lanes[matrix * 8 + r].address;
      const unsigned bank_group = 1u << (check_shared(address, 16) / 16 % 8);
      statistics.bank_conflicts += (columns & bank_group) != 0;
      columns |= bank_group;
      std::memcpy(rows[r], address, 16);
    }
    for (int i = 0; i < 32; ++i) {
      const int r = i / 4, c = i % 4 * 2;
      const uint16_t low = transposed ? rows[c][r] : rows[r][c];
      const uint16_t high = transposed ? rows[c + 1][r] : rows[r][c + 1];
      lanes[i].registers[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
void Block::mma(Lane* lanes) {
  ++statistics.mma;
  float a[16][16], b[16][8], d[16][8];
  const Format format = lanes[0].format;
  const auto unpack = [format](uint32_t pair, float& low, float& high) {
    low = to_float(format, static_cast<uint16_t>(pair));
    high = to_float(format, static_cast<uint16_t>(pair >> 16));
  };
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      float* row = a[g + r % 2 * 8] + t + r / 2 * 8;
      unpack(lanes[i].a[r], row[0], row[1]);
    }
    for (int r = 0; r < 2; ++r) unpack(lanes[i].b[r], b[t + r * 8][g], b[t + r * 8 + 1][g]);
    for (int e = 0; e < 4; ++e) d[g + e / 2 * 8][t + e % 2] = lanes[i].accumulator[e];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int i = 0; i < 32; ++i)
    for (int e = 0; e < 4; ++e) lanes[i].accumulator[e] = d[i / 4 + e / 2 * 8][i % 4 * 2 + e % 2];
}

void Block::put_word(Lane& lane, size_t offset, uint32_t value) {
  std::memcpy(shared_ + offset, &value, 4);
  hopper_->note_store(static_cast<int>(&lane - lanes_.data()), offset, 4);
}

// Eight-byte stores access the banks half a warp at a time.
void Block::store_shared(Lane* lanes, size_t words) {
  std::vector<size_t> asked;
  for (int i = 0; i < 32; ++i) {
    const size_t offset = check_shared(lanes[i].address, words * 4);
    put_word(lanes[i], offset, lanes[i].value);
    if (words == 2) put_word(lanes[i], offset + 4, lanes[i].second_value);
    for (size_t word = 0; word < words; ++word) asked.push_back(offset / 4 + word);
    if (asked.size() < 32) continue;
    statistics.bank_conflicts += extra_wavefronts(asked);
    asked.clear();
  }
}

void Block::stmatrix(Lane* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::vector<size_t> asked;
    for (int i = 0; i < 32; ++i) {
      const size_t offset = check_shared(lanes[matrix * 8 + i / 4].address, 16) + i % 4 * 4;
      put_word(lanes[i], offset, lanes[i].registers[matrix]);
      asked.push_back(offset / 4);
    }
    statistics.bank_conflicts += extra_wavefronts(asked);
  }
}

Options& options() {
  static Options value;
  return value;
}

Statistics& statistics() {
  static Statistics value = {};
  return value;
}

namespace {

std::mutex merge_mutex;

void merge(const Statistics& part, const std::string& failure, std::string& first_failure) {
  const std::lock_guard lock(merge_mutex);
  auto* sum = reinterpret_cast<uint64_t*>(&statistics());
  const auto* add = reinterpret_cast<const uint64_t*>(&part);
  for (size_t i = 0; i < sizeof(Statistics) / sizeof(uint64_t); ++i) sum[i] += add[i];
  if (first_failure.empty()) first_failure = failure;
}

}  // namespace

std::string run_grid(Dim3 blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32) return "a block must consist of whole warps";
  const uint64_t total = static_cast<uint64_t>(blocks.x) * blocks.y * blocks.z;
  std::atomic<uint64_t> next{0};
  std::string failure;
  const auto work = [&] {
    Block block(blocks, threads, shared_bytes, kernel, options());
    std::string problem;
    for (uint64_t i; problem.empty() && (i = next++) < total;)
      problem = block.run(
          Dim3(i % blocks.x, i / blocks.x % blocks.y, i / (static_cast<uint64_t>(blocks.x) * blocks.y)));
    merge(block.statistics, problem, failure);
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < options().threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return failure;
}

float to_float(Format format, uint16_t bits) {
  if (format == Format::kFloat16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t from_float(Format format, float value) {
  if (format == Format::kFloat16) {
    const auto half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  if (std::isnan(value)) return 0x7fff;
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace mls::emu
