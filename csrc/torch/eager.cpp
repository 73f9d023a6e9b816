#include "eager.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "../cells.h"
#include "ops.h"
#include "plain.h"
#include "recorded.h"
#include "single_step.h"

namespace fastrnn {
namespace {

using at::Tensor;

// The tensors of a call, borrowed from Python; `ok` is false if one is not plain.
class Reader {
 public:
  bool ok = !at::impl::torch_function_mode_enabled();

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
    return tensor;
  }

  template <typename Kind>  // Tensor or OptionalTensor
  std::vector<Kind> list(PyObject* tuple) {
    std::vector<Kind> list;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
      PyObject* const item = PyTuple_GET_ITEM(tuple, i);
      if constexpr (std::is_same_v<Kind, Tensor>)
        list.push_back(required(item));
      else
        list.push_back(optional(item));
    }
    return list;
  }
};

// A call of one or several layers: states and weights are those of all of them.
struct Call {
  Inputs in;
  OptionalName rounded;
  std::vector<OptionalTensor> packed;  // of each layer
  double dropout;                      // of what a layer hands to the next
  bool recompute, is_step;

  size_t layers() const { return packed.size(); }
};

struct Results {
  Tensor y;
  std::vector<Tensor> h_n, c_n, packed;  // of each layer
};

bool records_gradients(const Inputs& in) {
  const auto is_wanted = [](const Tensor& tensor) { return tensor.requires_grad(); };
  const auto may_be = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  return c10::GradMode::is_enabled() && (is_wanted(in.x) || may_be(in.h0) || may_be(in.c0) ||
                                         std::any_of(in.weights.begin(), in.weights.end(), is_wanted));
}

// Of a cell with layer normalization, recompute means another forward pass: fastrnn/autograd.py has that.
bool may_record(const Call& call) {
  const int cell = find_cell(call.in.cell);
  return !call.rounded && cell >= 0 && !(call.recompute && cell_info(cell).is_normalized);
}

OptionalTensor of_layer(const OptionalTensor& states, int64_t index, int64_t D, int64_t layers) {
  if (!states || layers == 1) return states;
  TORCH_CHECK(states->dim() == 3 && states->size(0) == layers * D, "hx: expected states of ", layers, " layers");
  return states->narrow(0, index * D, D);
}

Inputs of_layer(const Call& call, size_t index, const Tensor& x) {
  const Inputs& all = call.in;
  const size_t count = all.weights.size() / call.layers();
  TORCH_CHECK(count * call.layers() == all.weights.size(), "weights: expected as many of each layer");
  const auto begin = all.weights.begin() + index * count;
  const auto state = [&](const OptionalTensor& states) {
    return of_layer(states, index, all.directions, call.layers());
  };
  return {x,  state(all.h0), state(all.c0), {begin, begin + count}, all.directions, all.lengths, all.resets,
          {}, all.cell};
}

std::array<Tensor, 4> inference(Inputs in, OptionalName rounded, const OptionalTensor& packed, bool is_step) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  RECORD_FUNCTION("fastrnn::packed_forward", std::vector<c10::IValue>({in.x, in.h0, in.c0}));
  in.x = as_sequence(in.x, is_step);
  for (OptionalTensor* state : {&in.h0, &in.c0})
    if (*state) *state = as_sequence(**state, is_step);
  const auto [y, h_n, c_n, fresh] = packed_forward_cpu(std::move(in), rounded, packed);
  return {from_sequence(y, is_step), from_sequence(h_n, is_step), from_sequence(c_n, is_step), fresh};
}

Results run(const Call& call) {
  Results results;
  results.y = call.in.x;
  for (size_t index = 0; index < call.layers(); ++index) {
    if (index > 0 && call.dropout != 0) results.y = at::dropout(results.y, call.dropout, /*train=*/true);
    Inputs in = of_layer(call, index, results.y);
    Tensor h_n, c_n, packed;
    if (records_gradients(in)) {
      const auto found = recorded_forward(in, call.recompute, call.is_step);
      results.y = found[0], h_n = found[1], c_n = found[2];
    } else {
      const auto found = inference(std::move(in), call.rounded, call.packed[index], call.is_step);
      results.y = found[0], h_n = found[1], c_n = found[2], packed = found[3];
    }
    results.h_n.push_back(h_n), results.c_n.push_back(c_n), results.packed.push_back(packed);
  }
  return results;
}

