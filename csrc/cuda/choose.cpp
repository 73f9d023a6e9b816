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

struct Product {  // one step's
  int64_t K, units;
  int rows_per_unit, number_bytes;
  bool uses_mma;

  int64_t slice() const { return uses_mma ? 64 / number_bytes : number_bytes == 8 ? 16 : 32; }  // numbers
  int64_t rows(int units) const { return uses_mma ? (units * rows_per_unit + 15) / 16 * 16 : units * rows_per_unit; }
};

int number_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

Product product_of(const Layer& layer, Pass pass) {
  const CellInfo& cell = kCells[layer.cell];
  const int64_t units = (layer.H + 7) / 8 * 8;
  const int first_gates = cell.gates - cell.second_gates;
  return {pass == Pass::kForward ? units : first_gates * units, units, pass == Pass::kForward ? cell.gates : 1,
          number_bytes(layer.dtype), layer.tf32 || number_bytes(layer.dtype) == 2};
}

std::vector<TileShape> shapes(const Layer& layer, Pass pass) {
  const auto list = [](const auto& array) { return std::vector<TileShape>(std::begin(array), std::end(array)); };
  const bool forward = pass == Pass::kForward;
  if (layer.dtype == DType::kFloat64) return list(kStepwise64);
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
  if (tile.slices == 0) return false;
  if (!tile.cluster && tile.split == 1 && !tile.wgmma) return true;
  if (!asked_for || (tile.wgmma ? chip.compute != kHopper : chip.compute < kHopper)) return false;
  if (!has_wgmma_rows(tile, product.rows_per_unit)) return false;
  return !tile.cluster || (product.units > tile.units && product.units <= kMostBlocks * tile.units);
}

// Microseconds of one pass over `waves` batch tiles after each other: what the exchange costs (a store and a load
// through L2, a barrier, the sums and the cell), the rows' way into the multiprocessor, and the multiply-adds of the
// busiest block. The constants are from published figures and counted instructions, for a Hopper at 1.8 GHz.
double predict(const TileShape& tile, const Product& product, int64_t waves) {
  constexpr double kClock = 1.8e3;                            // cycles of a microsecond
  constexpr double kExchange = 900;                           // cycles
  constexpr double kHandOut = 500;                            // cycles: sums to and from the other blocks of a cluster
  constexpr double kBytes = 35;                               // into a multiprocessor, a cycle
  constexpr double kWgmma = 1600, kTensor = 650, kFma = 100;  // multiply-adds of a multiprocessor, a cycle, in practice
  const double numbers = double(tile.batch) * double(product.K) / tile.split;
  const double multiply_adds = numbers * double(rows_of(tile, product));
  const double cycles = kExchange + (tile.split > 1 ? kHandOut : 0) + numbers * product.number_bytes / kBytes +
                        multiply_adds / (tile.wgmma                  ? kWgmma
                                         : product.number_bytes == 2 ? kTensor
                                         : product.uses_mma          ? kTensor / 2
                                                                     : kFma);
  return double(waves) * cycles / kClock;
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

// `only`: the one tile to look at, or -1: all.
Path choose_persistent(const Layer& layer, Pass pass, const Chip& chip, int only) {
  const Product product = product_of(layer, pass);
  const std::vector<TileShape> all = shapes(layer, pass);
  Path best = {-1, 0, 0, ""};
  for (size_t i = 0; i < all.size(); ++i) {
    const TileShape& tile = all[i];
    const int64_t blocks = blocks_of(tile, product, layer.D), groups = groups_of(tile, layer);
    if ((only >= 0 && int(i) != only) || !may_use(tile, product, chip, only >= 0)) continue;
    if (tile.slices * kWarps * product.slice() * tile.split < product.K || blocks > chip.multiprocessors) continue;
    if (shared_bytes(tile, product) > chip.shared_bytes) continue;
    const int64_t together = std::min(groups, chip.multiprocessors / blocks);
    const double time = predict(tile, product, waves(groups, together));
    if (best.tile < 0 || time < best.microseconds) best = {int(i), int(together), time, ""};
  }
  return best;
}

Path stepwise_path(const Layer& layer, const TileShape& shape, int tile, std::string reason) {
  constexpr int64_t kMostGroups = 65535;  // blockIdx.y
  return {tile, int(std::min(groups_of(shape, layer), kMostGroups)), 0, std::move(reason)};
}

// What FASTRNN_CUDA_LEVEL and FASTRNN_CUDA_TILE ask for.
struct Wanted {
  bool stepwise, persistent;
  int tile;  // -1: any
};

Wanted wanted_path(const Layer& layer, Pass pass) {
  const auto variable = [](const char* name) { return std::string(getenv(name) ? getenv(name) : ""); };
  const std::string level = variable("FASTRNN_CUDA_LEVEL"), tiles = variable("FASTRNN_CUDA_TILE");
  if (level != "" && level != "stepwise" && level != "persistent")
    throw std::runtime_error("FASTRNN_CUDA_LEVEL: expected stepwise or persistent, got " + level);
  Wanted wanted = {level == "stepwise", level == "persistent", -1};
  const size_t comma = tiles.find(',');
  const std::string tile = comma == std::string::npos ? tiles
                           : pass == Pass::kForward   ? tiles.substr(0, comma)
                                                      : tiles.substr(comma + 1);
  if (tile.empty()) return wanted;
  const std::vector<TileShape> all = shapes(layer, pass);
  const auto [end, error] = std::from_chars(tile.data(), tile.data() + tile.size(), wanted.tile);
  if (error != std::errc() || end != tile.data() + tile.size() || wanted.tile < 0 || wanted.tile >= int(all.size()))
    throw std::runtime_error("FASTRNN_CUDA_TILE: expected 0 to " + std::to_string(all.size() - 1) + ", got " + tile);
  const bool stepwise = all[wanted.tile].slices == 0;
  if (stepwise ? wanted.persistent : wanted.stepwise)
    throw std::runtime_error("FASTRNN_CUDA_TILE: tile " + tile + " is not " + level + ", as FASTRNN_CUDA_LEVEL asks");
  wanted.stepwise = stepwise, wanted.persistent = !stepwise;
  return wanted;
}

// The best stepwise path, with `reason`.
Path choose_stepwise(const Layer& layer, Pass pass, const Chip& chip, std::string reason) {
  const std::vector<TileShape> all = shapes(layer, pass);
  const Product product = product_of(layer, pass);
  int tile = -1;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].slices > 0 || shared_bytes(all[i], product) > chip.shared_bytes) continue;
    if (tile < 0 || all[tile].batch < layer.B) tile = int(i);  // the narrowest that takes all rows, or the widest
  }
  if (tile < 0) throw std::runtime_error("fastrnn: no kernel fits into the shared memory of this device");
  return stepwise_path(layer, all[tile], tile, std::move(reason));
}

