#include "eager.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../cells.h"
#include "ops.h"
#include "plain.h"
#include "recorded.h"

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

  std::vector<Tensor> list(PyObject* tuple) {
    std::vector<Tensor> list;
    list.reserve(PyTuple_GET_SIZE(tuple));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) list.push_back(required(PyTuple_GET_ITEM(tuple, i)));
    return list;
  }
};

// A reference to an object of Python that is let go in the end.
struct Reference {
  PyObject* const object;
  explicit Reference(PyObject* owned) : object(owned) {
    if (!object) throw python_error();
  }
  explicit Reference(Py_ssize_t number) : Reference(PyLong_FromSsize_t(number)) {}
  Reference(const Reference&) = delete;
  ~Reference() { Py_DECREF(object); }
};

// The packed weights that a module keeps: a dict of Python, by layer.
class Kept {
 public:
  explicit Kept(PyObject* dict) : dict_(dict) {}

  PyObject* borrow(Py_ssize_t layer) const {
    const Reference key(layer);
    PyObject* const found = PyDict_GetItemWithError(dict_, key.object);
    if (!found && PyErr_Occurred()) throw python_error();
    return found ? found : Py_None;
  }

  void keep(Py_ssize_t layer, const Tensor& packed) const {
    const Reference key(layer), value(THPVariable_Wrap(packed));
    if (PyDict_SetItem(dict_, key.object, value.object)) throw python_error();
  }

  void drop(Py_ssize_t layer) const {
    const Reference key(layer);
    if (PyDict_Contains(dict_, key.object) == 1 && PyDict_DelItem(dict_, key.object)) throw python_error();
  }

 private:
  PyObject* const dict_;
};

// A call of one or several layers: states and weights are those of all of them.
struct Call {
  Inputs in;
  std::vector<Tensor> carried;  // the states that are in.c0 together, if the cell has several
  OptionalName rounded;
  std::vector<OptionalTensor> packed;  // of each layer
  double dropout;                      // of what a layer hands to the next
  bool recompute;

  size_t layers() const { return packed.size(); }
};

// Of each layer, its final states, whether gradients are recorded, and weights that were packed anew.
struct LayerResults {
  Tensor h_n, c_n;
  bool is_recorded;
  Tensor packed;
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
  return !call.rounded && cell >= 0 && !(call.recompute && cell_info(cell).is_normalized());
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
          {}, all.cell,      all.is_step};
}

// y, and what is of the layer alone.
std::pair<Tensor, LayerResults> run_layer(const Call& call, size_t index, const Tensor& x) {
  Inputs in = of_layer(call, index, x);
  if (records_gradients(in)) {
    const auto [y, h_n, c_n] = recorded_forward(in, call.recompute);
    return {y, {h_n, c_n, true, {}}};
  }
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  RECORD_FUNCTION("fastrnn::packed_forward", std::vector<c10::IValue>({in.x, in.h0, in.c0}));
  const auto [y, h_n, c_n, packed] = packed_forward_cpu(std::move(in), call.rounded, call.packed[index]);
  return {y, {h_n, c_n, false, packed}};
}

// `y` is the input, and becomes the output.
void run_layers(const Call& call, Tensor& y, std::vector<LayerResults>& results) {
  for (size_t index = 0; index < call.layers(); ++index) {
    if (index > 0 && call.dropout != 0) y = at::dropout(y, call.dropout, /*train=*/true);
    auto [output, of_layer] = run_layer(call, index, y);
    y = std::move(output), results.push_back(std::move(of_layer));
  }
}

Tensor together(const std::vector<LayerResults>& layers, Tensor LayerResults::* state) {
  if (layers.empty()) return {};
  if (layers.size() == 1) return layers[0].*state;
  std::vector<Tensor> states;
  for (const LayerResults& layer : layers) states.push_back(layer.*state);
  return at::cat(states);
}

