// The register tiles: the innermost part of a product, all sums of some rows and columns in registers. They know no
// cell, and are files of their own: tiles.cpp, int8.cpp, matrix_unit.cpp.
//
// A tile is for a number of rows, of panels and of vectors in a panel. Every element of a result is one chain of fused
// multiply-adds over k = 0, 1, ... (int8: one sum of integers; a matrix unit: of groups of kMatrixDepth products),
// whatever the size of the tile it falls into.
#pragma once

#include "panels.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int kAccumulators = FASTRNN_REGISTERS * 3 / 4;  // the rest hold the current vectors of A and W

// How many rows, and how many panels, one tile takes for panels of C vectors. Tall tiles reuse each vector of W most;
// few rows take several panels together, to keep the 8 sums in flight that hide the latency of the multiply-add.
template <int C>
struct Tiling {
  static constexpr int kTallPanels = C == 1 ? 2 : 1;
  static constexpr int kMaxRows = int(kAccumulators / (kTallPanels * C) < 12 ? kAccumulators / (kTallPanels * C) : 12);
  static constexpr int kFewRows = 3;

  // At most; a tile of fewer panels is there as well.
  static constexpr int panels(int64_t rows) {
    if (rows < 1 || rows > kFewRows) return kTallPanels;
    const int sums = int(rows) * C, enough = (8 + sums - 1) / sums;
    return enough > kTallPanels ? enough : kTallPanels;
  }
};

// How many of so many rows are taken next, at most `most`: parts of about equal size, since a low tile hides no
// latency.
constexpr int64_t next_rows(int64_t rows, int64_t most) {
  if (rows <= most) return rows;
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// Rows of a tile of panels of C vectors, at most, for an A of elements E.
template <class E, int C>
int64_t max_rows() {
#if defined(__AVX512BF16__)
  if (kInPairs<E> && uses_matrix_unit()) return kMatrixRows;
#endif
  return Tiling<C>::kMaxRows;
}

// Tiles::of<R, P, C> for any number of rows from R to kMost.
template <class Tiles, int P, int C, int kMost, int R = 1>
auto tile_of_rows(int rows) {
  if constexpr (R < kMost) {
    return rows == R ? Tiles::template of<R, P, C> : tile_of_rows<Tiles, P, C, kMost, R + 1>(rows);
  } else {
    return Tiles::template of<R, P, C>;
  }
}

template <class Tiles, int R, int C, int P>
auto tile_of_panels(int panels) {
  if constexpr (P > 1) {
    return panels == P ? Tiles::template of<R, P, C> : tile_of_panels<Tiles, R, C, P - 1>(panels);
  } else {
    return Tiles::template of<R, 1, C>;
  }
}

// The tile for 1 to kMost rows and for 1 to Tiling<C>::panels(rows) panels.
template <class Tiles, int C, int kMost = Tiling<C>::kMaxRows>
auto choose_tile(int rows, int panels) {
  using Shape = Tiling<C>;
  if (rows == 1) return tile_of_panels<Tiles, 1, C, Shape::panels(1)>(panels);
  if (rows == 2) return tile_of_panels<Tiles, 2, C, Shape::panels(2)>(panels);
  if (rows == 3) return tile_of_panels<Tiles, 3, C, Shape::panels(3)>(panels);
  return panels == 1 ? tile_of_rows<Tiles, 1, C, kMost>(rows) : tile_of_rows<Tiles, Shape::kTallPanels, C, kMost>(rows);
}

// The same for 1 to 3 vectors in a panel: gate_panel() of up to 4 gates.
template <class Tiles, int... kMost>
auto choose_tile_of_width(int vectors, int rows, int panels) {
  switch (vectors) {
    case 1:
      return choose_tile<Tiles, 1, kMost...>(rows, panels);
    case 2:
      return choose_tile<Tiles, 2, kMost...>(rows, panels);
    default:
      return choose_tile<Tiles, 3, kMost...>(rows, panels);
  }
}

// out[r][p*C + c] = init[r][p*C + c] + sum_k A[r, k] * panel p [k][c] for a fixed number of rows and panels, of C
// vectors. `init_stride` 0 gives every row the same start; init null starts at 0. Panels lie `panel_stride` apart.
template <class T, class E, class W>
using Tile = void (*)(Operand<E> a, const W* w, int64_t panel_stride, int64_t K, const T* init, int64_t init_stride,
                      T* out, int64_t out_stride);

// That of multiply-adds of vectors.
template <class T, class E, class W>
Tile<T, E, W> vector_tile(int vectors, int rows, int panels);

#if defined(__AVX512BF16__)
// That of multiply-adds of pairs.
BFloat16Tile tile_of_pairs(int vectors, int rows, int panels);
#endif

// The one to use.
template <class T, class E, class W>
auto tile_for(int vectors, int rows, int panels) {
  if constexpr (kIsInt8<W>) {
    return cpu::int8_tile(vectors, rows, panels);
#if defined(__AVX512BF16__)
  } else if constexpr (kInPairs<E>) {
    return (uses_matrix_unit() ? matrix_tile : tile_of_pairs)(vectors, rows, panels);
#endif
  } else {
    return vector_tile<T, E, W>(vectors, rows, panels);
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
