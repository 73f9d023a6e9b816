// Elman network (Elman 1990): h_t = f(W x_t + b + U h_{t-1} + b'), f = tanh or relu, as in torch.nn.RNN.
#pragma once

#include "cell.h"

namespace fastrnn {

struct Tanh {
  template <class V>
  FASTRNN_HD static V value(V x) {
    return tanh(x);
  }
  template <class V>
  FASTRNN_HD static V backward(V y, V dy) {
    return dy * (V(1) - y * y);
  }
};

struct Relu {
  template <class V>
  FASTRNN_HD static V value(V x) {
    return relu(x);
  }
  template <class V>
  FASTRNN_HD static V backward(V y, V dy) {
    return relu_backward(y, dy);
  }
};

template <class Activation>
struct Elman {
  static constexpr int kGates = 1, kSecondGates = 0, kSaved = 1, kGrads = 1, kSavedOperand = -1;
  static constexpr int kInputGrad[1] = {0}, kRecurrentGrad[1] = {0};
  static constexpr bool kHasCell = false;

  template <class V>
  FASTRNN_HD static V forward(const V* x, const V* h, V /*h_prev*/, V& /*c*/, V* saved) {
    saved[0] = Activation::value(x[0] + h[0]);
    return saved[0];
  }

  template <class V>
  FASTRNN_HD static void backward(const V* saved, V /*h_prev*/, V /*c_prev*/, V /*c*/, V dh, V& /*dc*/, V* grads,
                                  V& dh_prev) {
    grads[0] = Activation::backward(saved[0], dh);
    dh_prev = V(0);
  }
};

using ElmanTanh = Elman<Tanh>;
using ElmanRelu = Elman<Relu>;

}  // namespace fastrnn
