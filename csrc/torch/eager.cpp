#include "eager.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <array>
#include <vector>

#include "ops.h"

namespace fastrnn {
namespace {

using at::Tensor;

// Whether a call with this tensor would reach the CPU's kernel and nothing before it but autograd, which records
// nothing: no subclass, tracer, autocast, functorch transform, dispatch mode or forward-mode gradient.
bool is_plain(const Tensor& tensor, bool records) {
  using c10::DispatchKey;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet passed = c10::autograd_dispatch_keyset |
                                     c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                     c10::DispatchKeySet(DispatchKey::BackendSelect);
  const c10::DispatchKeySet keys = ((tensor.key_set() | local.included_) - local.excluded_) - passed;
  return keys == c10::DispatchKeySet(DispatchKey::CPU) && !(records && tensor.requires_grad()) &&
         !tensor._fw_grad(/*level=*/0).defined();
}

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
    ok = ok && is_plain(tensor, records_);
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

OptionalTensor as_sequence(const OptionalTensor& step) {
  return step ? OptionalTensor(step->unsqueeze(0)) : std::nullopt;
}

// eager_forward(cell, rounded, packed, x, h0, c0, weights, directions) -> (y, h_n, c_n, packed), as
// fastrnn::packed_forward without lengths and resets; all but packed without their first dimension if x [B, I] is a
// single step. None where that op should be called the usual way: it says what is wrong, too.
PyObject* eager_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const auto is_name = [](PyObject* object) { return PyUnicode_Check(object); };
  if (count != 8 || !is_name(args[0]) || !(args[1] == Py_None || is_name(args[1])) || !PyTuple_Check(args[6]) ||
      !PyLong_Check(args[7])) {
    PyErr_SetString(
        PyExc_TypeError,
        "eager_forward: expected cell, rounded, packed, x, h0, c0, a tuple of weights and their directions");
    return nullptr;
  }
  HANDLE_TH_ERRORS
  Reader reader;
  Inputs in;
  in.cell = PyUnicode_AsUTF8(args[0]);
  const std::optional<c10::string_view> rounded =
      args[1] == Py_None ? std::optional<c10::string_view>() : PyUnicode_AsUTF8(args[1]);
  const OptionalTensor packed = reader.optional(args[2]);
  in.x = reader.required(args[3]), in.h0 = reader.optional(args[4]), in.c0 = reader.optional(args[5]);
  in.weights = reader.weights(args[6]), in.directions = PyLong_AsLong(args[7]);
  if (!reader.ok || !in.x.defined() || in.x.numel() == 0) Py_RETURN_NONE;
  const bool is_step = in.x.dim() == 2;
  if (is_step && ((in.h0 && in.h0->dim() != 2) || (in.c0 && in.c0->dim() != 2))) Py_RETURN_NONE;
  std::array<Tensor, 4> outputs;
  try {
    const pybind11::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    RECORD_FUNCTION("fastrnn::packed_forward", std::vector<c10::IValue>({in.x, in.h0, in.c0}));
    Inputs now = in;  // `in` stays: whoever lets go of the last reference to a tensor of Python takes the GIL for it
    if (is_step) now.x = in.x.unsqueeze(0), now.h0 = as_sequence(in.h0), now.c0 = as_sequence(in.c0);
    std::tie(outputs[0], outputs[1], outputs[2], outputs[3]) = packed_forward_cpu(std::move(now), rounded, packed);
    for (int i = 0; is_step && i < 3; ++i)
      if (outputs[i].size(0) == 1) outputs[i] = outputs[i].squeeze(0);
  } catch (const c10::Error&) {
    Py_RETURN_NONE;
  }
  PyObject* result = PyTuple_New(4);
  if (!result) return nullptr;
  for (int i = 0; i < 4; ++i) PyTuple_SET_ITEM(result, i, THPVariable_Wrap(outputs[i]));
  return result;
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"eager_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager_forward)), METH_FASTCALL,
     "eager_forward(cell, rounded, packed, x, h0, c0, weights, directions) -> (y, h_n, c_n, packed) or None; see "
     "csrc/torch/eager.cpp."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_eager_forward(PyObject* module) { return PyModule_AddFunctions(module, kMethods) == 0; }

}  // namespace fastrnn
