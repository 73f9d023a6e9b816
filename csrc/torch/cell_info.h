// A cell from Python, as codegen.description() says what it has.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../cells.h"

namespace fastrnn {

// Throws std::invalid_argument as check_bounds.
inline CellInfo cell_info_of(const std::string& name, const pybind11::dict& sizes) {
  const auto number = [&](const char* key) { return sizes[key].cast<int>(); };
  const auto numbers = [&](const char* key, int* to) {
    const auto values = sizes[key].cast<std::vector<int>>();
    std::copy(values.begin(), values.end(), to);
  };
  CellInfo info = {};
  info.name = name;
  info.gates = number("gates"), info.first_gates = number("first_gates"), info.second_gates = number("second_gates");
  info.carried = number("carried"), info.unit_weights = number("unit_weights"), info.masks = number("masks");
  info.saved = number("saved"), info.grads = number("grads"), info.saved_operand = number("saved_operand");
  check_bounds(info);
  numbers("input_grad", info.input_grad), numbers("recurrent_grad", info.recurrent_grad);
  numbers("unit_grad", info.unit_grad);
  info.gains = number("gains"), info.normalizes = sizes["normalizes"].cast<bool>();
  info.set_may_project(sizes["reads_h"].cast<bool>());
  return info;
}

}  // namespace fastrnn
