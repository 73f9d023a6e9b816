#include "choose.h"

#include <stdlib.h>

#include <algorithm>
#include <charconv>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../cells.h"
#include "model.h"

namespace fastrnn::cuda {
namespace {

std::vector<TileShape> shapes(const Layer& layer, Pass pass) {
  const auto list = [](const auto& array) { return std::vector<TileShape>(std::begin(array), std::end(array)); };
  const bool forward = pass == Pass::kForward;
  if (layer.dtype == DType::kFloat64) return list(kBoth64);
  if (layer.dtype == DType::kFloat32 && layer.tf32) return forward ? list(kForwardTf32) : list(kBackwardTf32);
  if (layer.dtype == DType::kFloat32) return forward ? list(kForward32) : list(kBackward32);
  return forward ? list(kForward16) : list(kBackward16);
}

// Blocks that share K are faster on a Hopper for some layers; clusters of all units and products of warpgroups were not
// for any; groups in turns and newer chips have not been measured: those run where the environment asks for them.
bool may_use(const TileShape& tile, const Product& product, const Layer& layer, const Chip& chip, bool asked_for) {
  constexpr int kHopper = 90, kMostBlocks = 16;
  if (!is_variant(tile)) return true;
  if (!cell_info(layer.cell).has_all_kernels) return false;
  const bool is_measured = tile.split > 1 && !tile.wgmma && tile.turns == 1 && chip.compute == kHopper;
  if (!asked_for && !is_measured) return false;
  if (needs_hopper(tile) && (tile.wgmma ? chip.compute != kHopper : chip.compute < kHopper)) return false;
  if (!has_wgmma_rows(tile, product.rows_per_unit)) return false;
  return !tile.cluster || (product.units > tile.units && product.units <= kMostBlocks * tile.units);
}

// Why no persistent launch is possible, or nothing.
std::string obstacle(const Layer& layer, const Chip& chip) {
  if (cell_info(layer.cell).recurrent_gates() == 0) return "the cell has no recurrent product";
  if (cell_info(layer.cell).second_gates > 0) return "the cell multiplies twice in a step";
  if (layer.projected) return "the layer has a projection";
  if (layer.dtype == DType::kFloat64) return "float64 has no persistent kernel";
  if (layer.T < 2) return "there is only one step";
  if (chip.multiprocessors == 0) return "the device is not known";
  return "";
}

// Why the matrix library cannot make the products of the steps, or nothing.
std::string library_obstacle(const Layer& layer) {
  if (layer.H % 8 != 0 || layer.P % 8 != 0) return "units and outputs are no multiples of 8";
  if (layer.matmul_tf32 && !layer.tf32) return "matrix products are of TF32 and recurrent layers may not be";
  return "";
}

// How many groups of rows of a tile can be walked at the same time; 0 if it cannot take the layer.
int64_t groups_together(const TileShape& tile, const Layer& layer, const Products& products, const Chip& chip,
                        bool asked_for) {
  constexpr int64_t kMostGroups = 65535;  // blockIdx.y
  const int64_t groups = std::min(groups_of(tile, layer), kMostGroups);
  if (tile.scan != (cell_info(layer.cell).recurrent_gates() == 0)) return 0;
  if (tile.scan) return groups;
  if (tile.gemm) return library_obstacle(layer).empty() ? groups : 0;
  for (const Product& product : products)
    if (shared_bytes(tile, product) > chip.shared_bytes) return 0;
  if (level_of(tile) == Level::kStepwise) return groups;
  const Product& product = products[0];
  if (!may_use(tile, product, layer, chip, asked_for)) return 0;
  if (tile.slices * kWarps * product.slice() * tile.split < product.K) return 0;
  // Multiprocessors come in groups, and a cluster lies in one: some are left over.
  const int64_t multiprocessors = chip.multiprocessors - (tile.split > 1 ? chip.multiprocessors / 16 : 0);
  return std::min(groups, multiprocessors / blocks_of(tile, product, layer.D));
}

constexpr const char* kLevels[] = {"stepwise", "gemm", "persistent", "scan"};

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
      throw std::runtime_error("FASTRNN_CUDA_LEVEL: expected stepwise, gemm, persistent or scan, got " + level);
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

// The fastest of the tiles that are wanted and can take the layer, or a path of tile -1.
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

// Why no path is as the environment asks. `why_not` persistent: an obstacle, or nothing.
std::string refusal(const Layer& layer, const Wanted& wanted, const std::string& why_not) {
  if (wanted.level == int(Level::kPersistent) && !why_not.empty()) return why_not;
  if (wanted.tile >= 0) return "tile " + std::to_string(wanted.tile) + " cannot take this layer on this device";
  if (wanted.level == int(Level::kScan)) return "the cell has recurrent products";
  if (wanted.level >= 0 && cell_info(layer.cell).recurrent_gates() == 0) return "the cell has no recurrent product";
  if (wanted.level == int(Level::kGemm)) return library_obstacle(layer);
  if (wanted.level == int(Level::kStepwise)) return "no tile fits into the shared memory of this device";
  return "the recurrent weights do not fit on the chip";
}

Path choose_with(const Layer& layer, Pass pass, const Chip& chip, const Wanted& wanted, const std::string& why_not) {
  Path path = fastest(layer, pass, chip, wanted, why_not.empty());
  if (path.tile < 0) {
    if (wanted.level < 0) throw std::runtime_error("fastrnn: no kernel fits into the shared memory of this device");
    throw std::runtime_error(std::string("fastrnn: the environment asks for a ") + kLevels[wanted.level] +
                             " kernel, but " + refusal(layer, wanted, why_not));
  }
  if (wanted.level >= 0) {
    path.reason = "the environment asks for it";
  } else if (level_of(shapes(layer, pass)[path.tile]) == Level::kPersistent) {
    path.reason = "the recurrent weights fit on the chip";
  } else if (!why_not.empty()) {
    path.reason = why_not;
  } else {
    const bool fits = fastest(layer, pass, chip, {int(Level::kPersistent), -1}, true).tile >= 0;
    path.reason = fits ? "its products are large" : "the recurrent weights do not fit on the chip";
  }
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
  constexpr const char* kHow[] = {
      "stepwise, a launch for every step", "gemm, a product by the matrix library and a launch for every step",
      "persistent, one launch for all steps", "scan, one launch for all steps, without products"};
  const TileShape tile = shapes(layer, pass)[path.tile];
  const int64_t blocks = blocks_of(tile, products_of(layer, pass)[0], layer.D) * path.groups;
  std::ostringstream out;
  out << kHow[int(level_of(tile))] << ": " << blocks << " blocks of " << tile.units << " units x " << tile.batch
      << " rows";
  if (tile.slices) out << ", " << tile.register_slices << " of " << tile.slices << " parts of the weights in registers";
  if (tile.turns > 1) out << ", " << tile.turns << " groups of rows in turns";
  out << ", " << std::fixed << std::setprecision(1) << path.microseconds << " us a step by the model; because "
      << path.reason;
  return out.str();
}

}  // namespace fastrnn::cuda
