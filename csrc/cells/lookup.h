// From a cell and a variant to the kernels that a file was compiled with. FASTRNN_DEFINE_LOOKUP(name, Kernels) defines
//   Kernels name(int cell, int variant)
// by what the file says before: <name>_of<Cell, variant>(), and which variants it has of cells with all kernels and
// of the others, as AllVariants and OtherVariants. What is not among them has empty kernels.
//
// The library of one cell, which is compiled when that cell is first used, has one variant of it: FASTRNN_ONLY_CELL,
// FASTRNN_ONLY_VARIANT, and in FASTRNN_ONLY_HEADER the header of the cell. AddedKernels (added_kernels.h) looks for
// what it then defines: extern "C" void fastrnn_<name>(Kernels* to).
#pragma once

#include "../layer.h"

namespace fastrnn {

template <int... variants>
struct Variants {};

}  // namespace fastrnn

#ifdef FASTRNN_ONLY_CELL
#include FASTRNN_ONLY_HEADER
#define FASTRNN_DEFINE_LOOKUP(name, Kernels)                                           \
  extern "C" __attribute__((visibility("default"))) void fastrnn_##name(Kernels* to) { \
    *to = name##_of<FASTRNN_ONLY_CELL, FASTRNN_ONLY_VARIANT>();                        \
  }
#else
#include "generated.h"
#define FASTRNN_DEFINE_LOOKUP(name, Kernels)                                                   \
  namespace {                                                                                  \
  template <class Cell, int... variants>                                                       \
  Kernels any_of(Variants<variants...>, int variant) {                                         \
    Kernels found = {};                                                                        \
    (void(variant == variants && (found = name##_of<Cell, variants>(), true)), ...);           \
    return found;                                                                              \
  }                                                                                            \
  }                                                                                            \
  Kernels name(int cell, int variant) {                                                        \
    static constexpr Kernels (*kByCell[])(int) = {FASTRNN_CELLS(FASTRNN_ALL, FASTRNN_OTHERS)}; \
    return kByCell[cell](variant);                                                             \
  }
#define FASTRNN_ALL(name, Cell) [](int variant) { return any_of<Cell>(AllVariants(), variant); },
#define FASTRNN_OTHERS(name, Cell) [](int variant) { return any_of<Cell>(OtherVariants(), variant); },
#endif
