// One kernel for each group of primitives, to compare a GPU with the emulator bit for bit.
//
// Inputs are small integers, so that every sum is exact whatever its order, and results are raw registers.
// Run by tests/cuda/test_calibration.py on the emulator and, under the marker `gpu`, on the device.
#pragma once
#include "cuda/panels.h"
#include "cuda/tile.h"

namespace mls::cuda {

constexpr int kCalibrationRows = 128;  // of the input: rows x columns 16-bit numbers
constexpr int kCalibrationColumns = 128;

struct CalibrationParams {
  const uint16_t* input;
  uint32_t* output;  // registers, thread by thread
};

// Registers of one thread after each other.
struct RegisterLog {
  uint32_t* next;

  MLS_DEVICE void add(uint32_t value) { *next++ = value; }
  MLS_DEVICE void add(float value) { add(float_bits(value)); }
  MLS_DEVICE void add(const uint32_t (&values)[4]) {
    for (int i = 0; i < 4; ++i) add(values[i]);
  }
  template <int kTiles>
  MLS_DEVICE void add(const float (&values)[kTiles][4]) {
    MLS_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      MLS_UNROLL
      for (int e = 0; e < 4; ++e) add(values[j][e]);
    }
  }
};

constexpr int kWarpLogWords = 48;

// One warp: copies, ldmatrix, mma, pack, shuffle, 32-bit stores.
template <class Element>
MLS_KERNEL(kWarpSize, 1)
calibrate_sm80(const CalibrationParams params) {
  MLS_SHARED_MEMORY(memory);
  using Tile = SharedTile<32, 64>;
  const Tile tile{memory}, stored{memory + Tile::kBytes};
  load_tile<kWarpSize>(tile, TokenRows{params.input, kCalibrationColumns, 29}, 0);  // three rows of zeros
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  RegisterLog log{params.output + lane_id() * kWarpLogWords};
  uint32_t a[4], b[4];
  load_a(a, tile, 0, 16);
  log.add(a);
  load_a_transposed(a, tile, 16, 0);
  log.add(a);
  float sums[2][4];
  set_zero(sums);
  load_a(a, tile, 16, 32);
  load_b<true>(b, tile, 0, 32);
  mma_m16n8k16<Element>(sums[0], a, b[0], b[1]);
  mma_m16n8k16<Element>(sums[0], a, b[2], b[3]);
  load_b<false>(b, tile, 32, 16);
  mma_m16n8k16<Element>(sums[1], a, b[0], b[1]);
  log.add(b);
  log.add(sums);
  log.add(pack<Element>(sums[0][0] * 1.0009765625f, -sums[1][1] * 0.3333333f));  // rounds
  log.add(shuffle_xor(sums[0][0], 5));
  for (int j = 0; j < 4; ++j)
    store_shared(stored.pair(fragment_row(j % 2 * 2), fragment_column(j / 2, 0)), a[j]);
  sync_threads();
  load_a(a, stored, 0, 0);
  log.add(a);
}

constexpr int kNarrowColumns = 96;  // of a product: one panel and half of the next
constexpr int kWarpgroupLogWords = 3 * 64 + kNarrowColumns / 2 + kSwizzleRowBytes / 4;

struct HopperCalibrationLaunch {
  CalibrationParams params;
  TensorMap map;
};

// A product whose columns end within a panel.
template <class Element, class Tile>
MLS_DEVICE void calibrate_narrow_product(const Tile& tile, uint32_t (&a)[1][4], RegisterLog& log) {
  float sums[kNarrowColumns / 8][4];
  set_zero(sums);
  hold(sums);
  hold(a);
  wgmma_fence();
  Wgmma<Element, kNarrowColumns>::template from_registers<true>(sums, a[0], tile.along_rows(0, 16), 1);
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
  hold(a);
  log.add(sums);
}

