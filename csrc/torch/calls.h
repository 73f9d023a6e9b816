// The two calls of a layer, for any backend: from tensors to the plain struct of layer.h, all checks, all outputs.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

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
void add_weights(Layer& layer, Inputs& in, c10::string_view cell, const at::Tensor& like);

// Checks everything and fills the struct but for its outputs.
Layer make_layer(Inputs& in, c10::string_view cell);

// at::empty, in huge pages where it is large and in main memory: a fresh page costs about 1 us to touch, which for what
// a long sequence saves is more than the arithmetic.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// y, h_n, c_n and, if `save`, what backward needs.
Outputs run_forward(const Backend& backend, Layer layer, const at::TensorOptions& options, bool save, bool recompute);

Outputs forward_call(const Backend& backend, const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                     at::TensorList weights, int64_t directions, const OptionalTensor& lengths,
                     const OptionalTensor& resets, const OptionalTensor& masks, c10::string_view cell, bool save,
                     bool recompute);

// Of x, h0, c0 and each of `weights`, in that order; those that are not wanted have no elements.
std::vector<at::Tensor> backward_call(const Backend& backend, const OptionalTensor& grad_y,
                                      const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                                      const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                      at::TensorList weights, int64_t directions, const OptionalTensor& lengths,
                                      const OptionalTensor& resets, const OptionalTensor& masks, const at::Tensor& y,
                                      const at::Tensor& saved, const at::Tensor& saved_c, c10::string_view cell,
                                      const c10::List<bool>& wanted);

std::string explain_call(const Backend& backend, const at::Tensor& x, c10::string_view cell, int64_t H, int64_t P,
                         int64_t D, bool projected, bool training, OptionalName rounded);

// A call with its backend, as the dispatcher wants it: Bound<&forward_call, kBackend>::call.
template <auto function, const Backend& backend>
struct Bound;
template <class Result, class... Args, Result (*function)(const Backend&, Args...), const Backend& backend>
struct Bound<function, backend> {
  static Result call(Args... args) { return function(backend, args...); }
};

}  // namespace fastrnn
