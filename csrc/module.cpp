// fastrnn._C: what Python needs to know of the build. The ops themselves are registered with PyTorch in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <string>

#include "cells.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "eager.h"
#include "fork.h"
#include "precision.h"
#include "stream.h"

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
  for (const fastrnn::CellInfo& cell : fastrnn::kCells) {
    py::dict sizes;
    sizes["gates"] = cell.gates;
    sizes["saved"] = cell.saved;
    sizes["has_cell"] = cell.has_cell;
    all[cell.name] = sizes;
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
  for (int i = 0; i < int(std::size(fastrnn::kCells)); ++i)
    if (name == fastrnn::kCells[i].name) return i;
  throw py::value_error("cell: got '" + name + "'");
}

size_t packed_size(const std::string& cell, int dtype, const std::optional<std::string>& rounded, int64_t rows,
                   int64_t I, int64_t H, int64_t P, int D, bool projected) {
  fastrnn::Layer layer = {};
  layer.cell = cell_index(cell), layer.dtype = fastrnn::DType(dtype);
  layer.threads = 1, layer.T = rows, layer.B = 1;
  layer.I = I, layer.H = H, layer.P = P, layer.D = D, layer.projected = projected;
  layer.products = fastrnn::products_of(layer, rounded);
  return fastrnn::keeps_packs(layer) ? fastrnn::cpu::packed_size(layer) : 0;
}

// A layer of a stream from Python: addresses are integers, 0 for null; `weights` is w_ih, w_hh, b_ih, b_hh, w_hr.
fastrnn::Layer stream_layer(const std::string& cell, int dtype, const std::optional<std::string>& rounded, int64_t B,
                            int64_t I, int64_t H, int64_t P, int threads, const std::array<uintptr_t, 5>& weights,
                            uintptr_t h, uintptr_t c, uintptr_t y) {
  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  fastrnn::Layer layer = {};
  layer.cell = cell_index(cell);
  layer.dtype = fastrnn::DType(dtype);
  layer.threads = std::min(threads, fastrnn::cpu::available_cpus());
  layer.B = B, layer.I = I, layer.H = H, layer.P = P, layer.projected = weights[4] != 0;
  layer.products = fastrnn::products_of(layer, rounded);
  layer.weights[0] = {pointer(weights[0]), pointer(weights[1]), pointer(weights[2]), pointer(weights[3]),
                      pointer(weights[4])};
  layer.h_n = pointer(h), layer.c_n = pointer(c), layer.y = pointer(y);
  return layer;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fastrnn::cpu::isa_in_use();  // a wrong FASTRNN_CPU_ISA is an error at import
  m.def("build_info", &build_info,
        "How this extension was built and what it runs on: cuda, openmp, isas, isa, bfloat16_products, compiler.");
  m.def("cells", &cells, "Name -> sizes of every cell: gates, saved (vectors of H kept for backward), has_cell.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("threads"),
        "Measures FLOP/s of the multiply-add units with all operands in registers (about 0.1 s).");
  m.def("packed_size", &packed_size,
        "Bytes of packed weights by cell, dtype, rounded, rows (T*B), I, H, P, D, projected; 0 where none are kept.");
  m.def("leave_openmp_after_fork", &fastrnn::leave_openmp_after_fork, "See csrc/fork.h.");
  if (!fastrnn::add_eager_forward(m.ptr())) throw py::error_already_set();
  py::class_<fastrnn::Layer>(m, "StreamLayer").def(py::init(&stream_layer));
  py::class_<fastrnn::Stream>(m, "Stream", "See csrc/stream.h; fastrnn/stream.py checks what it is given.")
      .def(py::init<std::vector<fastrnn::Layer>>())
      .def(
          "step", [](fastrnn::Stream& stream, uintptr_t x) { stream.step(reinterpret_cast<const void*>(x)); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes", &fastrnn::Stream::bytes);
}
