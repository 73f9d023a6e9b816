#include "schemas.h"

#include <memory>
#include <tuple>
#include <vector>

namespace fastrnn {
namespace {

using at::Tensor;

void forward_op(const Backend& backend, Arguments& arguments) {
  Inputs inputs = arguments.take_inputs();
  const bool save = arguments.take<bool>(), recompute = arguments.take<bool>();
  std::apply([&](auto&&... results) { arguments.give(std::move(results)...); },
             forward_call(backend, std::move(inputs), save, recompute));
}

void backward_op(const Backend& backend, Arguments& arguments) {
  Saved saved;
  for (OptionalTensor* grad : {&saved.grad_y, &saved.grad_h_n, &saved.grad_c_n})
    *grad = arguments.take<OptionalTensor>();
  Inputs inputs = arguments.take_inputs();
  for (OptionalTensor* kept : {&saved.y, &saved.saved, &saved.saved_c}) *kept = arguments.take_tensor();
  const auto wanted = arguments.take<c10::List<bool>>();
  saved.grad_saved_c = arguments.take<OptionalTensor>();
  const bool steps = arguments.take<bool>();
  saved.grad_values = arguments.take<OptionalTensor>();
  arguments.give(backward_call(backend, std::move(inputs), std::move(saved), wanted, steps));
}

void explain_op(const Backend& backend, Arguments& arguments) {
  const Tensor x = arguments.take_tensor();
  const std::string cell = arguments.take<std::string>();
  const int64_t H = arguments.take<int64_t>(), P = arguments.take<int64_t>(), D = arguments.take<int64_t>();
  const bool projected = arguments.take<bool>(), training = arguments.take<bool>();
  const auto rounded = arguments.take<std::optional<std::string>>();
  arguments.give(explain_call(backend, x, cell, H, P, D, projected, training, rounded));
}

// An op with a backend, as the dispatcher wants it.
class Kernel : public c10::OperatorKernel {
 public:
  using Op = void(const Backend&, Arguments&);
  Kernel(Op* op, const Backend& backend) : op_(op), backend_(backend) {}

  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet, c10::Stack* stack) {
    Arguments arguments(handle, stack);
    op_(backend_, arguments);
  }

 private:
  Op* const op_;
  const Backend& backend_;
};

}  // namespace

Tensor Arguments::take_tensor() {
  const size_t index = next_ - first_;
  Tensor tensor = take<Tensor>();
  TORCH_CHECK_TYPE(tensor.defined(), op_.schema().arguments()[index].name(), ": expected a tensor, got None");
  return tensor;
}

Inputs Arguments::take_inputs() {
  Inputs in;
  in.x = take_tensor(), in.h0 = take<OptionalTensor>(), in.c0 = take<OptionalTensor>();
  in.weights = take<std::vector<Tensor>>(), in.directions = take<int64_t>();
  in.lengths = take<OptionalTensor>(), in.resets = take<OptionalTensor>(), in.masks = take<OptionalTensor>();
  in.cell = take<std::string>();
  return in;
}

// layer_forward: y [T, B, D*P], h_n [D, B, P], c_n [D, B, K*H], the K states besides h side by side (D = 0 for a cell
// without), and what backward needs (D = 0 unless save; with recompute saved is left out, and backward computes it
// again).
// layer_backward: the gradients of x, h0, c0 and each weight; `wanted` has as many flags, and what is not wanted comes
// back as a tensor without elements. grad_saved_c is of saved_c as an output of its own, the states of every step. With
// `steps` the gate gradients of every step come, too, [D, T, B, J, H]; grad_values, of the same shape, is added to them
// as the steps go: the gradients of what each gate, unit weight and mask is in each step.
// explain: which way a layer's call would go and why, as a text. x: [T, B, I], of which only the sizes matter.
void define_layer_ops(torch::Library& m) {
  m.def("layer_forward(" FASTRNN_INPUTS
        ", bool save, bool recompute=False) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)");
  m.def("layer_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, " FASTRNN_INPUTS
        ", Tensor y, Tensor saved, Tensor saved_c, bool[] wanted, Tensor? grad_saved_c=None, bool steps=False, "
        "Tensor? grad_values=None) -> "
        "Tensor[]");
  m.def("explain(Tensor x, str cell, int H, int P, int D, bool projected, bool training, str? rounded=None) -> str");
}

void implement_layer_ops(torch::Library& m, const Backend& backend) {
  const std::pair<const char*, Kernel::Op*> ops[] = {
      {"layer_forward", forward_op}, {"layer_backward", backward_op}, {"explain", explain_op}};
  for (const auto& [name, op] : ops)
    m.impl(name, torch::CppFunction::makeFromBoxedKernel(
                     c10::BoxedKernel::makeFromFunctor(std::make_unique<Kernel>(op, backend))));
}

}  // namespace fastrnn