// eager_forward(cell, rounded, recompute, kept, layers, x, h0, c0, weights, directions, dropout, lengths, resets) ->
// (y, h_n, c_n): layers one after another, each as fastrnn::packed_forward; y, h_n and c_n without their first
// dimension if x [B, I] is a single step of one layer, which has neither lengths nor resets, and whose c_n is None if
// the cell has no c. c0 may be a tuple of its parts. `kept` holds the packed weights by layer: fresh ones are put
// there, those of a layer that records gradients dropped. `dropout` is that of now, 0 if none is to be. None, and
// nothing done, where the ops should be called the usual way: they say what is wrong, too.
PyObject* eager_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto is_name = [](PyObject* object) { return PyUnicode_Check(object); };
  if (count != 13 || !is_name(args[0]) || !(args[1] == Py_None || is_name(args[1])) || !PyBool_Check(args[2]) ||
      !PyDict_Check(args[3]) || !PyLong_Check(args[4]) || !PyTuple_Check(args[8]) || !PyLong_Check(args[9]) ||
      !(PyFloat_Check(args[10]) || PyLong_Check(args[10]))) {
    PyErr_SetString(PyExc_TypeError,
                    "eager_forward: expected cell, rounded, recompute, a dict of what is kept, layers, x, h0, c0, a "
                    "tuple of weights, their directions, dropout, lengths and resets");
    return nullptr;
  }
  HANDLE_TH_ERRORS
  Reader reader;
  Call call;
  Inputs& in = call.in;
  in.cell = PyUnicode_AsUTF8(args[0]);
  if (args[1] != Py_None) call.rounded = PyUnicode_AsUTF8(args[1]);
  call.recompute = args[2] == Py_True;
  const Kept kept(args[3]);
  const Py_ssize_t layers = PyLong_AsSsize_t(args[4]);
  in.x = reader.required(args[5]), in.h0 = reader.optional(args[6]);
  if (PyTuple_Check(args[7]))
    call.carried = reader.list(args[7]);
  else
    in.c0 = reader.optional(args[7]);
  in.weights = reader.list(args[8]), in.directions = PyLong_AsLong(args[9]);
  call.dropout = PyFloat_AsDouble(args[10]);
  if (PyErr_Occurred()) return nullptr;  // an int that is too large
  in.lengths = reader.optional(args[11]), in.resets = reader.optional(args[12]);
  if (!reader.ok || !in.x.defined() || in.x.numel() == 0 || layers < 1) Py_RETURN_NONE;
  if (size_t(layers) > in.weights.size()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < layers; ++i) call.packed.push_back(reader.optional(kept.borrow(i)));
  in.is_step = in.x.dim() == 2;
  if (in.is_step && (layers != 1 || in.directions != 1 || in.lengths || in.resets)) Py_RETURN_NONE;
  if (!reader.ok) Py_RETURN_NONE;
  Tensor y = in.x, h_n, c_n;
  std::vector<LayerResults> results;
  try {
    const pybind11::gil_scoped_release no_gil;  // `in` stays: who lets go of a tensor of Python takes the GIL for it
    if (!call.carried.empty()) in.c0 = at::cat(call.carried, -1);
    if (!records_gradients(in) || may_record(call)) run_layers(call, y, results);
    h_n = together(results, &LayerResults::h_n), c_n = together(results, &LayerResults::c_n);
  } catch (const c10::Error&) {
    Py_RETURN_NONE;
  }
  if (results.empty()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < layers; ++i) {
    if (results[i].is_recorded) kept.drop(i);
    if (results[i].packed.defined()) kept.keep(i, results[i].packed);
  }
  return Py_BuildValue("(NNN)", THPVariable_Wrap(y), THPVariable_Wrap(h_n), THPVariable_Wrap(c_n));
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"eager_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager_forward)), METH_FASTCALL,
     "eager_forward(cell, rounded, recompute, kept, layers, x, h0, c0, weights, directions, dropout, lengths, resets) "
     "-> (y, h_n, c_n) or None; see csrc/torch/eager.cpp."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_eager_forward(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace fastrnn
