// What a cell is given besides products and states: the unit weights of a direction, the masks of rows at a time, and,
// filled in by the caller, its normalized operand.
#pragma once

#include "rows.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// The length of an array that may be empty.
constexpr int at_least_one(int n) { return n > 0 ? n : 1; }

template <class Cell>
constexpr bool kIsGiven = Cell::kUnitWeights + Cell::kMasks > 0;

template <class Cell, class S, bool is_given = kIsGiven<Cell>>
struct Given {
  using T = Accumulator<S>;
  static constexpr int kCount = at_least_one(Cell::kUnitWeights + Cell::kMasks + Cell::kNormalizes);

  const S* weights;  // [U, H]
  const T* widened;  // [U, Hp] the same, packed; or null: read `weights`
  const S* masks;    // [n, M, H]
  int64_t pitch;     // Hp

  // Those of row r for whole vectors from unit u on, or as many units as there are; H units in all.
  FASTRNN_INLINE void load_all(Vec<T>* to, int64_t r, int64_t u, int64_t H) const {
    for (int j = 0; j < Cell::kUnitWeights; ++j)
      to[j] = widened ? load(widened + j * pitch + u) : load(weights + j * H + u, H - u);
    for (int j = 0; j < Cell::kMasks; ++j)
      to[Cell::kUnitWeights + j] = load(masks + (r * Cell::kMasks + j) * H + u, H - u);
  }
};

// Most cells are given nothing, and carry nothing about.
template <class Cell, class S>
struct Given<Cell, S, false> {
  static constexpr int kCount = 1;

  FASTRNN_INLINE void load_all(Vec<Accumulator<S>>*, int64_t, int64_t, int64_t) const {}
};

// As the caller gave them, for rows from b on at a time.
template <class Cell, class S>
Given<Cell, S> given_at(const Layer& p, int d, int64_t t, int64_t b) {
  Given<Cell, S> found = {};
  if constexpr (kIsGiven<Cell>) {
    found.weights = as<S>(p.weights[d].w_own);
    if (Cell::kMasks) found.masks = as<S>(p.masks) + mask_offset(p, d, t, b, Cell::kMasks);
  }
  return found;
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
