#include "eager.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <array>
#include <vector>

#include "../cells.h"
#include "ops.h"
#include "plain.h"
#include "recorded.h"
#include "single_step.h"

namespace fastrnn {
namespace {

using at::Tensor;

// The tensors of a call, borrowed from Python; `ok` is false if one is not plain. `records` says whether gradients of
// one of them are to be recorded.
class Reader {
 public:
  bool ok = !at::impl::torch_function_mode_enabled(), records = false;

  OptionalTensor optional(PyObject* object) {
    if (object == Py_None) return {};
    return required(object);
  }

  Tensor required(PyObject* object) {
    if (!THPVariable_CheckTypeExact(Py_TYPE(object))) {
      ok = false;
      return {};
    }
    const Tensor& tensor = THPVariable_Unpack(object);
    ok = ok && is_plain(tensor);
    records = records || (records_ && tensor.requires_grad());
    return tensor;
  }

  std::vector<Tensor> weights(PyObject* tuple) {
    std::vector<Tensor> list;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) list.push_back(required(PyTuple_GET_ITEM(tuple, i)));
    return list;
  }

 private:
  const bool records_ = c10::GradMode::is_enabled();
};

std::array<Tensor, 4> inference(Inputs in, OptionalName rounded, const OptionalTensor& packed, bool is_step) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  RECORD_FUNCTION("fastrnn::packed_forward", std::vector<c10::IValue>({in.x, in.h0, in.c0}));
  in.x = as_sequence(in.x, is_step);
  for (OptionalTensor* state : {&in.h0, &in.c0})
    if (*state) *state = as_sequence(**state, is_step);
  const auto [y, h_n, c_n, fresh] = packed_forward_cpu(std::move(in), rounded, packed);
  return {from_sequence(y, is_step), from_sequence(h_n, is_step), from_sequence(c_n, is_step), fresh};
}

// Of a cell with layer normalization, recompute means another forward pass: fastrnn/autograd.py has that.
bool may_record(const Inputs& in, bool recompute) {
  const int cell = find_cell(in.cell);
  return cell >= 0 && !(recompute && cell_info(cell).is_normalized);
}

// eager_forward(cell, rounded, recompute, packed, x, h0, c0, weights, directions, lengths, resets) -> (y, h_n, c_n,
// packed), as fastrnn::packed_forward; all but packed without their first dimension if x [B, I] is a single step, which
// has neither lengths nor resets. Of a call that records gradients packed is None. None where the ops should be called
// the usual way: they say what is wrong, too.
PyObject* eager_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto is_name = [](PyObject* object) { return PyUnicode_Check(object); };
  if (count != 11 || !is_name(args[0]) || !(args[1] == Py_None || is_name(args[1])) || !PyBool_Check(args[2]) ||
      !PyTuple_Check(args[7]) || !PyLong_Check(args[8])) {
    PyErr_SetString(PyExc_TypeError,
                    "eager_forward: expected cell, rounded, recompute, packed, x, h0, c0, a tuple of weights, their "
                    "directions, lengths and resets");
    return nullptr;
  }
  HANDLE_TH_ERRORS
  Reader reader;
  Inputs in;
  in.cell = PyUnicode_AsUTF8(args[0]);
  const std::optional<c10::string_view> rounded =
      args[1] == Py_None ? std::optional<c10::string_view>() : PyUnicode_AsUTF8(args[1]);
  const OptionalTensor packed = reader.optional(args[3]);
  in.x = reader.required(args[4]), in.h0 = reader.optional(args[5]), in.c0 = reader.optional(args[6]);
  in.weights = reader.weights(args[7]), in.directions = PyLong_AsLong(args[8]);
  in.lengths = reader.optional(args[9]), in.resets = reader.optional(args[10]);
  if (!reader.ok || !in.x.defined() || in.x.numel() == 0) Py_RETURN_NONE;
  const bool is_step = in.x.dim() == 2;
  if (is_step && (in.directions != 1 || in.lengths || in.resets)) Py_RETURN_NONE;
  if (is_step && ((in.h0 && in.h0->dim() != 2) || (in.c0 && in.c0->dim() != 2))) Py_RETURN_NONE;
  if (reader.records && (rounded || !may_record(in, args[2] == Py_True))) Py_RETURN_NONE;
  std::array<Tensor, 4> outputs;
  try {
    const pybind11::gil_scoped_release no_gil;  // `in` stays: who lets go of a tensor of Python takes the GIL for it
    if (reader.records) {
      const auto [y, h_n, c_n] = recorded_forward(in, args[2] == Py_True, is_step);
      outputs = {y, h_n, c_n, Tensor()};
    } else {
      outputs = inference(in, rounded, packed, is_step);
    }
  } catch (const c10::Error&) {
    Py_RETURN_NONE;
  }
  PyObject* result = PyTuple_New(4);
  if (!result) return nullptr;
  for (int i = 0; i < 4; ++i) PyTuple_SET_ITEM(result, i, THPVariable_Wrap(outputs[i]));  // an undefined one: None
  return result;
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"eager_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager_forward)), METH_FASTCALL,
     "eager_forward(cell, rounded, recompute, packed, x, h0, c0, weights, directions, lengths, resets) -> "
     "(y, h_n, c_n, packed) or None; see csrc/torch/eager.cpp."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_eager_forward(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace fastrnn
