// The cells' names and sizes as data, read off the list, for the code that is not a kernel.
#pragma once

#include "cells/list.h"

namespace fastrnn {

struct CellInfo {
  const char* name;
  int gates, saved;
  bool has_cell;
};

#define FASTRNN_CELL_INFO(name, Cell) {#name, Cell::kGates, Cell::kSaved, Cell::kHasCell},
constexpr CellInfo kCells[] = {FASTRNN_CELLS(FASTRNN_CELL_INFO)};
#undef FASTRNN_CELL_INFO

}  // namespace fastrnn