Path stepwise_instead(const Layer& layer, Pass pass, const Chip& chip, const Wanted& wanted, const std::string& why) {
  if (wanted.persistent) throw std::runtime_error("fastrnn: the environment asks for a persistent kernel, but " + why);
  return choose_stepwise(layer, pass, chip, why);
}

}  // namespace

Path choose(const Layer& layer, Pass pass, const Chip& chip) {
  const Wanted wanted = wanted_path(layer, pass);
  if (wanted.stepwise) {
    const std::string reason = "the environment asks for it";
    if (wanted.tile < 0) return choose_stepwise(layer, pass, chip, reason);
    const TileShape tile = shapes(layer, pass)[wanted.tile];
    if (shared_bytes(tile, product_of(layer, pass)) > chip.shared_bytes)
      throw std::runtime_error("FASTRNN_CUDA_TILE: tile " + std::to_string(wanted.tile) +
                               " needs more shared memory than this device has");
    return stepwise_path(layer, tile, wanted.tile, reason);
  }
  std::string why_not = obstacle(layer, chip);
  if (why_not.empty()) {
    Path path = choose_persistent(layer, pass, chip, wanted.tile);
    if (path.tile >= 0) {
      path.reason = "the recurrent weights fit on the chip";
      return path;
    }
    why_not = wanted.tile < 0 ? "the recurrent weights do not fit on the chip"
                              : "tile " + std::to_string(wanted.tile) + " cannot take this layer on this device";
  }
  return stepwise_instead(layer, pass, chip, wanted, why_not);
}

Path limit_groups(const Layer& layer, Pass pass, const Chip& chip, Path path, int groups) {
  if (groups >= path.groups) return path;
  if (groups < 1)
    return stepwise_instead(layer, pass, chip, wanted_path(layer, pass), "the device cannot hold all blocks at once");
  const TileShape tile = shapes(layer, pass)[path.tile];
  path.groups = groups;
  path.microseconds = predict(tile, product_of(layer, pass), waves(groups_of(tile, layer), groups));
  return path;
}

std::string describe(const Layer& layer, Pass pass, const Path& path) {
  const TileShape tile = shapes(layer, pass)[path.tile];
  const Product product = product_of(layer, pass);
  const int64_t blocks = blocks_of(tile, product, layer.D) * path.groups;
  std::ostringstream out;
  out << (tile.slices ? "persistent, one launch for all steps" : "stepwise, a launch for every step") << ": " << blocks
      << " blocks of " << tile.units << " units x " << tile.batch << " rows";
  if (tile.slices)
    out << ", " << tile.register_slices << " of " << tile.slices << " parts of the weights in registers, " << std::fixed
        << std::setprecision(1) << path.microseconds << " us a step by the model";
  out << "; because " << path.reason;
  return out.str();
}

}  // namespace fastrnn::cuda
