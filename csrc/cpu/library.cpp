// Kernels that were compiled at run time, see lookup.h.
#include <dlfcn.h>

#include <stdexcept>

#include "dispatch.h"

namespace fastrnn::cpu {
namespace {

template <class Kernels>
Kernels kernels_in(void* library, const char* name) {
  const auto function = reinterpret_cast<void (*)(Kernels*)>(dlsym(library, name));
  if (!function) throw std::runtime_error(dlerror());
  Kernels kernels = {};
  function(&kernels);
  return kernels;
}

}  // namespace

void load_kernels(int cell, int variant, const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  add_kernels(cell, variant, kernels_in<ForwardKernels>(library, "fastrnn_forward_kernels"),
              kernels_in<BackwardKernels>(library, "fastrnn_backward_kernels"));
}

}  // namespace fastrnn::cpu
