// What a tile shape takes and how long a step should take with it: what `choose` compares.
#pragma once

#include <algorithm>
#include <vector>

#include "../cells.h"
#include "choose.h"

namespace fastrnn::cuda {

struct Product {  // one of a step's
  int64_t K, units;
  int rows_per_unit, number_bytes;
  bool uses_mma;

  int64_t slice() const { return uses_mma ? 64 / number_bytes : number_bytes == 8 ? 16 : 32; }  // numbers
  int64_t rows(int units) const { return uses_mma ? (units * rows_per_unit + 15) / 16 * 16 : units * rows_per_unit; }
};

inline int number_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Of a step, the first of them that with h or, backward, with the gate gradients; without one (a scan), of no numbers.
using Products = std::vector<Product>;
inline Products products_of(const Layer& layer, Pass pass) {
  const CellInfo& cell = cell_info(layer.cell);
  const bool forward = pass == Pass::kForward;
  const int64_t H = (layer.H + 7) / 8 * 8, P = (layer.P + 7) / 8 * 8;
  const int first_gates = cell.first_gates, bytes = number_bytes(layer.dtype);
  const bool uses_mma = layer.tf32 || bytes == 2;
  Products products = {forward ? Product{P, H, first_gates, bytes, uses_mma}
                               : Product{first_gates * H, P, 1, bytes, uses_mma}};
  if (cell.second_gates > 0)
    products.push_back(forward ? Product{H, H, cell.second_gates, bytes, uses_mma}
                               : Product{cell.second_gates * H, H, 1, bytes, uses_mma});
  if (layer.projected) products.push_back({forward ? H : P, forward ? P : H, 1, bytes, uses_mma});
  return products;
}

// Blocks of a launch for one group of rows.
inline int64_t blocks_of(const TileShape& tile, const Product& product, int D) {
  const int64_t units = tile.units * tile.split;
  return (product.units + units - 1) / units * tile.split * D;
}

inline int64_t rows_of(const TileShape& tile, const Product& product) {
  return tile.wgmma ? 64 : product.rows(tile.units * tile.split);
}

inline int64_t shared_bytes(const TileShape& tile, const Product& product) {
  constexpr int64_t kBarriers = 16;
  const int64_t rows = rows_of(tile, product), parts = tile.wgmma ? kWarps / kGroupWarps : kWarps;
  const int64_t sums = 2 * parts * tile.batch * (rows + 4) * std::max(4, product.number_bytes);
  const int64_t staged = tile.wgmma ? tile.batch * tile.slices * kWarps * product.slice() * product.number_bytes : 0;
  const int64_t weights = kWarps * (tile.slices - tile.register_slices) * rows * product.slice() * product.number_bytes;
  const int64_t mail = tile.cluster ? kBarriers + 2 * tile.batch * (product.K * product.number_bytes + 64) : 0;
  const int64_t handed_out =
      tile.split > 1 ? kBarriers + 2 * tile.split * tile.batch * tile.units * product.rows_per_unit * 4 : 0;
  return sums + staged + weights + mail + handed_out;
}

// The model of a step's time, in cycles. What it counts is what the kernels do; the constants are those with which it
// ranks the tiles as an H200 does (`python -m benchmarks.tiles`, three cells, fourteen shapes; csrc/README.md), but for
// that of groups in turns, which is counted.
constexpr double kClock = 1.9e3;  // cycles of a microsecond
constexpr double kLaunch = 7000;  // of a kernel, after the one before: mostly the host's

inline double multiply_adds_per_cycle(int number_bytes, bool on_tensor_cores) {  // of a multiprocessor, in our kernels
  constexpr double kMma16 = 550, kMmaTf32 = 400, kFma = 43, kDouble = 25;
  if (number_bytes == 2) return kMma16;
  return number_bytes == 8 ? kDouble : on_tensor_cores ? kMmaTf32 : kFma;
}

// Rows of the tile that a warp takes at once, and how often weights that are not resident are read for all of them.
inline int fma_turn_of(const TileShape& tile, const Product& product) {
  return fma_turn(int(rows_of(tile, product)) / 4, tile.slices, tile.batch, product.number_bytes);
}
inline double weight_reads(const TileShape& tile, const Product& product) {
  if (level_of(tile) == Level::kPersistent) return 0;
  return product.uses_mma ? 1 : double(tile.batch) / fma_turn_of(tile, product);
}

// How often a warp waits for loads in a pass; `live` rows of the tile exist.
inline double round_trips(const TileShape& tile, const Product& product, int64_t live) {
  if (level_of(tile) != Level::kPersistent || tile.wgmma) return 1;
  const auto divided = [](int64_t a, int64_t b) { return double((a + b - 1) / b); };
  if (!product.uses_mma)
    return divided(live, fma_turn_of(tile, product)) * divided(tile.slices, fma_group(tile.slices));
  const int columns = tile.batch / 8, row_tiles = int(rows_of(tile, product)) / 16;
  return divided(tile.slices * columns, mma_loads(row_tiles, tile.register_slices, columns));
}

// A tile of the kernels here, once. `live`: how many of its rows exist.
inline double cycles_of_tile(const TileShape& tile, const Product& product, int64_t live) {
  constexpr double kExchange = 2000;   // a store and a load through L2, a barrier, what follows and what lies between
  constexpr double kTrip = 450;        // loads that wait for registers
  constexpr double kHandOut = 300;     // sums to and from the other blocks of a cluster
  constexpr double kBytes = 70;        // into a multiprocessor, a cycle
  constexpr double kSharedBytes = 75;  // of shared memory, written and read
  constexpr double kFinish = 0.4;      // of a (unit, row) and product row or gate
  const double K = double(product.K) / tile.split, rows = double(rows_of(tile, product)), batch = tile.batch;
  const double weights = weight_reads(tile, product) * rows * K, sums = (tile.wgmma ? kWarps / kGroupWarps : kWarps);
  const double gates = std::max<double>(product.rows_per_unit, double(product.K) / double(product.units));
  return kExchange + kTrip * round_trips(tile, product, live) + (tile.split > 1 ? kHandOut : 0) +
         (double(live) * K + weights) * product.number_bytes / kBytes +
         batch * K * rows / multiply_adds_per_cycle(product.number_bytes, product.uses_mma) +
         sums * batch * rows * 4 / kSharedBytes + kFinish * batch * tile.units * gates;
}

// A product of all rows by a matrix library, and what follows it.
inline double cycles_of_library(const Product& product, const Layer& layer, double multiprocessors) {
  constexpr double kCall = 14000;      // that the host needs
  constexpr double kBytes = 35;        // into a multiprocessor, a cycle
  constexpr double kFinishBytes = 12;  // in and out of one, where each number is used once
  constexpr double k16 = 1000, kTf32 = 500, kFma = 100, kDouble = 60;  // multiply-adds of a multiprocessor, a cycle
  const double rate = product.number_bytes == 2   ? k16
                      : product.number_bytes == 8 ? kDouble
                      : layer.matmul_tf32         ? kTf32
                                                  : kFma;
  const double rows = double(product.rows_per_unit) * double(product.units), B = double(layer.B), K = double(product.K);
  const double sum_bytes = std::max(4, product.number_bytes);
  const double bytes = (B * K + rows * K) * product.number_bytes + B * rows * sum_bytes;
  const double busy = std::max(bytes / kBytes, B * K * rows / rate);
  const double finish = B * rows * (sum_bytes + 2 * product.number_bytes) / kFinishBytes;
  return layer.D * (kCall + (busy + finish) / multiprocessors) + kLaunch;
}

// What a step without products moves: of each unit and row its inputs in, and y and what training saves out.
inline double cycles_of_scan(const Layer& layer, double multiprocessors) {
  constexpr double kFinishBytes = 12;  // as above
  const CellInfo& cell = cell_info(layer.cell);
  const double numbers = cell.gates + 1 + (layer.saved ? cell.saved : 0);
  return layer.D * double(layer.B) * double(layer.H) * numbers * number_bytes(layer.dtype) / kFinishBytes /
         multiprocessors;
}

// Of rows, or so many as take turns, and how many of them a block walks one after the other.
inline int64_t groups_of(const TileShape& tile, const Layer& layer) {
  const int64_t rows = int64_t(tile.batch) * tile.turns;
  return std::max<int64_t>(1, (layer.B + rows - 1) / rows);
}
// What a pass waits for the other blocks' numbers, less the load itself, which another group's pass hides.
inline double hidden_cycles(const TileShape& tile, int64_t passes) { return tile.turns > 1 && passes > 1 ? 350 : 0; }
inline int64_t waves(int64_t groups, int64_t together) { return (groups + together - 1) / together; }

// Microseconds of a step, with so many groups of rows at the same time.
inline double predict(const TileShape& tile, const Layer& layer, const Products& products, const Chip& chip,
                      int64_t groups) {
  const int64_t multiprocessors = std::max(1, chip.multiprocessors);
  const int64_t live = std::min<int64_t>(tile.batch, std::max<int64_t>(1, layer.B));
  double cycles = 0;
  if (level_of(tile) == Level::kScan) return cycles_of_scan(layer, double(multiprocessors)) / kClock;
  for (const Product& product : products) {
    if (level_of(tile) == Level::kGemm) {
      cycles += cycles_of_library(product, layer, double(multiprocessors));
    } else if (level_of(tile) == Level::kPersistent) {
      const int64_t all = std::max<int64_t>(1, (layer.B + tile.batch - 1) / tile.batch);
      const int64_t passes = std::min(waves(groups_of(tile, layer), groups) * tile.turns, all);
      cycles += double(passes) * (cycles_of_tile(tile, product, live) - hidden_cycles(tile, passes));
    } else {
      const int64_t blocks = blocks_of(tile, product, layer.D) * groups_of(tile, layer);
      cycles += double(waves(blocks, multiprocessors)) * cycles_of_tile(tile, product, live) + kLaunch;
    }
  }
  return cycles / kClock;
}

}  // namespace fastrnn::cuda
