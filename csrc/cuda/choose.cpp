#include "choose.h"

#include <stdlib.h>

#include <algorithm>
#include <charconv>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../cells.h"

namespace fastrnn::cuda {
namespace {

struct Product {  // one of a step's
  int64_t K, units;
  int rows_per_unit, number_bytes;
  bool uses_mma;

  int64_t slice() const { return uses_mma ? 64 / number_bytes : number_bytes == 8 ? 16 : 32; }  // numbers
  int64_t rows(int units) const { return uses_mma ? (units * rows_per_unit + 15) / 16 * 16 : units * rows_per_unit; }
};

int number_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Of a step, the first of them that with h or, backward, with the gate gradients.
using Products = std::vector<Product>;
Products products_of(const Layer& layer, Pass pass) {
  const CellInfo& cell = kCells[layer.cell];
  const bool forward = pass == Pass::kForward;
  const int64_t H = (layer.H + 7) / 8 * 8, P = (layer.P + 7) / 8 * 8;
  const int first_gates = cell.gates - cell.second_gates, bytes = number_bytes(layer.dtype);
  const bool uses_mma = layer.tf32 || bytes == 2;
  Products products = {forward ? Product{P, H, first_gates, bytes, uses_mma}
                               : Product{first_gates * H, P, 1, bytes, uses_mma}};
  if (cell.second_gates > 0) products.push_back({H, H, forward ? cell.second_gates : 1, bytes, uses_mma});
  if (layer.projected) products.push_back({forward ? H : P, forward ? P : H, 1, bytes, uses_mma});
  return products;
}

std::vector<TileShape> shapes(const Layer& layer, Pass pass) {
  const auto list = [](const auto& array) { return std::vector<TileShape>(std::begin(array), std::end(array)); };
  const bool forward = pass == Pass::kForward;
  if (layer.dtype == DType::kFloat64) return list(kBoth64);
  if (layer.dtype == DType::kFloat32 && layer.tf32) return forward ? list(kForwardTf32) : list(kBackwardTf32);
  if (layer.dtype == DType::kFloat32) return forward ? list(kForward32) : list(kBackward32);
  return forward ? list(kForward16) : list(kBackward16);
}

// Blocks of a launch for one group of rows.
int64_t blocks_of(const TileShape& tile, const Product& product, int D) {
  const int64_t units = tile.units * tile.split;
  return (product.units + units - 1) / units * tile.split * D;
}

int64_t rows_of(const TileShape& tile, const Product& product) {
  return tile.wgmma ? 64 : product.rows(tile.units * tile.split);
}

int64_t shared_bytes(const TileShape& tile, const Product& product) {
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

// What needs a Hopper has not been measured: it runs where the environment asks for it.
bool may_use(const TileShape& tile, const Product& product, const Chip& chip, bool asked_for) {
  constexpr int kHopper = 90, kMostBlocks = 16;
  if (!tile.cluster && tile.split == 1 && !tile.wgmma) return true;
  if (!asked_for || (tile.wgmma ? chip.compute != kHopper : chip.compute < kHopper)) return false;
  if (!has_wgmma_rows(tile, product.rows_per_unit)) return false;
  return !tile.cluster || (product.units > tile.units && product.units <= kMostBlocks * tile.units);
}

// The model of a step's time, in cycles. The constants are from published figures and counted instructions, for a
// Hopper at 1.8 GHz; not from a run of this code.
constexpr double kClock = 1.8e3;  // cycles of a microsecond
constexpr double kBytes = 35;     // into a multiprocessor, a cycle
constexpr double kLaunch = 4500;  // of a kernel, after the one before

double multiply_adds_per_cycle(int number_bytes, bool on_tensor_cores, double most) {  // of a multiprocessor
  constexpr double kFma = 100, kDouble = 60;
  if (number_bytes == 2) return most;
  return number_bytes == 8 ? kDouble : on_tensor_cores ? most / 2 : kFma;
}

// A tile of the kernels here, once.
double cycles_of_tile(const TileShape& tile, const Product& product) {
  constexpr double kExchange = 900;            // a store and a load through L2, a barrier, the sums and the cell
  constexpr double kHandOut = 500;             // sums to and from the other blocks of a cluster
  constexpr double kWgmma = 1600, kMma = 650;  // multiply-adds of a multiprocessor, in practice
  const double numbers = double(tile.batch) * double(product.K) / tile.split, rows = double(rows_of(tile, product));
  const double weights = level_of(tile) == Level::kPersistent ? 0 : rows * double(product.K);
  return kExchange + (tile.split > 1 ? kHandOut : 0) + (numbers + weights) * product.number_bytes / kBytes +
         numbers * rows / multiply_adds_per_cycle(product.number_bytes, product.uses_mma, tile.wgmma ? kWgmma : kMma);
}

// A product of all rows by a matrix library, and what follows it.
double cycles_of_library(const Product& product, const Layer& layer, double multiprocessors) {
  constexpr double kCall = 9000;          // that the host needs
  constexpr double kMultiplyAdds = 1000;  // of a multiprocessor
  constexpr double kFinishBytes = 12;     // in and out of a multiprocessor, a cycle, where each is used once
  const double rows = double(product.rows_per_unit) * double(product.units), B = double(layer.B), K = double(product.K);
  const double bytes = (B * K + rows * K + B * rows) * product.number_bytes;
  const double busy = std::max(
      bytes / kBytes, B * K * rows / multiply_adds_per_cycle(product.number_bytes, layer.matmul_tf32, kMultiplyAdds));
  const double finish = 3 * B * rows * product.number_bytes / kFinishBytes;
  return layer.D * (kCall + (busy + finish) / multiprocessors) + kLaunch;
}

// Why no persistent launch is possible, or nothing.
std::string obstacle(const Layer& layer, const Chip& chip) {
  if (kCells[layer.cell].second_gates > 0) return "the cell multiplies twice in a step";
  if (layer.projected) return "the layer has a projection";
  if (layer.dtype == DType::kFloat64) return "float64 has no persistent kernel";
  if (layer.T < 2) return "there is only one step";
  if (chip.multiprocessors == 0) return "the device is not known";
  return "";
}

// Of rows, and how many of them a block walks one after the other.
int64_t groups_of(const TileShape& tile, const Layer& layer) {
  return std::max<int64_t>(1, (layer.B + tile.batch - 1) / tile.batch);
}
int64_t waves(int64_t groups, int64_t together) { return (groups + together - 1) / together; }

// Microseconds of a step, with so many groups of rows at the same time.
double predict(const TileShape& tile, const Layer& layer, const Products& products, const Chip& chip, int64_t groups) {
  const int64_t multiprocessors = std::max(1, chip.multiprocessors);
  double cycles = 0;
  for (const Product& product : products) {
    if (level_of(tile) == Level::kGemm) {
      cycles += cycles_of_library(product, layer, double(multiprocessors));
    } else if (level_of(tile) == Level::kPersistent) {
      cycles += double(waves(groups_of(tile, layer), groups)) * cycles_of_tile(tile, product);
    } else {
      const int64_t blocks = blocks_of(tile, product, layer.D) * groups_of(tile, layer);
      cycles += double(waves(blocks, multiprocessors)) * cycles_of_tile(tile, product) + kLaunch;
    }
  }
  return cycles / kClock;
}

// How many groups of rows of a tile can be walked at the same time; 0 if it cannot take the layer.
int64_t groups_together(const TileShape& tile, const Layer& layer, const Products& products, const Chip& chip,
                        bool asked_for) {
  constexpr int64_t kMostGroups = 65535;  // blockIdx.y
  const int64_t groups = std::min(groups_of(tile, layer), kMostGroups);
  if (tile.gemm) return layer.H % 8 == 0 && layer.P % 8 == 0 ? groups : 0;
  for (const Product& product : products)
    if (shared_bytes(tile, product) > chip.shared_bytes) return 0;
  if (level_of(tile) == Level::kStepwise) return groups;
  const Product& product = products[0];
  if (!may_use(tile, product, chip, asked_for)) return 0;
  if (tile.slices * kWarps * product.slice() * tile.split < product.K) return 0;
  return std::min(groups, chip.multiprocessors / blocks_of(tile, product, layer.D));
}

constexpr const char* kLevels[] = {"stepwise", "gemm", "persistent"};

// What FASTRNN_CUDA_LEVEL and FASTRNN_CUDA_TILE ask for.
struct Wanted {
  int level = -1, tile = -1;  // -1: any
};

Wanted wanted_path(const Layer& layer, Pass pass) {
  const auto variable = [](const char* name) { return std::string(getenv(name) ? getenv(name) : ""); };
  const std::string level = variable("FASTRNN_CUDA_LEVEL"), tiles = variable("FASTRNN_CUDA_TILE");
  Wanted wanted;
  if (level != "") {
    const auto* const found = std::find(std::begin(kLevels), std::end(kLevels), level);
    if (found == std::end(kLevels))
      throw std::runtime_error("FASTRNN_CUDA_LEVEL: expected stepwise, gemm or persistent, got " + level);
    wanted.level = int(found - kLevels);
  }
  const size_t comma = tiles.find(',');
  const std::string tile = comma == std::string::npos ? tiles
                           : pass == Pass::kForward   ? tiles.substr(0, comma)
                                                      : tiles.substr(comma + 1);
  if (tile.empty()) return wanted;
  const std::vector<TileShape> all = shapes(layer, pass);
  const auto [end, error] = std::from_chars(tile.data(), tile.data() + tile.size(), wanted.tile);
  if (error != std::errc() || end != tile.data() + tile.size() || wanted.tile < 0 || wanted.tile >= int(all.size()))
    throw std::runtime_error("FASTRNN_CUDA_TILE: expected 0 to " + std::to_string(all.size() - 1) + ", got " + tile);
  const int its_level = int(level_of(all[wanted.tile]));
  if (wanted.level >= 0 && wanted.level != its_level)
    throw std::runtime_error("FASTRNN_CUDA_TILE: tile " + tile + " is not " + level + ", as FASTRNN_CUDA_LEVEL asks");
  wanted.level = its_level;
  return wanted;
}

// The fastest of the tiles that are wanted and can take the layer, or a path of tile -1. Levels below 0: any.
Path fastest(const Layer& layer, Pass pass, const Chip& chip, const Wanted& wanted, bool may_persist) {
  const std::vector<TileShape> all = shapes(layer, pass);
  const Products products = products_of(layer, pass);
  Path best = {-1, 0, 0, ""};
  for (int i = 0; i < int(all.size()); ++i) {
    const Level level = level_of(all[i]);
    if ((wanted.tile >= 0 && i != wanted.tile) || (wanted.level >= 0 && level != Level(wanted.level))) continue;
    if (level == Level::kPersistent && !may_persist) continue;
    const int64_t groups = groups_together(all[i], layer, products, chip, wanted.tile >= 0);
    if (groups == 0) continue;
    const double time = predict(all[i], layer, products, chip, groups);
    if (best.tile < 0 || time < best.microseconds) best = {i, int(groups), time, ""};
  }
  return best;
}

// `why_not` persistent: an obstacle, or nothing.
Path choose_with(const Layer& layer, Pass pass, const Chip& chip, const Wanted& wanted, const std::string& why_not) {
  Path path = fastest(layer, pass, chip, wanted, why_not.empty());
  if (path.tile < 0 && wanted.level < 0)
    throw std::runtime_error("fastrnn: no kernel fits into the shared memory of this device");
  if (path.tile < 0) {
    const bool is_obstacle = wanted.level == int(Level::kPersistent) && !why_not.empty();
    const std::string tile = "tile " + std::to_string(wanted.tile) + " cannot take this layer on this device";
    const std::string size = wanted.level == int(Level::kGemm) ? "units and outputs are no multiples of 8"
                                                               : "the recurrent weights do not fit on the chip";
    throw std::runtime_error(std::string("fastrnn: the environment asks for a ") + kLevels[wanted.level] +
                             " kernel, but " +
                             (is_obstacle        ? why_not
                              : wanted.tile >= 0 ? tile
                                                 : size));
  }
  const Level level = level_of(shapes(layer, pass)[path.tile]);
  const Wanted persistent = {int(Level::kPersistent), -1};
  path.reason = wanted.level >= 0                                       ? "the environment asks for it"
                : level == Level::kPersistent                           ? "the recurrent weights fit on the chip"
                : !why_not.empty()                                      ? why_not
                : fastest(layer, pass, chip, persistent, true).tile < 0 ? "the recurrent weights do not fit on the chip"
                                                                        : "large products take the time";
  return path;
}

}  // namespace

Path choose(const Layer& layer, Pass pass, const Chip& chip) {
  return choose_with(layer, pass, chip, wanted_path(layer, pass), obstacle(layer, chip));
}

Path limit_groups(const Layer& layer, Pass pass, const Chip& chip, Path path, int groups) {
  if (groups >= path.groups) return path;
  if (groups < 1) {
    const Wanted wanted = wanted_path(layer, pass);
    return choose_with(layer, pass, chip, wanted, "the device cannot hold all blocks at once");
  }
  path.groups = groups;
  path.microseconds = predict(shapes(layer, pass)[path.tile], layer, products_of(layer, pass), chip, groups);
  return path;
}

std::string describe(const Layer& layer, Pass pass, const Path& path) {
  constexpr const char* kHow[] = {"stepwise, a launch for every step",
                                  "gemm, a product by the matrix library and a launch for every step",
                                  "persistent, one launch for all steps"};
  const TileShape tile = shapes(layer, pass)[path.tile];
  const int64_t blocks = blocks_of(tile, products_of(layer, pass)[0], layer.D) * path.groups;
  std::ostringstream out;
  out << kHow[int(level_of(tile))] << ": " << blocks << " blocks of " << tile.units << " units x " << tile.batch
      << " rows";
  if (tile.slices) out << ", " << tile.register_slices << " of " << tile.slices << " parts of the weights in registers";
  out << ", " << std::fixed << std::setprecision(1) << path.microseconds << " us a step by the model; because "
      << path.reason;
  return out.str();
}

}  // namespace fastrnn::cuda
