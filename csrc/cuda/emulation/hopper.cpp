#include "cuda/emulation/hopper.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace mls::emu {
namespace {

constexpr int kRowBytes = 128;  // one row of a swizzled panel

// The 128-byte swizzle: the index of a 16-byte chunk in its row is XORed with the index of the row in its
// group of eight.
size_t swizzled(size_t offset) {
  return offset ^ (offset >> 7 & 7) << 4;
}

// Position of element e of fragment (j, e) of thread t in a 64-row accumulator.
int fragment_row(int thread, int element) {
  return thread / 32 * 16 + thread % 32 / 4 + element / 2 * 8;
}

int fragment_column(int thread, int tile, int element) {
  return tile * 8 + thread % 4 * 2 + element % 2;
}

}  // namespace

void Hopper::reset() {
  async_view.assign(block.shared_bytes(), 0xff);
  unfenced.assign(block.num_threads(), {});
  barriers.clear();
  copies.clear();
  reductions.clear();
  warpgroups.assign((block.num_threads() + 127) / 128, {});
  constexpr unsigned kLaziness[] = {16, 1024, 0};
  laziness = kLaziness[block.random() % 3];
  constexpr unsigned kPatience[] = {1, 16, 256};
  product_patience = kPatience[block.random() % 3];
  reduction_patience = 8 * kPatience[block.random() % 3];
}

std::string Hopper::describe_waits() const {
  std::string text;
  for (const auto& [offset, barrier] : barriers)
    if (!barrier.waiters.empty())
      text += "; mbarrier at " + std::to_string(offset) + " awaits " + std::to_string(barrier.pending) +
              " arrivals and " + std::to_string(barrier.transaction_bytes) + " bytes";
  for (const Warpgroup& group : warpgroups)
    if (group.arrived)
      text += "; a warpgroup has only " + std::to_string(group.arrived) + " threads at wgmma";
  return text;
}

void Hopper::note_store(int thread, size_t offset, size_t bytes) {
  unfenced[thread].emplace_back(offset, bytes);
}

void Hopper::proxy_fence() {
  auto& stores = unfenced[block.thread()];
  for (const auto& [offset, bytes] : stores)
    std::memcpy(async_view.data() + offset, block.shared() + offset, bytes);
  stores.clear();
}

void Hopper::barrier_init(const void* barrier, int count) {
  barriers[block.check_shared(barrier, 8)] = {count, count, 0, 0, {}};
}

Hopper::Barrier& Hopper::find(const void* barrier) {
  const auto found = barriers.find(block.check_shared(barrier, 8));
  if (found == barriers.end()) block.fail("mbarrier used before its initialisation");
  return found->second;
}

void Hopper::advance(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.transaction_bytes > 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  block.wake(barrier.waiters);
}

void Hopper::barrier_arrive(const void* pointer, int transaction_bytes) {
  Barrier& barrier = find(pointer);
  if (barrier.pending == 0) block.fail("more arrivals at an mbarrier than its count");
  --barrier.pending;
  barrier.transaction_bytes += transaction_bytes;
  const int phase = barrier.phase;
  advance(barrier);
  if (barrier.phase != phase) block.yield();  // waiting threads may run first
}

// Waits until the phase of this parity has completed.
void Hopper::barrier_wait(const void* pointer, int parity) {
  Barrier& barrier = find(pointer);
  while (barrier.phase == parity) block.sleep(barrier.waiters);
}

void Hopper::tensor_copy(const void* target, const TensorMap& map, const void* barrier,
                         std::array<int, 4> at) {
  PendingCopy copy{block.check_shared(target, 16), map, block.check_shared(barrier, 8), at};
  find(barrier);
  const size_t bytes = static_cast<size_t>(map.rows) * kRowBytes;
  if (copy.target % 1024) block.fail("tensor copy: a swizzled target must be 1024-byte aligned");
  if (copy.target + bytes > block.shared_bytes()) block.fail("tensor copy beyond shared memory");
  std::memset(block.shared() + copy.target, 0xff, bytes);
  std::memset(async_view.data() + copy.target, 0xff, bytes);
  copies.push_back(copy);
  ++block.statistics.async_copies;
}

