// A backward pass but for what a cell computes in a step: what is the same for every cell.
#pragma once

#include "backward_plan.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// One direction of a range of rows, from the last step of a chunk to its first: the gradients of states, and the
// products that carry them on. A thread of a team does its own units, and of the products that give outputs its own
// outputs; without a projection these are the same.
template <class S, class E>
class BackwardRange {
 public:
  using Plan = BackwardPlan<S, E>;
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;

  // `panel` is this thread's.
  BackwardRange(const Plan& plan, RowRange rows, Chunk chunk, Share share, E* panel);

 protected:
  // dh of step s and of the one before it.
  void choose_states(int64_t s) {
    dh = w.dh[s & 1] + rows.b0 * plan.Pp;
    dh_prev = w.dh[~s & 1] + rows.b0 * plan.Pp;
  }

  int64_t time_row(int64_t t, int64_t r) const { return t * p.B + rows.b0 + r; }
  bool active(int64_t t, int64_t r) const { return row_is_active(p, t, rows.b0 + r); }
  int64_t chunk_row(int64_t t, int64_t r) const { return time_row(t, r) - chunk.first_row(p, rows.d); }
  T* dc_at(int64_t r, int64_t k) const { return dc + (r * plan.cell.carried + k) * plan.Hp; }
  E* gate_grads(int64_t t, int64_t r) const { return gates + chunk_row(t, r) * plan.Gp; }
  Norm<T>* norms(int64_t t, int64_t r) const { return w.norms + chunk_row(t, r) * plan.cell.gains; }
  const S* saved_row(int64_t t, int64_t r) const { return plan.saved(rows.d, chunk, time_row(t, r)); }

  void load_state_grads();
  void store_state_grads();

  // Of y, and of the carried states of every step.
  void add_output_grads(int64_t t);

  // dunits = dL/d(hidden before the projection); keeps dL/dh_t for the gradient of w_hr.
  void unproject(int64_t t);

  // dunits = dL/d(operand of the second product).
  void second_product(int64_t t);

  // A finished row: no gate gradients, dh as it was.
  void pass_on(int64_t t, int64_t r);

  // Of the second gates when their product is due, of the others when the step is done with them.
  void add_value_grads(int64_t t, bool is_second);

  // dh of the step before, from all gates.
  void carry_on(int64_t t);

  void cut_restarted_rows(int64_t t);

  const Layer& p;
  const Plan& plan;
  const RowRange rows;
  const typename Plan::Direction& w;
  E* const gates;  // [chunk*B, Gp]
  const Chunk chunk;
  const Share share;
  E* const panel;
  T *dh, *dh_prev;             // [n, Pp] of the step at hand, of the one before it
  T *const dc, *const dunits;  // [n, K, Hp], [n, Hp]
  int64_t begin, end;          // this thread's units
  int64_t out_begin, out_end;  // this thread's outputs

 private:
  int64_t state_row(int64_t r) const { return rows.d * p.B + rows.b0 + r; }
  void product(int64_t from, int64_t to, int64_t depth, Operand<E> a, const E* packed, WeightRows<S> stored,
               Init<T> init, T* out, int64_t pitch) const;
};

// What a cell adds.
template <class S, class E>
struct BackwardOfCell {
  // One direction of a range of rows, through a chunk.
  void (*walk)(const BackwardPlan<S, E>& plan, RowRange rows, Chunk chunk, Share share, E* panel);
  // A task of a chunk's gates that forward has not kept; null of cells that keep all or nothing.
  void (*recompute)(const RecomputePlan<S>& plan, Chunk chunk, int task, const typename RecomputePlan<S>::Scratch& own);
};

template <class S, class E>
void run_backward(const CellSizes& cell, BackwardOfCell<S, E> of_cell, const Layer& layer, const LayerGrads& grads,
                  void* workspace);

// The bytes of its workspace.
template <class S, class E>
size_t measure_backward(const CellSizes& cell, const Layer& layer, const LayerGrads& grads);

}  // namespace fastrnn::cpu::FASTRNN_ISA
