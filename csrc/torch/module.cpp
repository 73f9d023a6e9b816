// fastrnn._C: what Python needs to know of the build. The ops themselves are registered with PyTorch in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "../cells.h"
#include "../cpu/dispatch.h"
#include "../cpu/threads.h"
#include "../stream.h"
#include "cell_info.h"
#include "eager.h"
#include "fork.h"
#include "precision.h"
#ifdef FASTRNN_CUDA
#include "../cuda/recurrence.h"
#include "cuda.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#ifdef FASTRNN_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["isas"] = fastrnn::cpu::available_isas();
  info["isa"] = fastrnn::cpu::isa_in_use();
  info["bfloat16_products"] = fastrnn::cpu::has_bfloat16_products();
  info["compiler"] = __VERSION__;
  return info;
}

py::dict cells() {
  py::dict all;
  for (int i = 0; i < fastrnn::built_in_cells(); ++i) {
    const fastrnn::CellInfo& cell = fastrnn::cell_info(i);
    const auto list = [](const int* values, int count) { return std::vector<int>(values, values + count); };
    all[cell.name.c_str()] = py::dict(
        py::arg("gates") = cell.gates, py::arg("first_gates") = cell.first_gates,
        py::arg("second_gates") = cell.second_gates, py::arg("carried") = cell.carried,
        py::arg("unit_weights") = cell.unit_weights, py::arg("masks") = cell.masks, py::arg("saved") = cell.saved,
        py::arg("grads") = cell.grads, py::arg("saved_operand") = cell.saved_operand, py::arg("gains") = cell.gains,
        py::arg("is_normalized") = cell.is_normalized(), py::arg("input_grad") = list(cell.input_grad, cell.gates),
        py::arg("recurrent_grad") = list(cell.recurrent_grad, cell.recurrent_gates()),
        py::arg("unit_grad") = list(cell.unit_grad, cell.unit_weights));
  }
  return all;
}

double peak_flops(const std::string& dtype, int threads) {
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  py::gil_scoped_release release;
  return fastrnn::cpu::peak_flops(dtype == "float64" ? fastrnn::DType::kFloat64 : fastrnn::DType::kFloat32, threads);
}

int cell_index(const std::string& name) {
  const int found = fastrnn::find_cell(name);
  if (found < 0) throw py::value_error("cell: got '" + name + "'");
  return found;
}

// The variant that a dtype and an option `weights` stand for.
int variant(int dtype, const std::optional<std::string>& rounded) {
  return !rounded ? dtype : *rounded == "bf16" ? fastrnn::kBFloat16Weights : fastrnn::kInt8Products;
}

size_t packed_size(const std::string& cell, int dtype, const std::optional<std::string>& rounded, int64_t T, int64_t B,
                   int64_t I, int64_t H, int64_t P, int D, bool projected) {
  fastrnn::Layer layer = {};
  set_cell(layer, cell_index(cell)), layer.dtype = fastrnn::DType(dtype);
  layer.threads = 1, layer.T = T, layer.B = B;
  layer.I = I, layer.H = H, layer.P = P, layer.D = D, layer.projected = projected;
  layer.products = fastrnn::products_of(layer, rounded);
  return fastrnn::keeps_packs(layer) ? fastrnn::cpu::packed_size(layer) : 0;
}

// A layer of a stream from Python: addresses are integers, 0 for null; `weights` is w_ih, w_hh, b_ih, b_hh, w_hr,
// w_own.
fastrnn::Layer stream_layer(const std::string& cell, int dtype, const std::optional<std::string>& rounded, int64_t B,
                            int64_t I, int64_t H, int64_t P, int threads, const std::array<uintptr_t, 6>& weights,
                            uintptr_t h, uintptr_t c, uintptr_t y) {
  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  fastrnn::Layer layer = {};
  set_cell(layer, cell_index(cell));
  layer.dtype = fastrnn::DType(dtype);
  layer.threads = std::min(threads, fastrnn::cpu::available_cpus());
  layer.B = B, layer.I = I, layer.H = H, layer.P = P, layer.projected = weights[4] != 0;
  layer.products = fastrnn::products_of(layer, rounded);
  layer.weights[0] = {pointer(weights[0]), pointer(weights[1]), pointer(weights[2]),
                      pointer(weights[3]), pointer(weights[4]), pointer(weights[5])};
  layer.h_n = pointer(h), layer.c_n = pointer(c), layer.y = pointer(y);
  return layer;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fastrnn::cpu::isa_in_use();  // a wrong FASTRNN_CPU_ISA is an error at import
  m.def("build_info", &build_info,
        "How this extension was built and what it runs on: cuda, openmp, isas, isa, bfloat16_products, compiler.");
  m.def("cells", &cells, "Name -> some of codegen.description() of every built-in cell.");
  m.def(
      "add_cell",
      [](const std::string& name, const py::dict& sizes) { fastrnn::add_cell(fastrnn::cell_info_of(name, sizes)); },
      "Adds a cell by its name and codegen.description().");
  m.def(
      "has_kernels",
      [](const std::string& cell, int dtype, const std::optional<std::string>& rounded) {
        return fastrnn::cpu::has_kernels(cell_index(cell), variant(dtype, rounded));
      },
      "Whether this process has the CPU kernels of a cell, by cell, dtype, rounded.");
  m.def("variant", &variant, "What FASTRNN_ONLY_VARIANT is (csrc/cells/lookup.h), by dtype, rounded.");
  m.def(
      "load_kernels",
      [](const std::string& cell, int dtype, const std::optional<std::string>& rounded, const std::string& path) {
        fastrnn::cpu::load_kernels(cell_index(cell), variant(dtype, rounded), path);
      },
      "Adds the kernels of a library of one cell and variant, by cell, dtype, rounded, path.");
#ifdef FASTRNN_CUDA
  m.def(
      "cuda_variant", [](int dtype) { return fastrnn::cuda_variant(fastrnn::DType(dtype)); },
      "What FASTRNN_ONLY_VARIANT is for kernels of the GPU (csrc/cuda/kernels.h), as torch's flags are now, by dtype.");
  m.def(
      "has_cuda_kernels",
      [](const std::string& cell, int variant) { return fastrnn::cuda::has_kernels(cell_index(cell), variant); },
      "Whether this process has the GPU's kernels of a cell, by cell, cuda_variant.");
  m.def(
      "load_cuda_kernels",
      [](const std::string& cell, int variant, const std::string& path) {
        fastrnn::cuda::load_kernels(cell_index(cell), variant, path);
      },
      "Adds the GPU's kernels of a library of one cell, by cell, cuda_variant, path.");
#endif
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("threads"),
        "Measures FLOP/s of the multiply-add units with all operands in registers (about 0.1 s).");
  m.def("packed_size", &packed_size,
        "Bytes of packed weights by cell, dtype, rounded, T, B, I, H, P, D, projected; 0 where none are kept.");
  m.def("leave_openmp_after_fork", &fastrnn::leave_openmp_after_fork, "See csrc/torch/fork.h.");
  if (!fastrnn::add_eager_forward(m.ptr())) throw py::error_already_set();
  py::class_<fastrnn::Layer>(m, "StreamLayer").def(py::init(&stream_layer));
  py::class_<fastrnn::Stream>(m, "Stream", "See csrc/stream.h; fastrnn/stream.py checks what it is given.")
      .def(py::init<std::vector<fastrnn::Layer>>())
      .def(
          "step", [](fastrnn::Stream& stream, uintptr_t x) { stream.step(reinterpret_cast<const void*>(x)); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes", &fastrnn::Stream::bytes);
}