void Hopper::land_sometimes() {
  if (!copies.empty() && laziness != 0 && block.random() % laziness == 0) land_one();
}

// Completes one of the pending copies, chosen at random. Returns false if there is none.
bool Hopper::land_one() {
  if (copies.empty()) return false;
  const size_t chosen = block.random() % copies.size();
  const PendingCopy copy = copies[chosen];
  copies.erase(copies.begin() + static_cast<ptrdiff_t>(chosen));
  land(copy);
  Barrier& barrier = barriers.at(copy.barrier);
  barrier.transaction_bytes -= copy.map.rows * kRowBytes;
  if (barrier.transaction_bytes < 0) block.fail("a tensor copy brought more bytes than its mbarrier expects");
  advance(barrier);
  return true;
}

void Hopper::land(const PendingCopy& copy) {
  const TensorMap& map = copy.map;
  for (int row = 0; row < map.rows; ++row) {
    unsigned char line[kRowBytes] = {};  // zeros outside the tensor
    const int64_t token = copy.at[1] + row;
    const bool inside =
        token >= 0 && token < map.sizes[1] && copy.at[2] < map.sizes[2] && copy.at[3] < map.sizes[3];
    const int64_t bytes = std::min<int64_t>(kRowBytes, (map.sizes[0] - copy.at[0]) * map.strides[0]);
    if (inside && bytes > 0)
      std::memcpy(line,
                  map.data + copy.at[0] * map.strides[0] + token * map.strides[1] +
                      copy.at[2] * map.strides[2] + copy.at[3] * map.strides[3],
                  bytes);
    for (int chunk = 0; chunk < 8; ++chunk) {
      const size_t offset = swizzled(copy.target + row * kRowBytes + chunk * 16);
      std::memcpy(block.shared() + offset, line + chunk * 16, 16);
      std::memcpy(async_view.data() + offset, line + chunk * 16, 16);
    }
  }
}

void Hopper::tensor_reduce_add(const TensorMap& map, const void* source, std::array<int, 4> at) {
  PendingReduction reduction{block.thread(), block.check_shared(source, 16), map, at};
  const size_t bytes = static_cast<size_t>(map.rows) * kRowBytes;
  if (reduction.source % 1024) block.fail("tensor reduction: a swizzled source must be 1024-byte aligned");
  if (reduction.source + bytes > block.shared_bytes()) block.fail("tensor reduction beyond shared memory");
  if (map.strides[0] != 4) block.fail("tensor reduction: the emulator supports fp32 only");
  if (block.random() % 2) reduce(reduction);
  reductions.push_back(reduction);
}

void Hopper::tensor_reduce_commit() {
  for (PendingReduction& reduction : reductions)
    if (reduction.thread == block.thread()) reduction.committed = true;
}

// Lets other warps run, for a long time in some blocks.
void Hopper::let_others_run(unsigned turns) {
  for (unsigned turn = 0; turn < turns; ++turn) block.yield();
}

void Hopper::tensor_reduce_wait_read() {
  let_others_run(reduction_patience);  // other warps may overwrite memory that was not read yet
  std::erase_if(reductions, [this](PendingReduction& reduction) {
    const bool due = reduction.committed && reduction.thread == block.thread();
    if (due && !reduction.read) reduce(reduction);
    return due;
  });
}

std::string Hopper::describe_unfinished() const {
  return reductions.empty() ? "" : "a block ended before a tensor reduction had read its shared memory";
}

