// One kernel per group of primitives, to compare a GPU with the emulator bit for bit.
//
// Inputs are small integers, so that sums are exact in any order. Results are raw register contents. Run by
// tests/cuda/test_calibration.py on the emulator and, with the marker `gpu`, on the device.
#pragma once
#include "cuda/panels.h"
#include "cuda/tile.h"

namespace mls::cuda {

constexpr int kCalibrationRows = 128;  // the input is rows x columns 16-bit numbers
constexpr int kCalibrationColumns = 128;

struct CalibrationParams {
  const uint16_t* input;
  uint32_t* output;  // register contents, thread after thread
};

// Appends register contents of one thread.
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

// Run by one warp: copies, ldmatrix, mma, pack, shuffle, 32-bit stores.
template <class Element>
MLS_KERNEL(kWarpSize, 1)
calibrate_sm80(const CalibrationParams params) {
  MLS_SHARED_MEMORY(memory);
  using Tile = SharedTile<32, 64>;
  const Tile tile{memory}, stored{memory + Tile::kBytes};
  // 29 of 32 rows: the last three become zeros.
  load_tile<kWarpSize>(tile, TokenRows{params.input, kCalibrationColumns, 29}, 0);
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
  // Inexact values, so that rounding is compared.
  log.add(pack<Element>(sums[0][0] * 1.0009765625f, -sums[1][1] * 0.3333333f));
  log.add(shuffle_xor(sums[0][0], 5));
  for (int j = 0; j < 4; ++j)
    store_shared(stored.pair(fragment_row(j % 2 * 2), fragment_column(j / 2, 0)), a[j]);
  sync_threads();
  load_a(a, stored, 0, 0);
  log.add(a);
}

constexpr int kNarrowColumns = 96;  // columns of a product: one panel and half of the next
// Columns of further products: the rest of V at D = 80, the scores and the output at D = 256.
constexpr int kRestColumns = 16, kFewKeys = 80, kWideColumns = 256;
constexpr int kWarpgroupLogWords =
    3 * 64 + (kNarrowColumns + kRestColumns + kFewKeys + kWideColumns) / 2 + kSwizzleRowBytes / 4;

struct HopperCalibrationLaunch {
  CalibrationParams params;
  TensorMap map;
};

// Runs and logs one product of kColumns columns, of `a` in registers or of shared memory.
template <int kColumns, class Issue>
MLS_DEVICE void calibrate_product(uint32_t (&a)[1][4], RegisterLog& log, const Issue& issue) {
  float sums[kColumns / 8][4];
  set_zero(sums);
  hold(sums);
  hold(a);
  wgmma_fence();
  issue(sums);
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
  hold(a);
  log.add(sums);
  sync_threads();  // separates its registers from the next product's
}

// Products of the other sizes that kernels use.
template <class Element>
MLS_DEVICE void calibrate_other_sizes(unsigned char* base, uint32_t (&a)[1][4], RegisterLog& log) {
  const PanelTile<kCalibrationRows, kCalibrationColumns> tile{base};
  calibrate_product<kNarrowColumns>(a, log, [&](auto& sums) {  // ends in the middle of a panel
    const PanelTile<kCalibrationRows, kNarrowColumns> narrow{base};
    multiply_by_rows<Element>(sums, a[0], narrow, 16);
  });
  calibrate_product<kRestColumns>(a, log, [&](auto& sums) {
    Wgmma<Element, kRestColumns>::template from_registers<true>(sums, a[0], tile.along_rows(64, 48), 1);
  });
  calibrate_product<kFewKeys>(a, log, [&](auto& sums) {
    Wgmma<Element, kFewKeys>::template from_shared<false, false>(sums, tile.along_columns(64, 16),
                                                                 tile.along_columns(0, 112), 1);
  });
  calibrate_product<kWideColumns>(a, log, [&](auto& sums) {  // the tile's memory as four panels of 64 rows
    const PanelTile<64, kWideColumns> wide{base};
    Wgmma<Element, kWideColumns>::template from_registers<true>(sums, a[0], wide.along_rows(0, 32), 1);
  });
}

// Run by one warpgroup: TMA copy, mbarrier, swizzle, and wgmma with every combination of operands that
// kernels use.
template <class Element>
MLS_DEVICE void calibrate_warpgroup(const HopperCalibrationLaunch& launch, unsigned char* memory) {
  using Tile = PanelTile<kCalibrationRows, kCalibrationColumns>;
  const Tile tile{memory};
  unsigned char* const edge = memory + Tile::kBytes;  // a panel that extends beyond the tensor
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
  uint32_t a[1][4];
  for (int i = 0; i < 4; ++i)
    a[0][i] = reinterpret_cast<const uint32_t*>(launch.params.input)[thread_index().x * 4 + i];
  using Product = Wgmma<Element, 128>;
  calibrate_product<128>(a, log, [&](auto& sums) {
    Product::template from_shared<false, false>(sums, tile.along_columns(64, 80), tile.along_columns(0, 48),
                                                1);
  });
  calibrate_product<128>(a, log, [&](auto& sums) {
    Product::template from_registers<true>(sums, a[0], tile.along_rows(0, 32), 1);
  });
  calibrate_product<128>(a, log, [&](auto& sums) {
    Product::template from_shared<true, true>(sums, tile.along_rows(64, 48), tile.along_rows(0, 96), 0);
  });
  calibrate_other_sizes<Element>(memory, a, log);
  const auto* row = reinterpret_cast<const uint32_t*>(edge + thread_index().x * kSwizzleRowBytes);
  for (int i = 0; i < kSwizzleRowBytes / 4; ++i) log.add(row[i]);
}

template <class Element>
MLS_KERNEL(kWarpgroupSize, 1)
calibrate_sm90(const MLS_GRID_CONSTANT HopperCalibrationLaunch launch) {
  MLS_SHARED_MEMORY(memory);
  if constexpr (kCompilesSm90a) calibrate_warpgroup<Element>(launch, memory);
}

// ---- primitives used by backward only ----

constexpr int kGradientLogWords = kSwizzleRowBytes / 4 + 16;
constexpr int kReducedQueries = 50, kReducedColumns = 24;  // the part of a 64 x 32 tile inside the tensor

struct GradientCalibrationLaunch {
  CalibrationParams params;
  TensorMap map, reduced;
};

// Run by one warpgroup: stmatrix, proxy fence, wgmma from the middle of a panel, and a TMA reduction to
// global memory.
template <class Element>
MLS_DEVICE void calibrate_gradient_warpgroup(const GradientCalibrationLaunch& launch, unsigned char* memory) {
  using Tile = PanelTile<kCalibrationRows, kCalibrationColumns>;
  using Stored = PanelTile<64, 64>;
  using Sums = FloatPanelTile<64, 32>;
  const Tile tile{memory};
  const Stored stored{memory + Tile::kBytes};
  const Sums reduced{stored.base + Stored::kBytes};
  auto* full = reinterpret_cast<Barrier*>(reduced.base + Sums::kBytes);
  const int thread = static_cast<int>(thread_index().x), row = warp_id() * 16 + (lane_id() & 15);
  if (thread == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
    barrier_expect(full, Tile::kBytes);
    copy_tile(tile, launch.map, full, 0, 0, 0);
  }
  const auto* words = reinterpret_cast<const uint32_t*>(launch.params.input) + thread * 16;
  for (int step = 0; step < 4; ++step) {
    const uint32_t a[4] = {words[4 * step], words[4 * step + 1], words[4 * step + 2], words[4 * step + 3]};
    stmatrix_x4(stored.chunk(row, step * 2 + (lane_id() >> 4)), a);
  }
  proxy_fence();
  sync_threads();
  barrier_wait(full, 0);
  float sums[4][4];
  set_zero(sums);
  hold(sums);
  wgmma_fence();
  Wgmma<Element, 32>::template from_shared<true, true>(sums, stored.along_rows(0, 16),
                                                       tile.along_rows(96, 48), 1);
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
  RegisterLog log{launch.params.output + thread * kGradientLogWords};
  log.add(sums);
  const auto* stored_row = reinterpret_cast<const uint32_t*>(stored.base + thread % 64 * kSwizzleRowBytes);
  for (int i = 0; i < kSwizzleRowBytes / 4; ++i) log.add(stored_row[i]);
  store_fragments(reduced, sums, warp_id() * 16, 0.5f);
  proxy_fence();
  sync_threads();
  if (thread != 0) return;
  tensor_reduce_add(launch.reduced, reduced.base, 0, 0, 0, 0);
  tensor_reduce_commit();
  tensor_reduce_wait_read();
}

template <class Element>
MLS_KERNEL(kWarpgroupSize, 1)
calibrate_sm90_gradients(const MLS_GRID_CONSTANT GradientCalibrationLaunch launch) {
  MLS_SHARED_MEMORY(memory);
  if constexpr (kCompilesSm90a) calibrate_gradient_warpgroup<Element>(launch, memory);
}

constexpr const char* kNoTensorMap = "CUDA could not create a tensor map";
constexpr const char* kNoCode =
    "CUDA reports no sm_90a code for this kernel, so attention would run the sm_80 kernels";

inline bool map_input(TensorMap* map, const CalibrationParams& params, ElementType type) {
  const TokenTensor<const void> tensor{params.input, kCalibrationColumns, 0, 0};
  return make_tensor_map(map, tensor, {kCalibrationColumns, kCalibrationRows, 1, 1}, type, kCalibrationRows);
}

template <class Element>
const char* calibrate_gradients(const CalibrationParams& params, ElementType type, void* stream) {
  GradientCalibrationLaunch arguments{params, {}, {}};
  auto* sums = reinterpret_cast<float*>(params.output + kWarpgroupSize * kGradientLogWords);
  const bool described =
      map_input(&arguments.map, params, type) &&
      make_tensor_map(&arguments.reduced, {sums, 32, 0, 0}, {kReducedColumns, kReducedQueries, 1, 1}, 64);
  if (!described) return kNoTensorMap;
  if (!has_sm90a_code(&calibrate_sm90_gradients<Element>)) return kNoCode;
  constexpr int kBytes = PanelTile<kCalibrationRows, kCalibrationColumns>::kBytes +
                         PanelTile<64, 64>::kBytes + FloatPanelTile<64, 32>::kBytes + 64;
  return launch(&calibrate_sm90_gradients<Element>, Dim3(1), kWarpgroupSize, kBytes, stream, arguments);
}

// Primitives are compared in these groups.
enum class PrimitiveGroup { kSm80, kSm90, kSm90Gradients };

// `input` holds 128 x 128 numbers of `type`. `output` receives 32 x 48 words (kSm80), 128 x 448 words
// (kSm90), or 128 x 48 words followed by a 64 x 32 fp32 tile that is added to (kSm90Gradients). Returns null,
// or an error message.
template <class Element>
const char* calibrate(PrimitiveGroup group, const CalibrationParams& params, ElementType type, void* stream) {
  if (group == PrimitiveGroup::kSm80)
    return launch(&calibrate_sm80<Element>, Dim3(1), kWarpSize, 2 * SharedTile<32, 64>::kBytes, stream,
                  params);
  if (group == PrimitiveGroup::kSm90Gradients) return calibrate_gradients<Element>(params, type, stream);
  HopperCalibrationLaunch arguments{params, {}};
  if (!map_input(&arguments.map, params, type)) return kNoTensorMap;
  if (!has_sm90a_code(&calibrate_sm90<Element>)) return kNoCode;
  using Tile = PanelTile<kCalibrationRows, kCalibrationColumns>;
  constexpr int kBytes = Tile::kBytes + Tile::kPanelBytes + 64;
  return launch(&calibrate_sm90<Element>, Dim3(1), kWarpgroupSize, kBytes, stream, arguments);
}

inline const char* calibrate(PrimitiveGroup group, ElementType type, const CalibrationParams& params,
                             void* stream) {
  return type == ElementType::kBFloat16 ? calibrate<BFloat16>(group, params, type, stream)
                                        : calibrate<Float16>(group, params, type, stream);
}

}  // namespace mls::cuda
