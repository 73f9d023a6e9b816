// The GPU's backend on CPU tensors: the ops of a layer in the name space fastrnn_emulated, and what a test may set in
// the emulator.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "../../csrc/cuda/recurrence.h"
#include "../../csrc/cuda/rows.h"
#include "../../csrc/torch/cell_info.h"
#include "../../csrc/torch/cuda.h"
#include "../../csrc/torch/schemas.h"
#include "emulate.h"

TORCH_LIBRARY(fastrnn_emulated, m) { fastrnn::define_layer_ops(m); }
TORCH_LIBRARY_IMPL(fastrnn_emulated, CPU, m) { fastrnn::implement_layer_ops(m, fastrnn::kCuda); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_chip",
        [](int compute, int multiprocessors, int shared) { emulate::chip() = {compute, multiprocessors, shared}; });
  m.def("add_cell", [](const std::string& name, const pybind11::dict& sizes) {
    fastrnn::add_cell(fastrnn::cell_info_of(name, sizes));
  });
  m.def("load_kernels", [](const std::string& cell, int variant, const std::string& path) {
    fastrnn::cuda::load_kernels(fastrnn::find_cell(cell), variant, path);
  });
  m.def("set_seed", [](unsigned seed) { emulate::settings().seed = seed; });
  m.def("set_lost_block", [](int block, uint32_t wait_limit) {
    emulate::settings().lost_block = block, emulate::settings().wait_limit = wait_limit;
  });
  m.def("set_refuses", [](bool refuses) { emulate::settings().refuses = refuses; });
  m.def("row_length", [](int T, int64_t length) {  // what the kernels take it for
    return fastrnn::cuda::Rows{T, 1, &length, nullptr}.length(0);
  });
  m.def("launches", [] {  // of each kernel, by its name
    std::map<std::string, int64_t> by_name;
    for (const auto& [kernel, count] : emulate::launches()) {
      Dl_info info = {};
      dladdr(kernel, &info);
      by_name[info.dli_sname ? info.dli_sname : "?"] += count;
    }
    return by_name;
  });
}
