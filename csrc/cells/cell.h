// What the structs of the cells stand on: the activations of a scalar lane, and the contract of a cell.
//
// A cell is one struct of pointwise maths, which fastrnn/codegen.py makes of its equation (generated.h), templated on
// the lane type V: float or double (one CUDA thread, plain C++) or a SIMD vector that overloads the same operators and
// activations. It knows nothing of time, batches, memory or threads.
//
// clang-format off
//   kGates          how many gates have a product of the input: the row blocks of w_ih [kGates*H, I] and b_ih
//                   [kGates*H], in the order of the equation's gates
//   kFirstGates     how many gates have a recurrent product of h_{t-1}, and
//   kSecondGates    of first(...) instead (0: one product per step). They are the row blocks of w_hh [R*H, P] and b_hh
//                   [R*H], R = kFirstGates + kSecondGates, in this order, which is that of the gates. R = 0: no w_hh
//   kCarried        K, the states besides h: c [K]
//   kUnitWeights    parameters with one number per unit, the rows of w_own [kUnitWeights, H]
//   kGains          G + R where products have layer normalization, else 0: the rows of w_own after those of the unit
//                   weights; kInputGroup[kGates] and kRecurrentGroup[R] say which gates' are normalized together
//   kMasks          what is given per row and unit, without gradients
//   kSaved          vectors of H that forward keeps for backward: the cell's own, then kGains products as they were
//   kGrads          vectors of H that backward writes per step; kInputGrad[kGates], kRecurrentGrad[R] and kUnitGrad
//                   [kUnitWeights] say which of them is the gradient of an input product, of a recurrent product, and
//                   what a row adds to that of a unit weight. The input ones are vectors 0 to kGates-1 in any order;
//                   the recurrent ones lie side by side in their order.
//   kSavedOperand   which saved vector is the operand of the second product (-1: none)
//   kNormalizes     whether there is a second phase for the layer normalization of what first(...) returns, which the
//                   cell is then given last, in given[kUnitWeights + kMasks]. kNormalizedGrad: which of kGrads is the
//                   gradient of it; kOperandState: which state besides h it was made of (-1: saved[kSavedOperand])
//   kReadsH         whether h_{t-1} is read by more than the products
// clang-format on
//
//   forward(x, h, h_prev, given, c, saved) -> h_t
//     x[kGates] = input products with b_ih, h[R] = recurrent products with b_hh,
//     given[kUnitWeights + kMasks] = the unit weights, then the masks,
//     c[K] in: the other states before the step, out: after it, saved[kSaved] out
//   backward(saved, h_prev, given, c_prev, c, dh, dcarried, grads, dh_prev)
//     dh = dL/dh_t, dcarried[K] in: the gradients of c after the step, from later steps, out: those of c_prev,
//     grads[kGrads] out, dh_prev out: the part of dL/dh_{t-1} that does not go through w_hh
//
// A cell with kSecondGates > 0 or kNormalizes also has
//   first(x, h, h_prev, given, c_prev, saved) -> operand of the second product, from the first products;
//     forward then reads what first left in saved
//   backward_first(saved, h_prev, given, c_prev, c, doperand, dcarried, grads, dh_prev)
//     runs after backward; doperand = dL/d(operand); fills the rest of grads and adds to dcarried and dh_prev
#pragma once

#include <math.h>

#include "../host_device.h"

namespace fastrnn {

// static: each file that includes this keeps its own copy, compiled with its own instruction set.
FASTRNN_HD static inline float tanh(float x) { return ::tanhf(x); }
FASTRNN_HD static inline double tanh(double x) { return ::tanh(x); }
FASTRNN_HD static inline float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
FASTRNN_HD static inline double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FASTRNN_HD static inline float exp(float x) { return ::expf(x); }
FASTRNN_HD static inline double exp(double x) { return ::exp(x); }

// log(sigmoid(x)), finite wherever x is.
FASTRNN_HD static inline float logsigmoid(float x) { return (x < 0.0f ? x : 0.0f) - ::log1pf(::expf(-::fabsf(x))); }
FASTRNN_HD static inline double logsigmoid(double x) { return (x < 0.0 ? x : 0.0) - ::log1p(::exp(-::fabs(x))); }

// NaN stays NaN, as in torch.relu.
FASTRNN_HD static inline float relu(float x) { return x < 0.0f ? 0.0f : x; }
FASTRNN_HD static inline double relu(double x) { return x < 0.0 ? 0.0 : x; }

// dy times the derivative of relu, written with its output y. A choice, not a product: dy may be infinite. NaN lets dy
// through, as in torch.relu.
FASTRNN_HD static inline float relu_backward(float y, float dy) { return y <= 0.0f ? 0.0f : dy; }
FASTRNN_HD static inline double relu_backward(double y, double dy) { return y <= 0.0 ? 0.0 : dy; }

// 1 above 0, 0 up to it; NaN stays NaN. Its derivative is 0.
FASTRNN_HD static inline float step(float x) { return x > 0.0f ? 1.0f : x <= 0.0f ? 0.0f : x; }
FASTRNN_HD static inline double step(double x) { return x > 0.0 ? 1.0 : x <= 0.0 ? 0.0 : x; }

// The larger one; NaN if either is, as in torch.maximum.
FASTRNN_HD static inline float maximum(float a, float b) { return a > b || a != a ? a : b; }
FASTRNN_HD static inline double maximum(double a, double b) { return a > b || a != a ? a : b; }

// dL/da of m = maximum(a, b), dm = dL/dm: half of it where both are equal, as in torch.maximum.
FASTRNN_HD static inline float maximum_backward(float a, float b, float dm) {
  return a > b ? dm : a == b ? 0.5f * dm : 0.0f;
}
FASTRNN_HD static inline double maximum_backward(double a, double b, double dm) {
  return a > b ? dm : a == b ? 0.5 * dm : 0.0;
}

}  // namespace fastrnn
