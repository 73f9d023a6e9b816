// fastrnn._C: what Python needs to know of the build. The ops themselves are registered with PyTorch in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cells.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["cuda"] = false;
  info["isas"] = fastrnn::cpu::available_isas();
  info["isa"] = fastrnn::cpu::isa_in_use();
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  fastrnn::cpu::isa_in_use();  // a wrong FASTRNN_CPU_ISA is an error at import
  m.def("build_info", &build_info, "How this extension was built and what it runs on: cuda, isas, isa, compiler.");
  m.def("cells", &cells, "Name -> sizes of every cell: gates, saved (vectors of H kept for backward), has_cell.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("threads"),
        "Measures FLOP/s of the multiply-add units with all operands in registers (about 0.1 s).");
}
