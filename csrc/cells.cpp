#include "cells.h"

#include <atomic>
#include <deque>
#include <iterator>
#include <mutex>
#include <stdexcept>

#include "cells/generated.h"

namespace fastrnn {
namespace {

template <class Cell>
CellInfo info_of(const char* name, bool has_all_kernels) {
  CellInfo info = {kSizes<Cell>, name, false, has_all_kernels};
  info.set_may_project(Cell::kReadsH);
  return info;
}

// Whoever has an index may read without a lock: what is in the list stays where it is.
struct List {
  std::deque<CellInfo> cells = {
#define FASTRNN_IN_FULL(name, Cell) info_of<Cell>(#name, true),
#define FASTRNN_IN_PART(name, Cell) info_of<Cell>(#name, false),
      FASTRNN_CELLS(FASTRNN_IN_FULL, FASTRNN_IN_PART)
#undef FASTRNN_IN_FULL
#undef FASTRNN_IN_PART
  };
  const int built_in = int(cells.size());
  std::atomic<const CellInfo*> by_index[kMaxCells] = {};
  std::atomic<int> count{0};
  std::mutex adding;

  List() {
    for (const CellInfo& cell : cells) publish(cell);
  }
  void publish(const CellInfo& cell) {
    by_index[count] = &cell;
    ++count;
  }
};

List& list() {
  static List& all = *new List;  // never destroyed: threads may outlive static objects
  return all;
}

bool is_same(const CellInfo& a, const CellInfo& b) {
  const auto key = [](const CellInfo& c) {
    std::vector<int> numbers = {c.gates, c.first_gates, c.second_gates,  c.carried,     c.unit_weights, c.masks,
                                c.saved, c.grads,       c.saved_operand, c.may_project, c.gains,        c.normalizes};
    numbers.insert(numbers.end(), std::begin(c.input_grad), std::end(c.input_grad));
    numbers.insert(numbers.end(), std::begin(c.recurrent_grad), std::end(c.recurrent_grad));
    numbers.insert(numbers.end(), std::begin(c.unit_grad), std::end(c.unit_grad));
    return numbers;
  };
  return key(a) == key(b);
}

}  // namespace

void check_bounds(const CellInfo& info) {
  if (info.gates < 1 || info.gates > kMaxGates || info.recurrent_gates() > kMaxGates ||
      info.unit_weights > kMaxUnitWeights || info.masks > kMaxMasks)
    throw std::invalid_argument("cell " + info.name + ": expected 1 to " + std::to_string(kMaxGates) +
                                " gates, at most " + std::to_string(kMaxUnitWeights) + " unit weights and " +
                                std::to_string(kMaxMasks) + " masks");
}

int find_cell(std::string_view name) {
  List& all = list();
  for (int i = 0, count = all.count; i < count; ++i)
    if (name == all.by_index[i].load()->name) return i;
  return -1;
}

const CellInfo& cell_info(int cell) { return *list().by_index[cell]; }

std::vector<std::string> cell_names() {
  std::vector<std::string> names;
  for (int i = 0, count = list().count; i < count; ++i) names.push_back(cell_info(i).name);
  return names;
}

int built_in_cells() { return list().built_in; }

int add_cell(const CellInfo& info) {
  List& all = list();
  const std::lock_guard<std::mutex> lock(all.adding);
  const int there = find_cell(info.name);
  if (there >= 0) {
    if (!is_same(info, cell_info(there))) throw std::invalid_argument("cell " + info.name + " is there, and differs");
    return there;
  }
  if (all.count == kMaxCells) throw std::length_error("there are " + std::to_string(kMaxCells) + " cells already");
  all.cells.push_back(info);
  all.publish(all.cells.back());
  return all.count - 1;
}

}  // namespace fastrnn
