// From a cell and a variant to the kernels that a file was compiled with. FASTRNN_DEFINE_LOOKUP(name, Kernels) defines
//   Kernels name(int cell, int variant)
// as kernels.h declares it, by the file's own kernels_for<Cell, variant>(); empty ones where there are none.
//
// The library of one cell, which is compiled when that cell is first used, has one variant of it: FASTRNN_ONLY_CELL,
// FASTRNN_ONLY_VARIANT, and in FASTRNN_ONLY_HEADER the header of the cell. dispatch.h's load_kernels looks for what it
// then defines: extern "C" void fastrnn_<name>(Kernels* to).
#pragma once

#ifdef FASTRNN_ONLY_CELL
#include FASTRNN_ONLY_HEADER
#define FASTRNN_DEFINE_LOOKUP(name, Kernels)                                           \
  extern "C" __attribute__((visibility("default"))) void fastrnn_##name(Kernels* to) { \
    *to = kernels_for<FASTRNN_ONLY_CELL, FASTRNN_ONLY_VARIANT>();                      \
  }
#else
#include "../cells/generated.h"
#define FASTRNN_DEFINE_LOOKUP(name, Kernels)                                                         \
  namespace {                                                                                        \
  template <class Cell, int... variants>                                                             \
  Kernels any_of(int variant) {                                                                      \
    static constexpr Kernels kAll[kVariants] = {kernels_for<Cell, variants>()...};                   \
    return kAll[variant];                                                                            \
  }                                                                                                  \
  }                                                                                                  \
  Kernels name(int cell, int variant) {                                                              \
    static constexpr Kernels (*kByCell[])(int) = {FASTRNN_CELLS(FASTRNN_IN_FULL, FASTRNN_IN_FLOAT)}; \
    return kByCell[cell](variant);                                                                   \
  }
#define FASTRNN_IN_FULL(name, Cell) any_of<Cell, 0, 1, 2, 3, 4, 5, 6>,
#define FASTRNN_IN_FLOAT(name, Cell) any_of<Cell, kFloat32>,
#endif
