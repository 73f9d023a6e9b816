// The ops of a layer, as PyTorch's dispatcher knows them: their schemas, and how a backend takes part.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>

#include "calls.h"

namespace fastrnn {

// What every op of a layer is given, see Inputs. `weights` holds, for each of `directions`, w_ih, then w_hh if the cell
// has recurrent products, then a bias of each of these products or none, then w_hr if there is a projection, then w_own
// if the cell has unit weights: one list that is never empty, since an empty one does not survive AOTInductor. `masks`
// [D, T or 1, B, M*H] are those of a cell that has M of them.
#define FASTRNN_INPUTS                                                                                    \
  "Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, int directions, Tensor? lengths, Tensor? resets, " \
  "Tensor? masks, str cell"

// The arguments of a call on the dispatcher's stack, in the order of the schema, and in their place the results.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, c10::Stack* stack)
      : op_(op), stack_(*stack), first_(stack->size() - op.schema().arguments().size()), next_(first_) {}

  template <class Value>
  Value take() {
    return std::move(stack_[next_++]).to<Value>();
  }
  at::Tensor take_tensor();  // a TypeError if it is None
  Inputs take_inputs();

  template <class... Results>
  void give(Results&&... results) {
    stack_.resize(first_);
    (stack_.emplace_back(std::forward<Results>(results)), ...);
  }

 private:
  const c10::OperatorHandle& op_;
  c10::Stack& stack_;
  const size_t first_;
  size_t next_;
};

// layer_forward, layer_backward and explain.
void define_layer_ops(torch::Library& m);
// For the key of m. The backend must live for as long as the library.
void implement_layer_ops(torch::Library& m, const Backend& backend);

}  // namespace fastrnn
