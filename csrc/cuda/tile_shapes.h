// The shapes of tiles that kernels are compiled for. What is not listed here does not exist.
#pragma once

#include <stddef.h>

namespace fastrnn::cuda {

// Of a block. The emulator's build for ThreadSanitizer takes fewer.
#ifdef FASTRNN_WARPS
constexpr int kWarps = FASTRNN_WARPS;
#else
constexpr int kWarps = 8;
#endif
constexpr int kGroupWarps = 4;  // of a warpgroup

struct TileShape {
  int units, batch;      // of a block
  int slices;            // of K, of a warp, that stay on the chip; 0: a launch for every step, for any K
  int register_slices;   // of these, in registers; the others in shared memory
  bool cluster = false;  // all blocks of units are one cluster
  int split = 1;         // so many blocks, a cluster, share K: each multiplies a part of it for the units of all
  bool wgmma = false;    // products of warpgroups, for cells whose units of a block have 33 to 64 product rows
  bool gemm = false;     // the products are a matrix library's; units and outputs are multiples of 8
  bool scan = false;     // there are none: the cell has no recurrent product
  int turns = 1;         // so many groups of `batch` rows a block walks in turns, a pass of each
};

constexpr TileShape in_turns(TileShape shape) {
  shape.turns = 2;
  return shape;
}

constexpr bool needs_hopper(const TileShape& shape) { return shape.cluster || shape.split > 1 || shape.wgmma; }
// Compiled for the cells that are built in alone, whose compiler nobody waits for.
constexpr bool is_variant(const TileShape& shape) { return needs_hopper(shape) || shape.turns > 1; }

enum class Level { kStepwise, kGemm, kPersistent, kScan };
constexpr Level level_of(const TileShape& shape) {
  if (shape.scan) return Level::kScan;
  return shape.slices > 0 ? Level::kPersistent : shape.gemm ? Level::kGemm : Level::kStepwise;
}

// A thread for each (unit, row).
constexpr TileShape kGemm = {32, kWarps, 0, 0, false, 1, false, true};
constexpr TileShape kScan = {32, kWarps, 0, 0, false, 1, false, false, true};

// Forward, K = H: 8 warps times 32 numbers a slice (TF32, float64: 16), so 256 units per slice. Backward, K =
// (recurrent gates) * H.
constexpr TileShape kForward16[] = {{16, 8, 0, 0},
                                    {16, 32, 0, 0},
                                    {16, 8, 1, 1},
                                    {16, 8, 2, 2},
                                    {16, 32, 2, 2},
                                    {16, 8, 4, 4},
                                    {16, 16, 4, 3},
                                    {16, 8, 8, 4},
                                    {32, 8, 1, 1, true},
                                    {32, 8, 2, 2, true},
                                    {16, 32, 2, 2, false, 1, true},
                                    {16, 32, 4, 2},
                                    in_turns({16, 32, 2, 2}),
                                    in_turns({16, 8, 8, 4}),
                                    kGemm,
                                    kScan};
constexpr TileShape kBackward16[] = {{16, 8, 0, 0},
                                     {16, 32, 0, 0},
                                     {16, 8, 4, 4},
                                     {16, 8, 8, 8},
                                     {16, 32, 8, 8},
                                     {16, 8, 16, 16},
                                     {16, 16, 16, 16},
                                     {16, 8, 32, 16},
                                     {32, 8, 4, 4, true},
                                     {32, 8, 8, 8, true},
                                     {16, 8, 4, 4, false, 4},
                                     {16, 16, 4, 3, false, 4},
                                     {16, 32, 2, 2, false, 4},
                                     {16, 8, 8, 4, false, 4},
                                     {16, 32, 2, 2, false, 4, true},
                                     in_turns({16, 32, 8, 5}),
                                     in_turns({16, 16, 16, 16}),
                                     in_turns({16, 16, 4, 3, false, 4}),
                                     kGemm,
                                     kScan};
constexpr TileShape kForward32[] = {{8, 4, 0, 0}, {8, 16, 0, 0}, {8, 4, 1, 1}, {8, 4, 2, 2},
                                    {8, 4, 4, 4}, kGemm,         kScan};
constexpr TileShape kBackward32[] = {{8, 4, 0, 0},   {8, 16, 0, 0}, {8, 4, 4, 4}, {8, 4, 8, 8},
                                     {8, 4, 16, 16}, kGemm,         kScan};
constexpr TileShape kForwardTf32[] = {{16, 8, 0, 0}, {16, 32, 0, 0}, {8, 8, 2, 2},  {8, 8, 4, 4}, {8, 32, 4, 4},
                                      {8, 8, 8, 8},  {16, 16, 4, 3}, {16, 8, 8, 4}, kGemm,        kScan};
constexpr TileShape kBackwardTf32[] = {
    {16, 8, 0, 0},   {16, 32, 0, 0},           {16, 8, 8, 8},           {16, 8, 16, 16}, {16, 32, 8, 8},
    {16, 8, 32, 16}, {16, 16, 4, 4, false, 4}, {16, 8, 8, 4, false, 4}, kGemm,           kScan};
constexpr TileShape kBoth64[] = {{8, 4, 0, 0}, {8, 16, 0, 0}, kGemm, kScan};

// Not so few rows that most of a warpgroup's product would be padding.
constexpr bool has_wgmma_rows(const TileShape& shape, int rows_per_unit) {
  const int rows = shape.units * shape.split * rows_per_unit;
  return !shape.wgmma || (kWarps % kGroupWarps == 0 && rows > 32 && rows <= 64);
}

// What a warp loads at once of the numbers of a resident product, which its steps wait for: the model counts the round
// trips that this takes.

// With mma: vectors of 16 bytes a lane, all of them if registers allow: 255 less about 90 for everything else.
constexpr int mma_loads(int row_tiles, int register_slices, int columns) {
  const int free = 164 - 8 * row_tiles * register_slices - 4 * row_tiles * columns;
  return free < 16 ? 4 : free > 64 ? 16 : free / 4;
}

// With fused multiply-adds: rows of the tile, and slices of K. `lane_rows`: product rows of a lane.
constexpr int fma_turn(int lane_rows, int slices, int batch, int number_bytes) {
  const int sum_registers = lane_rows * number_bytes / 4;
  const int streamed = sum_registers > 8 ? 2 : sum_registers > 4 ? 4 : 8;
  const int resident = slices * lane_rows * 4 > 64 ? 2 : 4;
  const int rows = slices == 0 ? streamed : resident;
  return slices > 0 || rows < batch ? rows : batch;
}
constexpr int fma_group(int slices) { return slices == 0 ? 1 : slices < 4 ? slices : 4; }

template <class T, size_t N>
constexpr int count_of(const T (&)[N]) {
  return int(N);
}

}  // namespace fastrnn::cuda
