// What the structs of the cells stand on: the activations of a scalar lane, and the contract of a cell.
//
// A cell is one struct of pointwise maths, which fastrnn/codegen.py makes of its equation (generated.h), templated on
// the lane type V: float or double (one CUDA thread, plain C++) or a SIMD vector that overloads the same operators and
// activations. It knows nothing of time, batches, memory or threads.
//
// clang-format off
//   kGates          row blocks of w_ih [kGates*H, I], w_hh [kGates*H, P], b_ih and b_hh [kGates*H]
//   kSecondGates    how many of the last gates multiply `first(...)` instead of h_{t-1} by w_hh (0: one product per step)
//   kSaved          vectors of H that forward keeps for backward
//   kGrads          vectors of H that backward writes per step; kInputGrad[g] and kRecurrentGrad[g] say which of them is
//                   the gradient of gate g's input product and of its recurrent product. The input ones are vectors 0
//                   to kGates-1 in any order; the recurrent ones of the first gates lie side by side in the order of
//                   the gates.
//   kSavedOperand   which saved vector is the operand of the second product (-1: none)
//   kHasCell        whether there is a state c besides h
//   kReadsH         whether h_{t-1} is read by more than the products
// clang-format on
//
//   forward(x, h, h_prev, c, saved) -> h_t
//     x[g] = input product of gate g with b_ih, h[g] = recurrent product of gate g with b_hh,
//     c in: c_{t-1}, out: c_t, saved[kSaved] out
//   backward(saved, h_prev, c_prev, c, dh, dc, grads, dh_prev)
//     dh = dL/dh_t, dc in: dL/dc_t from later steps, out: dL/dc_{t-1}, grads[kGrads] out,
//     dh_prev out: the part of dL/dh_{t-1} that does not go through w_hh
//
// A cell with kSecondGates > 0 also has
//   first(x, h, h_prev, saved) -> operand of the second product, from the first kGates - kSecondGates gates;
//     forward then reads what first left in saved
//   backward_first(saved, h_prev, doperand, grads, dh_prev)
//     runs after backward; doperand = dL/d(operand); fills the rest of grads and adds to dh_prev
#pragma once

#include <math.h>

#include "../host_device.h"

namespace fastrnn {

// static: each file that includes this keeps its own copy, compiled with its own instruction set.
FASTRNN_HD static inline float tanh(float x) { return ::tanhf(x); }
FASTRNN_HD static inline double tanh(double x) { return ::tanh(x); }
FASTRNN_HD static inline float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
FASTRNN_HD static inline double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

// NaN stays NaN, as in torch.relu.
FASTRNN_HD static inline float relu(float x) { return x < 0.0f ? 0.0f : x; }
FASTRNN_HD static inline double relu(double x) { return x < 0.0 ? 0.0 : x; }

// dy times the derivative of relu, written with its output y. A choice, not a product: dy may be infinite. NaN lets dy
// through, as in torch.relu.
FASTRNN_HD static inline float relu_backward(float y, float dy) { return y <= 0.0f ? 0.0f : dy; }
FASTRNN_HD static inline double relu_backward(double y, double dy) { return y <= 0.0 ? 0.0 : dy; }

}  // namespace fastrnn