Tensor together(const std::vector<Tensor>& states) { return states.size() == 1 ? states[0] : at::cat(states); }

PyObject* wrap(const Tensor& y, const Tensor& h_n, const Tensor& c_n, const std::vector<Tensor>& packed) {
  PyObject* const of_layers = PyTuple_New(Py_ssize_t(packed.size()));
  if (!of_layers) return nullptr;
  for (size_t i = 0; i < packed.size(); ++i)  // an undefined one: None
    PyTuple_SET_ITEM(of_layers, Py_ssize_t(i), THPVariable_Wrap(packed[i]));
  return Py_BuildValue("(NNNN)", THPVariable_Wrap(y), THPVariable_Wrap(h_n), THPVariable_Wrap(c_n), of_layers);
}

// eager_forward(cell, rounded, recompute, packed, x, h0, c0, weights, directions, dropout, lengths, resets) ->
// (y, h_n, c_n, packed): as many layers as `packed` has entries, one after another, each as fastrnn::packed_forward;
// y, h_n and c_n without their first dimension if x [B, I] is a single step of one layer, which has neither lengths nor
// resets. `dropout` is that of now, 0 if none is to be. Of a layer that records gradients packed is None. None where
// the ops should be called the usual way: they say what is wrong, too.
PyObject* eager_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto is_name = [](PyObject* object) { return PyUnicode_Check(object); };
  if (count != 12 || !is_name(args[0]) || !(args[1] == Py_None || is_name(args[1])) || !PyBool_Check(args[2]) ||
      !PyTuple_Check(args[3]) || PyTuple_GET_SIZE(args[3]) == 0 || !PyTuple_Check(args[7]) || !PyLong_Check(args[8]) ||
      !(PyFloat_Check(args[9]) || PyLong_Check(args[9]))) {
    PyErr_SetString(PyExc_TypeError,
                    "eager_forward: expected cell, rounded, recompute, a tuple of what is packed of each layer, x, h0, "
                    "c0, a tuple of weights, their directions, dropout, lengths and resets");
    return nullptr;
  }
  HANDLE_TH_ERRORS
  Reader reader;
  Call call;
  Inputs& in = call.in;
  in.cell = PyUnicode_AsUTF8(args[0]);
  if (args[1] != Py_None) call.rounded = PyUnicode_AsUTF8(args[1]);
  call.recompute = args[2] == Py_True, call.packed = reader.list<OptionalTensor>(args[3]);
  in.x = reader.required(args[4]), in.h0 = reader.optional(args[5]), in.c0 = reader.optional(args[6]);
  in.weights = reader.list<Tensor>(args[7]), in.directions = PyLong_AsLong(args[8]);
  call.dropout = PyFloat_AsDouble(args[9]);
  if (PyErr_Occurred()) return nullptr;  // an int that is too large
  in.lengths = reader.optional(args[10]), in.resets = reader.optional(args[11]);
  if (!reader.ok || !in.x.defined() || in.x.numel() == 0) Py_RETURN_NONE;
  call.is_step = in.x.dim() == 2;
  if (call.is_step && (call.layers() != 1 || in.directions != 1 || in.lengths || in.resets)) Py_RETURN_NONE;
  if (call.is_step && ((in.h0 && in.h0->dim() != 2) || (in.c0 && in.c0->dim() != 2))) Py_RETURN_NONE;
  if (records_gradients(in) && !may_record(call)) Py_RETURN_NONE;
  Results results;
  Tensor h_n, c_n;
  try {
    const pybind11::gil_scoped_release no_gil;  // `in` stays: who lets go of a tensor of Python takes the GIL for it
    results = run(call);
    h_n = together(results.h_n), c_n = together(results.c_n);
  } catch (const c10::Error&) {
    Py_RETURN_NONE;
  }
  return wrap(results.y, h_n, c_n, results.packed);
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"eager_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager_forward)), METH_FASTCALL,
     "eager_forward(cell, rounded, recompute, packed, x, h0, c0, weights, directions, dropout, lengths, resets) -> "
     "(y, h_n, c_n, packed) or None; see csrc/torch/eager.cpp."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_eager_forward(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace fastrnn
