// Kernels of cells that were compiled when they were first used, see cells/lookup.h.
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
  // Empty ones where there are none.
  Forward forward(int cell, int variant) const { return find(&Both::forward, cell, variant); }
  Backward backward(int cell, int variant) const { return find(&Both::backward, cell, variant); }

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
  Kernels find(Kernels Both::* of, int cell, int variant) const {
    const Both* const found = by_cell_[cell][variant].load(std::memory_order_acquire);
    return found ? found->*of : Kernels{};
  }

  std::atomic<const Both*> by_cell_[kMaxCells][kVariants] = {};
};

}  // namespace fastrnn
