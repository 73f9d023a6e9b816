// The kernels of all cells: those that are built in, and those of cells that were compiled when they were first used,
// see cells/lookup.h.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cells.h"

namespace fastrnn {

// Any number of threads may look for kernels while others add some.
template <class Forward, class Backward>
class AddedKernels {
 public:
  // What is built in, or else what was added; empty ones where there is neither.
  Forward forward(Forward (*built_in)(int cell, int variant), int cell, int variant) const {
    return find(built_in, &Both::forward, cell, variant);
  }
  Backward backward(Backward (*built_in)(int cell, int variant), int cell, int variant) const {
    return find(built_in, &Both::backward, cell, variant);
  }

  // Those of a library, which stays for as long as the process. Throws std::runtime_error if it cannot be loaded.
  void load(int cell, int variant, const std::string& path) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    const Both* none = nullptr;
    const Both* const made = new Both{kernels_in<Forward>(library, "fastrnn_forward_kernels"),
                                      kernels_in<Backward>(library, "fastrnn_backward_kernels")};
    if (!by_cell_[cell][variant].compare_exchange_strong(none, made)) delete made;
  }

 private:
  struct Both {
    Forward forward;
    Backward backward;
  };

  template <class Kernels>
  static Kernels kernels_in(void* library, const char* name) {
    const auto function = reinterpret_cast<void (*)(Kernels*)>(dlsym(library, name));
    if (!function) throw std::runtime_error(dlerror());
    Kernels kernels = {};
    function(&kernels);
    return kernels;
  }

  template <class Kernels>
  Kernels find(Kernels (*built_in)(int, int), Kernels Both::* of, int cell, int variant) const {
    const Kernels found = cell < built_in_cells() ? built_in(cell, variant) : Kernels{};
    if (found.run) return found;
    const Both* const added = by_cell_[cell][variant].load(std::memory_order_acquire);
    return added ? added->*of : Kernels{};
  }

  std::atomic<const Both*> by_cell_[kMaxCells][kVariants] = {};
};

}  // namespace fastrnn
