// The ops of a layer, as PyTorch's dispatcher knows them: the one place of their schemas, and how a backend takes part.
#pragma once

#include <torch/library.h>

#include "calls.h"

namespace fastrnn {

// layer_forward: y [T, B, D*P], h_n [D, B, P], c_n [D, B, K*H], the K states besides h side by side (D = 0 for a cell
// without), and what backward needs (D = 0 unless save; with recompute saved is left out, and backward computes it
// again). `weights` holds, for each of `directions`, w_ih, then w_hh if the cell has recurrent products, then a bias of
// each of these products or none, then w_hr if there is a projection, then w_own if the cell has unit weights: one list
// that is never empty, since an empty one does not survive AOTInductor. `masks` [D, T or 1, B, M*H] are those of a cell
// that has M of them.
// layer_backward: the gradients of x, h0, c0 and each weight; `wanted` has as many flags, and what is not wanted comes
// back as a tensor without elements.
// explain: which way a layer's call would go and why, as a text. x: [T, B, I], of which only the sizes matter.
inline void define_layer_ops(torch::Library& m) {
  m.def(
      "layer_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, int directions, Tensor? lengths, "
      "Tensor? resets, Tensor? masks, str cell, bool save, bool recompute=False) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)");
  m.def(
      "layer_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, int directions, Tensor? lengths, Tensor? resets, Tensor? masks, Tensor y, Tensor saved, "
      "Tensor saved_c, str cell, bool[] wanted) -> Tensor[]");
  m.def("explain(Tensor x, str cell, int H, int P, int D, bool projected, bool training, str? rounded=None) -> str");
}

template <const Backend& backend>
void implement_layer_ops(torch::Library& m) {
  m.impl("layer_forward", Bound<&forward_call, backend>::call);
  m.impl("layer_backward", Bound<&backward_call, backend>::call);
  m.impl("explain", Bound<&explain_call, backend>::call);
}

}  // namespace fastrnn
