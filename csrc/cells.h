// The cells as data, for the code that is not a kernel: those that are built in, and those that are added at run time.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cells/sizes.h"
#include "layer.h"

namespace fastrnn {

constexpr int kMaxCells = 1024;

struct CellInfo : CellSizes {
  std::string name;
  bool may_project;      // whether h may have other dimensions than the units
  bool has_all_kernels;  // built in: of each dtype, and on the GPU

  void set_may_project(bool reads_h) {
    may_project = carried > 0 && !reads_h && first_gates > 0 && second_gates == 0 && !is_normalized();
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
