#include "recorded.h"

#include <ATen/Functions.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"
#include "plain.h"

namespace fastrnn {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

// What is kept for the backward pass, in this order: x, h0, c0 and the weights; y, `saved` and `saved_c` of forward;
// lengths and resets.
constexpr size_t kStates = 3, kOfForward = 3, kRows = 2;

// What of a call is no tensor.
struct How {
  std::string cell;
  int64_t directions;
  bool recompute, is_step;

  c10::IValue pack() const { return c10::ivalue::Tuple::create({cell, directions, recompute, is_step}); }

  static How unpack(const c10::IValue& packed) {
    const auto& parts = packed.toTupleRef().elements();
    return {parts[0].toStringRef(), parts[1].toInt(), parts[2].toBool(), parts[3].toBool()};
  }
};

// What has no gradients.
struct Rows {
  OptionalTensor lengths, resets;
};

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

Inputs inputs_of(const How& how, const Rows& rows, at::TensorList read) {
  Inputs in;
  in.cell = how.cell, in.directions = how.directions, in.is_step = how.is_step;
  in.x = read[0], in.h0 = optional(read[1]), in.c0 = optional(read[2]);
  in.weights = read.slice(kStates).vec();
  in.lengths = rows.lengths, in.resets = rows.resets;
  return in;
}

// The gradients of `read`, those that are wanted, in Python. `kept` are y, what is saved, and the states of every step.
variable_list gradients_in_python(const How& how, const Rows& rows, at::TensorList read, const variable_list& grads,
                                  at::TensorList kept, const std::vector<bool>& wanted) {
  const pybind11::gil_scoped_acquire gil;
  const auto tuple_of = [](at::TensorList tensors) {
    pybind11::tuple found(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i)
      found[i] = tensors[i].defined() ? pybind11::cast(tensors[i]) : pybind11::none();
    return found;
  };
  const pybind11::tuple found =
      pybind11::module_::import("fastrnn.autograd")
          .attr("gradients_of_recorded")(how.cell, how.directions, how.recompute, how.is_step, rows.lengths,
                                         rows.resets, tuple_of(read), tuple_of(grads), tuple_of(kept), wanted);
  variable_list tensors(found.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    if (!found[i].is_none()) tensors[i] = found[i].cast<Tensor>();
  return tensors;
}

variable_list gradients_here(const How& how, const Rows& rows, at::TensorList read, const variable_list& grads,
                             at::TensorList kept, const std::vector<bool>& wanted) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  RECORD_FUNCTION("fastrnn::layer_backward", std::vector<c10::IValue>({grads[0], read[0]}));
  Saved saved;
  saved.grad_y = optional(grads[0]), saved.grad_h_n = optional(grads[1]), saved.grad_c_n = optional(grads[2]);
  saved.y = kept[0], saved.saved = kept[1], saved.saved_c = kept[2];
  c10::List<bool> flags;
  for (const bool want : wanted) flags.push_back(want);
  variable_list found = backward_cpu(inputs_of(how, rows, read), std::move(saved), flags);
  for (size_t i = 0; i < found.size(); ++i)
    if (!wanted[i]) found[i] = Tensor();
  return found;
}

struct RecordedLayer : torch::autograd::Function<RecordedLayer> {
  // `output` becomes y.
  static variable_list forward(torch::autograd::AutogradContext* ctx, const How& how, const Rows& rows, Tensor* output,
                               const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                               at::TensorList weights) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    RECORD_FUNCTION("fastrnn::layer_forward", std::vector<c10::IValue>({x, h0, c0}));
    variable_list read = {x, h0.value_or(Tensor()), c0.value_or(Tensor())};
    read.insert(read.end(), weights.begin(), weights.end());
    auto [y, h_n, c_n, saved, saved_c] = forward_cpu(inputs_of(how, rows, read), how.recompute);
    ctx->saved_data["how"] = how.pack();
    ctx->set_materialize_grads(false);
    read.insert(read.end(), {y, saved, saved_c});
    read.insert(read.end(), {rows.lengths.value_or(Tensor()), rows.resets.value_or(Tensor())});
    ctx->save_for_backward(std::move(read));
    *output = y;
    return {y, h_n, c_n};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const How how = How::unpack(ctx->saved_data["how"]);
    const variable_list all = ctx->get_saved_variables();
    const at::TensorList saved = all, read = saved.slice(0, all.size() - kOfForward - kRows);
    const at::TensorList kept = saved.slice(read.size(), kOfForward), last = saved.slice(all.size() - kRows);
    const Rows rows = {optional(last[0]), optional(last[1])};
    variable_list found(read.size());
    const auto is_defined = [](const Tensor& tensor) { return tensor.defined(); };
    if (std::any_of(grads.begin(), grads.end(), is_defined)) {
      std::vector<bool> wanted;
      size_t edge = 0;  // those that were not given have none
      for (const Tensor& tensor : read) wanted.push_back(tensor.defined() && ctx->needs_input_grad(edge++));
      const auto is_plain_here = [](const Tensor& tensor) { return !tensor.defined() || is_plain(tensor); };
      const bool is_plain_call = !c10::GradMode::is_enabled() &&
                                 std::all_of(grads.begin(), grads.end(), is_plain_here) &&
                                 std::all_of(all.begin(), all.end(), is_plain_here);
      found = (is_plain_call ? gradients_here : gradients_in_python)(how, rows, read, grads, kept, wanted);
    }
    found.insert(found.begin(), 3, Tensor());  // of `how`, `rows` and `output`
    return found;
  }
};

}  // namespace

std::array<Tensor, 3> recorded_forward(const Inputs& in, bool recompute) {
  const How how{in.cell, in.directions, recompute, in.is_step};
  const Rows rows{in.lengths, in.resets};
  Tensor y;
  try {
    const variable_list found = RecordedLayer::apply(how, rows, &y, in.x, in.h0, in.c0, at::TensorList(in.weights));
    return {found[0], found[1], found[2]};
  } catch (...) {
    // Something cannot be saved (an inference tensor, or a hook raises): y is in the list of what was to be, which its
    // node holds, and y holds the node.
    if (y.defined() && y.grad_fn())
      dynamic_cast<torch::autograd::CppNode<RecordedLayer>&>(*y.grad_fn()).ctx_.save_for_backward({});
    throw;
  }
}

}  // namespace fastrnn
