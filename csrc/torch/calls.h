// The two calls of a layer, for any backend: from tensors to the plain struct of layer.h, all checks, all outputs.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../layer.h"

namespace fastrnn {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalName = std::optional<c10::string_view>;

// What the caller gives. Every tensor is made dense; they are kept here for as long as the pointers are used.
struct Inputs {
  at::Tensor x;
  OptionalTensor h0, c0;
  std::vector<at::Tensor> weights;  // direction by direction, see schemas.h
  int64_t directions;
  OptionalTensor lengths, resets, masks;
  std::string cell;
  // x is [B, I], the states are [B, P] and [B, K*H], and so are outputs and gradients: those of one step, in one
  // direction, without lengths, resets and masks. The ops know sequences alone.
  bool is_step = false;
};

// What forward saved and the gradients of its outputs, likewise; y, saved and saved_c are there.
struct Saved {
  OptionalTensor grad_y, grad_h_n, grad_c_n, y, saved, saved_c, grad_saved_c, grad_values;
};

// How a device computes a layer. `options` are those of x; the arrays are on its device.
struct Backend {
  void (*forward)(const Layer& layer, const at::TensorOptions& options);
  void (*backward)(const Layer& layer, const LayerGrads& grads, const at::TensorOptions& options);
  // Which way a call with these sizes would go, and why. Sizes, cell and dtype of the layer are given, no arrays.
  std::string (*explain)(const Layer& layer, const at::TensorOptions& options, bool training);
};

void check(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& like,
           at::ScalarType dtype);

// Checks the weights, with layer.I given, and fills in what they determine. `like` tells device and dtype.
void add_weights(Layer& layer, Inputs& in, const at::Tensor& like);

// Checks everything and fills the struct but for its outputs.
Layer make_layer(Inputs& in);

// at::empty, in huge pages where it is large and in main memory: a fresh page costs about 1 us to touch, which for what
// a long sequence saves is more than the arithmetic.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

// y, h_n and c_n, and their addresses in `layer`. With `is_read_alone` nothing but a caller of a single step reads
// them: then y is h_n, and a cell without c has no c_n.
std::array<at::Tensor, 3> add_outputs(Layer& layer, const Inputs& in, bool is_read_alone);

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// y, h_n, c_n and, if `save`, what backward needs.
Outputs forward_call(const Backend& backend, Inputs in, bool save, bool recompute);

// Of x, h0, c0 and each of the weights, in that order; those that are not wanted have no elements. With `steps`
// LayerGrads::steps comes last.
std::vector<at::Tensor> backward_call(const Backend& backend, Inputs in, Saved saved, const c10::List<bool>& wanted,
                                      bool steps);

std::string explain_call(const Backend& backend, const at::Tensor& x, c10::string_view cell, int64_t H, int64_t P,
                         int64_t D, bool projected, bool training, OptionalName rounded);

}  // namespace fastrnn
