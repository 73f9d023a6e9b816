// The cells' names and sizes as data, read off the list, for the code that is not a kernel.
#pragma once

#include "cells/generated.h"

namespace fastrnn {

constexpr int kMaxGates = 4;  // as many vectors as a panel can have, see cpu/gemm.h

struct CellInfo {  // see cells/cell.h
  const char* name;
  int gates, second_gates, saved, grads, saved_operand;
  int input_grad[kMaxGates], recurrent_grad[kMaxGates];
  bool has_cell;
  bool may_project;  // whether h may have other dimensions than the units
};

template <class Cell>
constexpr CellInfo cell_info(const char* name) {
  static_assert(Cell::kGates <= kMaxGates);
  CellInfo info = {name,
                   Cell::kGates,
                   Cell::kSecondGates,
                   Cell::kSaved,
                   Cell::kGrads,
                   Cell::kSavedOperand,
                   {},
                   {},
                   Cell::kHasCell,
                   Cell::kHasCell && !Cell::kReadsH && Cell::kSecondGates == 0};
  for (int g = 0; g < Cell::kGates; ++g)
    info.input_grad[g] = Cell::kInputGrad[g], info.recurrent_grad[g] = Cell::kRecurrentGrad[g];
  return info;
}

#define FASTRNN_CELL_INFO(name, Cell) cell_info<Cell>(#name),
constexpr CellInfo kCells[] = {FASTRNN_CELLS(FASTRNN_CELL_INFO)};
#undef FASTRNN_CELL_INFO

}  // namespace fastrnn
