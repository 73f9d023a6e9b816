// The GPU's backend on CPU tensors: ops fastrnn_emulated::layer_forward and layer_backward, of the same schemas as
// those of fastrnn, and what a test may set in the emulator.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <map>
#include <string>

#include "../../csrc/cuda/rows.h"
#include "../../csrc/ops_cuda.h"
#include "emulate.h"

TORCH_LIBRARY(fastrnn_emulated, m) {
  m.def("explain(Tensor x, str cell, int H, int P, int D, bool projected, bool training) -> str");
  m.def(
      "layer_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, "
      "Tensor[] w_hr, Tensor? lengths, Tensor? resets, str cell, bool save, bool recompute=False) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)");
  m.def(
      "layer_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, Tensor[] w_hr, Tensor? lengths, Tensor? resets, "
      "Tensor y, Tensor saved, Tensor saved_c, str cell, bool[] wanted) "
      "-> (Tensor x, Tensor h0, Tensor c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, Tensor[] w_hr)");
}

TORCH_LIBRARY_IMPL(fastrnn_emulated, CPU, m) {
  m.impl("explain", fastrnn::Bound<&fastrnn::explain_call, fastrnn::kCuda>::call);
  m.impl("layer_forward", fastrnn::Bound<&fastrnn::forward_call, fastrnn::kCuda>::call);
  m.impl("layer_backward", fastrnn::Bound<&fastrnn::backward_call, fastrnn::kCuda>::call);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_chip",
        [](int compute, int multiprocessors, int shared) { emulate::chip() = {compute, multiprocessors, shared}; });
  m.def("set_seed", [](unsigned seed) { emulate::settings().seed = seed; });
  m.def("set_lost_block", [](int block, unsigned spin_limit) {
    emulate::settings().lost_block = block, emulate::settings().spin_limit = spin_limit;
  });
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