void Hopper::reduce(PendingReduction& reduction) {
  reduction.read = true;
  const TensorMap& map = reduction.map;
  for (int row = 0; row < map.rows; ++row) {
    const int64_t token = reduction.at[1] + row;
    if (token < 0 || token >= map.sizes[1]) continue;
    for (int i = 0; i < kRowBytes / 4 && reduction.at[0] + i < map.sizes[0]; ++i) {
      float value;
      std::memcpy(&value, async_view.data() + swizzled(reduction.source + row * kRowBytes + i * 4), 4);
      const unsigned char* target = map.data + (reduction.at[0] + i) * 4 + token * map.strides[1] +
                                    reduction.at[2] * map.strides[2] + reduction.at[3] * map.strides[3];
      std::atomic_ref(*reinterpret_cast<float*>(const_cast<unsigned char*>(target))).fetch_add(value);
    }
  }
}

Hopper::Warpgroup& Hopper::warpgroup() {
  return warpgroups[block.thread() / 128];
}

bool Hopper::warpgroup_arrive(WarpgroupStep step) {
  Warpgroup& group = warpgroup();
  if (group.arrived == 0) group.step = step;
  if (group.step != step) block.fail("threads of one warpgroup are in different wgmma operations");
  if (++group.arrived == 128) return true;
  static thread_local Waiters unused_waiters;  // the last thread wakes all 128 in warpgroup_release()
  block.sleep(unused_waiters);
  return false;
}

void Hopper::warpgroup_release() {
  warpgroup().arrived = 0;
  Waiters all(block.num_threads() / 32, 0);
  const int first = block.thread() / 128 * 4;
  for (int warp = first; warp < first + 4; ++warp) all[warp] = 0xffffffffu;
  all[block.thread() / 32] &= ~(1u << block.thread() % 32);
  block.wake(all);
}

void Hopper::wgmma(float* accumulator, const WgmmaCall& call) {
  Warpgroup& group = warpgroup();
  group.accumulators[block.thread() % 128] = accumulator;
  group.a_registers[block.thread() % 128] = call.a_registers;
  if (!warpgroup_arrive(WarpgroupStep::kMma)) return;
  if (!group.fenced) block.fail("wgmma without wgmma.fence after its registers may have been written");
  issue(group, call);
  warpgroup_release();
}

// A transposed operand with the 128-byte swizzle must consist of whole panels of 64 elements, or be part of
// one panel. How the hardware handles others is undocumented.
void Hopper::check_panels(uint64_t descriptor, int elements) {
  const int first = static_cast<int>((descriptor & 0x7) << 4) / 2;  // offset within its panel
  if ((first || elements % 64) && first + elements > 64)
    block.fail("wgmma: a transposed operand must consist of whole panels or be part of one panel");
}

void Hopper::issue(Warpgroup& group, const WgmmaCall& call) {
  ++block.statistics.wgmma;
  if (call.transpose_a && call.a_registers == nullptr) check_panels(call.descriptor_a, 64);
  if (call.transpose_b) check_panels(call.descriptor_b, call.columns);
  const int per_thread = call.columns / 2;
  float* name = group.accumulators[0];
  InFlight& flight = group.in_flight[name];
  if (flight.values.empty()) {
    flight = {group.accumulators, call.columns, std::vector<float>(128 * per_thread)};
    for (int t = 0; t < 128; ++t) {
      std::memcpy(&flight.values[t * per_thread], group.accumulators[t], per_thread * sizeof(float));
      std::fill_n(group.accumulators[t], per_thread, std::nanf(""));
    }
  }
  WgmmaTask task{call, group.a_registers, name, {}, {}};
  if (block.random() % 2) read_operands(task);
  group.open.push_back(std::move(task));
}

void Hopper::wgmma_fence() {
  if (!warpgroup_arrive(WarpgroupStep::kFence)) return;
  warpgroup().fenced = true;
  warpgroup_release();
}

void Hopper::wgmma_commit() {
  if (!warpgroup_arrive(WarpgroupStep::kCommit)) return;
  Warpgroup& group = warpgroup();
  group.groups.push_back(std::move(group.open));
  group.open.clear();
  warpgroup_release();
}

void Hopper::wgmma_wait(int pending) {
  if (!warpgroup_arrive(WarpgroupStep::kWait)) return;
  let_others_run(product_patience);  // products take time, and may read their operands late
  Warpgroup& group = warpgroup();
  while (static_cast<int>(group.groups.size()) > pending) {
    for (WgmmaTask& task : group.groups.front()) multiply(group, task);
    group.groups.erase(group.groups.begin());
  }
  write_back(group);
  group.fenced = false;
  warpgroup_release();
}

