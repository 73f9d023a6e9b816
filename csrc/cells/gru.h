// Gated recurrent unit (Cho et al. 2014) in both of its forms.
//
//   r, z = sigmoid(W_* x_t + b_* + U_* h_{t-1} + b'_*)
//   reset after  (Gru, torch.nn.GRU):          n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + b'_n))
//   reset before (GruResetBefore, the paper):  n = tanh(W_n x_t + b_n + U_n (r * h_{t-1}) + b'_n)
//   h_t  = (1 - z) * n + z * h_{t-1}
//
// Gate order r, z, n, as in torch.nn.GRU.
#pragma once

#include "cell.h"

namespace fastrnn {

struct Gru {
  // Gate n has two gradients, since r stands between its two products. The recurrent ones (r, z, n) lie side by side.
  static constexpr int kGates = 3, kSecondGates = 0, kSaved = 4, kGrads = 4, kSavedOperand = -1;
  static constexpr int kInputGrad[3] = {1, 2, 0}, kRecurrentGrad[3] = {1, 2, 3};
  static constexpr bool kHasCell = false;

  template <class V>
  FASTRNN_HD static V forward(const V* x, const V* h, V h_prev, V& /*c*/, V* saved) {
    const V r = sigmoid(x[0] + h[0]);
    const V z = sigmoid(x[1] + h[1]);
    const V n = tanh(x[2] + r * h[2]);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = h[2];
    return n + z * (h_prev - n);
  }

  template <class V>
  FASTRNN_HD static void backward(const V* saved, V h_prev, V /*c_prev*/, V /*c*/, V dh, V& /*dc*/, V* grads,
                                  V& dh_prev) {
    const V r = saved[0], z = saved[1], n = saved[2], u = saved[3], one = V(1);
    const V dn = dh * (one - z) * (one - n * n);
    grads[0] = dn;
    grads[1] = dn * u * r * (one - r);
    grads[2] = dh * (h_prev - n) * z * (one - z);
    grads[3] = dn * r;
    dh_prev = dh * z;
  }
};

struct GruResetBefore {
  static constexpr int kGates = 3, kSecondGates = 1, kSaved = 4, kGrads = 3, kSavedOperand = 3;
  static constexpr int kInputGrad[3] = {0, 1, 2}, kRecurrentGrad[3] = {0, 1, 2};
  static constexpr bool kHasCell = false;

  template <class V>
  FASTRNN_HD static V first(const V* x, const V* h, V h_prev, V* saved) {
    saved[0] = sigmoid(x[0] + h[0]);
    saved[1] = sigmoid(x[1] + h[1]);
    saved[3] = saved[0] * h_prev;
    return saved[3];
  }

  template <class V>
  FASTRNN_HD static V forward(const V* x, const V* h, V h_prev, V& /*c*/, V* saved) {
    const V z = saved[1];
    const V n = tanh(x[2] + h[2]);
    saved[2] = n;
    return n + z * (h_prev - n);
  }

  template <class V>
  FASTRNN_HD static void backward(const V* saved, V h_prev, V /*c_prev*/, V /*c*/, V dh, V& /*dc*/, V* grads,
                                  V& dh_prev) {
    const V z = saved[1], n = saved[2], one = V(1);
    grads[1] = dh * (h_prev - n) * z * (one - z);
    grads[2] = dh * (one - z) * (one - n * n);
    dh_prev = dh * z;
  }

  template <class V>
  FASTRNN_HD static void backward_first(const V* saved, V h_prev, V doperand, V* grads, V& dh_prev) {
    const V r = saved[0], one = V(1);
    grads[0] = doperand * h_prev * r * (one - r);
    dh_prev = dh_prev + doperand * r;
  }
};

}  // namespace fastrnn
