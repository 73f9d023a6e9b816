// The sizes of a cell (cell.h) as data: for all code that is the same for every cell.
#pragma once

#include "../host_device.h"

namespace fastrnn {

constexpr int kMaxGates = 4;  // as many vectors as a panel can have, see cpu/tiles.h
constexpr int kMaxUnitWeights = 8;
constexpr int kMaxMasks = 64;

struct CellSizes {
  int gates, first_gates, second_gates, carried, unit_weights, masks, saved, grads, saved_operand;
  int gains;  // of normalized products: the last rows of w_own, after those of the unit weights
  int input_grad[kMaxGates], recurrent_grad[kMaxGates], unit_grad[kMaxUnitWeights];
  bool normalizes;  // a value of its own

  FASTRNN_HD constexpr int recurrent_gates() const { return first_gates + second_gates; }
  FASTRNN_HD constexpr int own_rows() const { return unit_weights + gains; }  // of w_own
  FASTRNN_HD constexpr bool is_normalized() const { return gains > 0 || normalizes; }

  // Whether vector j of what backward writes is the gradient of a second product.
  FASTRNN_HD constexpr bool is_second_grad(int j) const {
    return second_gates > 0 && j >= recurrent_grad[first_gates] && j < recurrent_grad[first_gates] + second_gates;
  }
};

template <class Cell>
constexpr CellSizes sizes_of() {
  static_assert(Cell::kGates <= kMaxGates && Cell::kUnitWeights <= kMaxUnitWeights && Cell::kMasks <= kMaxMasks);
  CellSizes to = {};
  to.gates = Cell::kGates, to.first_gates = Cell::kFirstGates, to.second_gates = Cell::kSecondGates;
  to.carried = Cell::kCarried, to.unit_weights = Cell::kUnitWeights, to.masks = Cell::kMasks;
  to.saved = Cell::kSaved, to.grads = Cell::kGrads, to.saved_operand = Cell::kSavedOperand;
  to.gains = Cell::kGains, to.normalizes = Cell::kNormalizes;
  for (int g = 0; g < to.gates; ++g) to.input_grad[g] = Cell::kInputGrad[g];
  for (int g = 0; g < to.recurrent_gates(); ++g) to.recurrent_grad[g] = Cell::kRecurrentGrad[g];
  for (int j = 0; j < to.unit_weights; ++j) to.unit_grad[j] = Cell::kUnitGrad[j];
  return to;
}

// static: each file has its own, also in libraries of cells that are loaded later.
template <class Cell>
static constexpr CellSizes kSizes = sizes_of<Cell>();

}  // namespace fastrnn
