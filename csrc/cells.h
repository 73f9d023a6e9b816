// The cells as data, for the code that is not a kernel: those that are built in, and those that are added at run time.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "layer.h"

namespace fastrnn {

constexpr int kMaxGates = 4;  // as many vectors as a panel can have, see cpu/tiles.h
constexpr int kMaxUnitWeights = 8;
constexpr int kMaxMasks = 64;
constexpr int kMaxCells = 1024;

struct CellInfo {  // see cells/cell.h
  std::string name;
  int gates, first_gates, second_gates, carried, unit_weights, masks, saved, grads, saved_operand;
  int gains;  // of normalized products: the last rows of w_own, after those of the unit weights
  int input_grad[kMaxGates], recurrent_grad[kMaxGates], unit_grad[kMaxUnitWeights];
  bool is_normalized;    // something of it has layer normalization
  bool may_project;      // whether h may have other dimensions than the units
  bool has_all_kernels;  // built in: of each dtype, and on the GPU

  int recurrent_gates() const { return first_gates + second_gates; }
  int own_rows() const { return unit_weights + gains; }  // of w_own
  void set_may_project(bool reads_h) {
    may_project = carried > 0 && !reads_h && first_gates > 0 && second_gates == 0 && !is_normalized;
  }
};

// Throws std::invalid_argument if a cell has more of something than the bounds above allow.
void check_bounds(const CellInfo& info);

// The index of a cell, which stays the same; -1: there is none of that name.
int find_cell(std::string_view name);
const CellInfo& cell_info(int cell);
std::vector<std::string> cell_names();
int built_in_cells();  // they come first

// Fills in what a layer says of its cell.
inline void set_cell(Layer& layer, int cell) {
  const CellInfo& info = cell_info(cell);
  layer.cell = cell, layer.gates = info.gates, layer.recurrent = info.recurrent_gates();
  layer.unit_weights = info.own_rows(), layer.gains = info.gains;
}

// Adds a cell, or finds the one that is there. Throws std::invalid_argument if that one differs; std::length_error if
// there are kMaxCells.
int add_cell(const CellInfo& info);

}  // namespace fastrnn
