// Small kernels that run before the steps: weights into the order in which a product reads them, states and biases into
// the form in which the steps take them.
#pragma once

#include "exchange.h"
#include "rows.h"
#include "tile.h"

namespace fastrnn::cuda {

// Where a product's weight is: of gate g of a unit u, and k = vector * pitch + i with i below depth. Others are 0.
template <class S>
struct WeightView {
  const S* weights[2];  // by direction
  int units, gates;     // gates: product rows of a unit
  int64_t gate_stride, unit_stride;
  int depth, pitch;
  int64_t vector_stride, k_stride;

  __device__ __forceinline__ S at(int d, int u, int g, int k) const {
    const int vector = k / pitch, i = k % pitch;
    if (u >= units || i >= depth) return S{};
    const S* const from = d == 0 ? weights[0] : weights[1];
    return from[g * gate_stride + u * unit_stride + vector * vector_stride + i * k_stride];
  }
};

// packed [D, blocks of units that share their rows, ...], `size` weights of each; K numbers of a row. blockIdx.x counts
// pieces of `size`, y blocks or clusters of them, z directions.
template <class S, class Product>
__global__ void pack_weights(const WeightView<S> view, int K, int size, S* packed) {
  const size_t block = size_t(blockIdx.z) * gridDim.y + blockIdx.y;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < size; i += gridDim.x * kThreads) {
    const auto at = Product::packed_at(i);
    constexpr int kUnits = Product::Tile::kUnits * Product::kSplit;
    const int unit = at.row / view.gates, u = int(blockIdx.y) * kUnits + unit;
    const bool inside = unit < kUnits && at.k < K;  // rows may be padded to whole fragments
    packed[block * size + i] = inside ? Product::operand(view.at(blockIdx.z, u, at.row % view.gates, at.k)) : S{};
  }
}

template <class S>
struct ForwardStates {
  using A = Accumulator<S>;
  int D, B, H, P, Pp;
  int carried, gates, recurrent;  // K, G, R
  const S *h0, *c0;               // [D, B, P], [D, B, K, H], or null: zeros
  const S *b_ih[2], *b_hh[2];     // [G*H], [R*H], or null: zeros
  S *h_init, *h_n;                // [D, B, Pp], [D, B, P]
  A *c, *biases;                  // [D, B, K, H] or null; [D, (G+R)*H]
  S* c_n;                         // [D, B, K, H] or null
  uint32_t* status;               // becomes 0
};

template <class S>
__global__ void prepare_forward(const ForwardStates<S> p) {
  using A = Accumulator<S>;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = int64_t(gridDim.x) * kThreads;
  if (first == 0) *p.status = 0;
  for (int64_t i = first; i < int64_t(p.D) * p.B * p.Pp; i += stride) {
    const int64_t row = i / p.Pp, u = i % p.Pp;
    const S h = u < p.P && p.h0 ? p.h0[row * p.P + u] : S{};
    p.h_init[i] = number_without_sentinel(h);
    if (u < p.P) p.h_n[row * p.P + u] = h;
  }
  for (int64_t i = first; p.c && i < int64_t(p.D) * p.B * p.carried * p.H; i += stride) {
    p.c[i] = p.c0 ? widen(p.c0[i]) : A(0);
    p.c_n[i] = p.c0 ? p.c0[i] : S{};
  }
  const int64_t of_input = int64_t(p.gates) * p.H, all = int64_t(p.gates + p.recurrent) * p.H;
  for (int64_t i = first; i < p.D * all; i += stride) {
    const bool reverse = i >= all, second = i % all >= of_input;
    const S* const from = reverse ? (second ? p.b_hh[1] : p.b_ih[1]) : second ? p.b_hh[0] : p.b_ih[0];
    p.biases[i] = from ? widen(from[i % all - (second ? of_input : 0)]) : A(0);
  }
}

template <class S>
struct BackwardStates {
  using A = Accumulator<S>;
  int64_t outputs, cells;        // D*B*P, D*B*K*H
  const S *grad_h_n, *grad_c_n;  // [D, B, P], [D, B, K, H], or null: zeros
  A *carry, *dc;                 // [D, B, P]; [D, B, K, H] or null
  uint32_t* status;              // becomes 0
};

template <class S>
__global__ void prepare_backward(const BackwardStates<S> p) {
  using A = Accumulator<S>;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = int64_t(gridDim.x) * kThreads;
  if (first == 0) *p.status = 0;
  for (int64_t i = first; i < p.outputs; i += stride) p.carry[i] = p.grad_h_n ? widen(p.grad_h_n[i]) : A(0);
  for (int64_t i = first; p.dc && i < p.cells; i += stride) p.dc[i] = p.grad_c_n ? widen(p.grad_c_n[i]) : A(0);
}

}  // namespace fastrnn::cuda
