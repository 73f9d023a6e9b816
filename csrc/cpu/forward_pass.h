// A forward pass but for what a cell computes in a step: what is the same for every cell.
#pragma once

#include "forward_plan.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// One direction of a range of rows: their states, and the products that need no cell.
template <class S, class E, class W>
class ForwardRange {
 public:
  using Plan = ForwardPlan<S, E, W>;
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;

  ForwardRange(const Plan& plan, RowRange rows, typename Plan::Scratch scratch, Share share);

 protected:
  bool active(int64_t t, int64_t r) const { return row_is_active(p, t, rows.b0 + r); }

  // [S, H] of a row at a time, if they are kept.
  S* saved_row(int64_t t, int64_t r) const {
    return as<S>(p.saved) + ((rows.d * p.T + t) * p.B + rows.b0 + r) * (plan.cell.saved + p.projected) * p.H;
  }

  void load_states();
  void store_states();
  void restart_rows(int64_t t);

  // gates = x W_ih^T + b_ih for `count` steps from step s on, in the order of the steps. A team shares the steps, or if
  // there are fewer than threads the columns.
  void project_inputs(int64_t s, int64_t count);

  // h_next = hidden W_hr^T, this thread's part of it.
  void project_outputs();

  // Writes this thread's part of y_t and makes h_next the state.
  void emit(int64_t t);

  // out [n, gates*H] = bias + a W^T for this thread's units of the gates from `gate` on, W [G*H, K] unpacked.
  void multiply_gates(int gate, int gates, int64_t n, const E* a, int64_t lda, int64_t K, const void* weight,
                      const void* bias, T* out, int64_t ldo);

  // What a product reads of `count` rows of a.
  template <class A>
  auto operand(const A* a, int64_t lda, int64_t count, int64_t K) const {
    if constexpr (kIsInt8<W>) {
      const int64_t rows_before = share.worker * larger(rows.n, kBlockM);
      int8_t* const quantized = own.quantized + rows_before * plan.Qp;
      quantize_rows(a, lda, count, K, quantized, plan.Qp, own.quanta + rows_before);
      return Operand<int8_t>{{quantized, plan.Qp, own.quanta + rows_before}};
    } else {
      return rows_of(a, lda);
    }
  }

  const Layer& p;
  const Plan& plan;
  const RowRange rows;
  const typename Plan::Packed& w;
  const Weights& given;
  const Share share;
  int64_t begin, end;          // this thread's units
  typename Plan::Scratch own;  // of this thread, or of the team

 private:
  int64_t state_row(int64_t r) const { return rows.d * p.B + rows.b0 + r; }
  T* c_at(int64_t r, int64_t k) const { return own.c + (r * plan.cell.carried + k) * plan.Hp; }
  void gather_inputs(int64_t s, int64_t from, int64_t to);
  void project_unpacked(int64_t s, int64_t count);
  void save_nothing(int64_t t, int64_t r);
  template <class A>
  void multiply(int64_t M, int64_t N, int64_t K, const A* a, int64_t lda, const W* packed, const T* bias, T* out,
                int64_t ldo);
};

// From the first step to the last: what a cell adds.
template <class S, class E, class W>
using WalkForward = void (*)(const ForwardPlan<S, E, W>& plan, RowRange rows,
                             typename ForwardPlan<S, E, W>::Scratch scratch, Share share);

template <class S, class E, class W>
void run_forward(const CellSizes& cell, WalkForward<S, E, W> walk, const Layer& layer, void* workspace);

// The bytes of its workspace.
template <class S, class E, class W>
size_t measure_forward(const CellSizes& cell, const Layer& layer);

// Packs the weights into `to`, or over null only measures; returns the bytes that they take.
template <class S, class E, class W>
size_t pack_forward(const CellSizes& cell, const Layer& layer, void* to);

}  // namespace fastrnn::cpu::FASTRNN_ISA
