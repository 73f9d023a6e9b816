// Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).
//
//   i, f, o = sigmoid(W_* x_t + b_* + U_* h_{t-1} + b'_*)
//   g       = tanh   (W_g x_t + b_g + U_g h_{t-1} + b'_g)
//   c_t     = f * c_{t-1} + i * g
//   h_t     = o * tanh(c_t)
//
// Gate order i, f, g, o, as in torch.nn.LSTM.
#pragma once

#include "cell.h"

namespace fastrnn {

struct Lstm {
  static constexpr int kGates = 4, kSecondGates = 0, kSaved = 4, kGrads = 4, kSavedOperand = -1;
  static constexpr int kInputGrad[4] = {0, 1, 2, 3}, kRecurrentGrad[4] = {0, 1, 2, 3};
  static constexpr bool kHasCell = true;

  template <class V>
  FASTRNN_HD static V forward(const V* x, const V* h, V /*h_prev*/, V& c, V* saved) {
    const V i = sigmoid(x[0] + h[0]);
    const V f = sigmoid(x[1] + h[1]);
    const V g = tanh(x[2] + h[2]);
    const V o = sigmoid(x[3] + h[3]);
    c = f * c + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    return o * tanh(c);
  }

  template <class V>
  FASTRNN_HD static void backward(const V* saved, V /*h_prev*/, V c_prev, V c, V dh, V& dc, V* grads, V& dh_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one = V(1);
    const V tanh_c = tanh(c);
    dc = dc + dh * o * (one - tanh_c * tanh_c);
    grads[0] = dc * g * i * (one - i);
    grads[1] = dc * c_prev * f * (one - f);
    grads[2] = dc * i * (one - g * g);
    grads[3] = dh * tanh_c * o * (one - o);
    dc = dc * f;
    dh_prev = V(0);
  }
};

}  // namespace fastrnn