// Element (major, k) of an operand, addressed by its matrix descriptor (PTX ISA, "Shared Memory Matrix
// Layout"). In a transposed operand 64 major elements are contiguous; otherwise elements along k are.
float Hopper::element(Format format, uint64_t descriptor, int major, int k, bool transposed) {
  if (descriptor >> 62 != 1) block.fail("wgmma: the emulator knows only the 128-byte swizzle");
  const size_t start = (descriptor & 0x3fff) << 4;
  const size_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const size_t offset =
      transposed ? start + major / 64 * leading + major % 64 * 2 + k / 8 * stride + k % 8 * kRowBytes
                 : start + major / 8 * stride + major % 8 * kRowBytes + k * 2;
  if (offset + 2 > async_view.size()) block.fail("wgmma: descriptor outside shared memory");
  uint16_t bits;
  std::memcpy(&bits, async_view.data() + swizzled(offset), 2);
  return to_float(format, bits);
}

void Hopper::read_operands(WgmmaTask& task) {
  const WgmmaCall& call = task.call;
  task.a.resize(64 * 16);
  task.b.resize(call.columns * 16);
  for (int n = 0; n < call.columns; ++n)
    for (int k = 0; k < 16; ++k)
      task.b[n * 16 + k] = element(call.format, call.descriptor_b, n, k, call.transpose_b);
  if (call.a_registers == nullptr) {
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k)
        task.a[m * 16 + k] = element(call.format, call.descriptor_a, m, k, call.transpose_a);
    return;
  }
  for (int t = 0; t < 128; ++t)
    for (int r = 0; r < 4; ++r) {
      const int row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8, k = t % 4 * 2 + r / 2 * 8;
      const uint32_t pair = task.a_registers[t][r];
      task.a[row * 16 + k] = to_float(call.format, static_cast<uint16_t>(pair));
      task.a[row * 16 + k + 1] = to_float(call.format, static_cast<uint16_t>(pair >> 16));
    }
}

void Hopper::multiply(Warpgroup& group, WgmmaTask& task) {
  if (task.a.empty()) read_operands(task);
  const int columns = task.call.columns;
  std::vector<float> product(64 * columns, 0.0f), b_by_k(16 * columns);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 16; ++k) b_by_k[k * columns + n] = task.b[n * 16 + k];
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) {
      const float a = task.a[m * 16 + k];
      for (int n = 0; n < columns; ++n) product[m * columns + n] += a * b_by_k[k * columns + n];
    }
  std::vector<float>& values = group.in_flight.at(task.accumulator).values;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < columns / 2; ++i) {
      float& value = values[t * (columns / 2) + i];
      const float before = task.call.accumulate ? value : 0.0f;
      value = before + product[fragment_row(t, i % 4) * columns + fragment_column(t, i / 4, i % 4)];
    }
}

// Writes results to their registers once no product on them is in flight.
void Hopper::write_back(Warpgroup& group) {
  const auto busy = [&group](float* accumulator) {
    const auto writes = [accumulator](const WgmmaTask& task) { return task.accumulator == accumulator; };
    return std::any_of(group.open.begin(), group.open.end(), writes) ||
           std::any_of(group.groups.begin(), group.groups.end(),
                       [&](const auto& tasks) { return std::any_of(tasks.begin(), tasks.end(), writes); });
  };
  for (auto entry = group.in_flight.begin(); entry != group.in_flight.end();) {
    if (busy(entry->first)) {
      ++entry;
      continue;
    }
    const InFlight& flight = entry->second;
    const int per_thread = flight.columns / 2;
    for (int t = 0; t < 128; ++t)
      std::memcpy(flight.registers[t], &flight.values[t * per_thread], per_thread * sizeof(float));
    entry = group.in_flight.erase(entry);
  }
}

}  // namespace mls::emu