// One warpgroup: tensor copy, mbarrier, swizzle, and wgmma with its operands every way that kernels use.
template <class Element>
MLS_DEVICE void calibrate_warpgroup(const HopperCalibrationLaunch& launch, unsigned char* memory) {
  using Tile = PanelTile<kCalibrationRows, kCalibrationColumns>;
  const Tile tile{memory};
  unsigned char* const edge = memory + Tile::kBytes;  // a panel that the tensor ends in
  auto* full = reinterpret_cast<Barrier*>(edge + Tile::kPanelBytes);
  if (thread_index().x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
  }
  sync_threads();
  if (thread_index().x == 0) {
    barrier_expect(full, Tile::kBytes + Tile::kPanelBytes);
    copy_tile(tile, launch.map, full, 0, 0, 0);
    tensor_copy(edge, launch.map, full, kCalibrationColumns - 24, kCalibrationRows - 100, 0, 0);
  }
  barrier_wait(full, 0);
  RegisterLog log{launch.params.output + thread_index().x * kWarpgroupLogWords};
  float sums[16][4];
  uint32_t a[1][4];
  for (int i = 0; i < 4; ++i)
    a[0][i] = reinterpret_cast<const uint32_t*>(launch.params.input)[thread_index().x * 4 + i];
  for (int variant = 0; variant < 3; ++variant) {
    set_zero(sums);
    hold(sums);
    hold(a);
    wgmma_fence();
    using Product = Wgmma<Element, 128>;
    if (variant == 0)
      Product::template from_shared<false, false>(sums, tile.along_columns(64, 80), tile.along_columns(0, 48),
                                                  1);
    else if (variant == 1)
      Product::template from_registers<true>(sums, a[0], tile.along_rows(0, 32), 1);
    else
      Product::template from_shared<true, true>(sums, tile.along_rows(64, 48), tile.along_rows(0, 96), 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
    hold(a);
    log.add(sums);
  }
  sync_threads();  // keeps its registers apart from those above
  calibrate_narrow_product<Element>(tile, a, log);
  const auto* row = reinterpret_cast<const uint32_t*>(edge + thread_index().x * kSwizzleRowBytes);
  for (int i = 0; i < kSwizzleRowBytes / 4; ++i) log.add(row[i]);
}

template <class Element>
MLS_KERNEL(kWarpgroupSize, 1)
calibrate_sm90(const MLS_GRID_CONSTANT HopperCalibrationLaunch launch) {
  MLS_SHARED_MEMORY(memory);
  if constexpr (kCompilesSm90a) calibrate_warpgroup<Element>(launch, memory);
}

// `hopper`: the sm_90a primitives, else those of sm_80. `input` holds 128 x 128 numbers of `type`; `output`
// gets 32 x 48 words, or 128 x 272. Null, or what is wrong.
template <class Element>
const char* calibrate(bool hopper, const CalibrationParams& params, ElementType type, void* stream) {
  if (!hopper)
    return launch(&calibrate_sm80<Element>, Dim3(1), kWarpSize, 2 * SharedTile<32, 64>::kBytes, stream,
                  params);
  HopperCalibrationLaunch arguments{params, {}};
  const TokenTensor<const void> tensor{params.input, kCalibrationColumns, 0, 0};
  if (!make_tensor_map(&arguments.map, tensor, {kCalibrationColumns, kCalibrationRows, 1, 1}, type,
                       kCalibrationRows))
    return "CUDA made no tensor map";
  using Tile = PanelTile<kCalibrationRows, kCalibrationColumns>;
  constexpr int kBytes = Tile::kBytes + Tile::kPanelBytes + 64;
  return launch(&calibrate_sm90<Element>, Dim3(1), kWarpgroupSize, kBytes, stream, arguments);
}

inline const char* calibrate(bool hopper, ElementType type, const CalibrationParams& params, void* stream) {
  return type == ElementType::kBFloat16 ? calibrate<BFloat16>(hopper, params, type, stream)
                                        : calibrate<Float16>(hopper, params, type, stream);
}

}  // namespace mls::cuda
