// The memory of a backward pass: packed weights, gate gradients of a chunk of steps, sums, and scratch of each thread.
#pragma once

#include "normalize.h"
#include "recompute.h"
#include "rows.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kChunkVectors = 4096;  // of gate gradients in a chunk, about: they should stay in the cache

// Rows of a single step whose weights are packed on the way; of more rows, packing all of them before is a small part.
template <class E>
constexpr int64_t kMaxRowsOnTheWay = kInPairs<E> ? kBlockM : 256;

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
inline constexpr bool kIsSame<A, A> = true;

// Rows that lie one after the other, of a weight as the caller stores it.
template <class S>
struct WeightRows {
  const S* first;
  int64_t pitch;

  const S* operator()(int64_t k) const { return first + k * pitch; }
  WeightRows from_column(int64_t n) const { return {first + n, pitch}; }
};

// S is the storage type, E that of panels and gate gradients. It is the same for every cell.
template <class S, class E>
struct BackwardPlan {
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr bool kStoresDirectly = sizeof(S) == sizeof(T);  // else gradients are summed in T, then rounded once
  // The gate gradients of all steps, if they are asked for, are computed where they go.
  static constexpr bool kMayBeSteps = kIsSame<S, E> && kIsSame<S, T>;

  struct Direction {
    E *w_ih, *w_hh, *w_second, *w_hr;  // plain panels of [G*H, I], [first*H, P], [second*H, H], [P, H]; or null
    E* gates;                          // [chunk*B, Gp] gate gradients, or [T*B, Gp]; see gates()
    Norm<T>* norms;                    // [chunk*B, G + R] of normalized products
    E* projected;                      // [chunk*B, P] dL/dh_t in full, if there is a projection
    T* dh[2];                          // [B, Pp] of the step at hand and of the one before it, in turns
    T *dc, *dunits;                    // [B, K, Hp] dL/dc; [B, Hp] what w_hr or the second product hands back
    T *sum_w_ih, *sum_w_hh, *sum_w_hr, *sum_b_ih, *sum_b_hh, *sum_w_own;  // the weight gradients in T
  };

  struct Scratch {  // of one worker
    E *a, *b;       // blocks of the weight-gradient products: [kBlockK, kBlockM], [kBlockK, N]
    T* dx;          // [row_block(), I] where the gradient of x is rounded
    E* panel;       // of weights that are packed on the way
    typename RecomputePlan<S>::Scratch recompute;
  };

  BackwardPlan(const CellSizes& sizes, const Layer& layer, const LayerGrads& grads, void* base)
      : cell(sizes), p(layer), out(grads), tasks(layer, sizes.gates, 2), workspace(base), recompute(layer, sizes) {
    Hp = pitch_of<T>(p.H), Pp = pitch_of<T>(p.P), Gp = grad_vectors() * p.H;
    if (!gates_are_steps()) Gp = pitch_of<T>(Gp);
    chunk = smaller(p.T, larger(1, kChunkVectors / larger(4, grad_vectors()) / larger(1, p.B)));
    for (int d = 0; d < p.D; ++d) take_direction(d);
    if (out.x && p.D == 2) sum_x = sum_for(out.x, p.T * p.B * p.I);
    if (recomputes()) recompute.take(workspace, chunk * p.B);
    scratch_begin = workspace.used();
    take_scratch(workspace);
    scratch_bytes = workspace.used() - scratch_begin;
  }

  size_t bytes() const { return scratch_begin + scratch_bytes * tasks.threads(); }

  Scratch scratch(void* base, int worker) const {
    Workspace own(static_cast<char*>(base) + scratch_begin + scratch_bytes * worker);
    return take_scratch(own);
  }

  // A row of gate gradients has the cell's own vectors, then, of normalized products, the gradients of the products:
  // the input's and the recurrent ones, both in the order of the gates.
  int64_t grad_vectors() const { return cell.grads + cell.gains; }
  int64_t input_vectors_at() const { return cell.gains ? cell.grads : 0; }
  int64_t recurrent_vectors_at() const { return cell.gains ? cell.grads + cell.gates : cell.recurrent_grad[0]; }

  // Whether forward has kept nothing of what this cell wants to be kept.
  bool recomputes() const { return !p.saved && saved_size() > 0; }
  bool has_projection() const { return p.projected; }
  bool gates_are_steps() const { return kMayBeSteps && !cell.gains && out.steps; }

  // Whether each weight is the operand of one product of few rows, to which packing all of it would come on top.
  bool packs_on_the_way() const { return p.T == 1 && p.B <= kMaxRowsOnTheWay<E>; }
  // How many rows of dx are one task.
  int64_t row_block() const { return packs_on_the_way() ? larger(1, p.B) : kBlockM; }

  // Row k of w_ih in the order in which the gate gradients lie.
  const S* w_ih_row(int d, int64_t k) const {
    int64_t gate = k / p.H;
    if (!cell.gains) gate = gate_at(gate);
    return as<S>(p.weights[d].w_ih) + (gate * p.H + k % p.H) * p.I;
  }
  WeightRows<S> w_hh_rows(int d) const { return {as<S>(p.weights[d].w_hh), p.P}; }
  WeightRows<S> w_second_rows(int d) const { return {w_hh_rows(d)(cell.first_gates * p.H), p.P}; }
  WeightRows<S> w_hr_rows(int d) const { return {as<S>(p.weights[d].w_hr), p.H}; }

  // The gate gradients of the rows of a chunk.
  E* gates(int d, Chunk chunk) const {
    return directions[d].gates + (gates_are_steps() ? chunk.first_row(p, d) * Gp : 0);
  }

  // What forward saved of a row of [T, B] in the chunk, or what it would have saved.
  const S* saved(int d, Chunk chunk, int64_t row) const {
    if (recomputes()) return recompute.saved(d) + (row - chunk.first_row(p, d)) * saved_size();
    return as<S>(p.saved) + (d * p.T * p.B + row) * saved_size();
  }
  int64_t saved_size() const { return (cell.saved + p.projected) * p.H; }

  const CellSizes& cell;
  const Layer& p;
  const LayerGrads& out;
  RowTasks tasks;
  Workspace workspace;
  RecomputePlan<S> recompute;
  int64_t Hp, Pp, Gp;  // pitches of rows in scratch: of units, outputs, gate gradients
  int64_t chunk;       // steps
  T* sum_x = nullptr;  // [T*B, I] the gradient of x, where two directions add to it
  Direction directions[2] = {};
  size_t scratch_begin, scratch_bytes;

 private:
  void take_direction(int direction) {
    Direction& d = directions[direction];
    const WeightGrads& w = out.weights[direction];
    const int64_t rows = chunk * p.B, gates = cell.gates * p.H, recurrent = cell.recurrent_gates() * p.H;
    if (!packs_on_the_way()) take_packed(d);
    d.gates =
        gates_are_steps() ? static_cast<E*>(out.steps) + direction * p.T * p.B * Gp : workspace.take<E>(rows * Gp);
    d.norms = workspace.take<Norm<T>>(rows * cell.gains);
    if (has_projection()) d.projected = workspace.take<E>(rows * p.P);
    for (T*& dh : d.dh) dh = workspace.take<T>(p.B * Pp);
    d.dc = workspace.take<T>(p.B * cell.carried * Hp), d.dunits = workspace.take<T>(p.B * Hp);
    d.sum_w_ih = sum_for(w.w_ih, gates * p.I), d.sum_w_hh = sum_for(w.w_hh, recurrent * p.P);
    d.sum_b_ih = sum_for(w.b_ih, gates), d.sum_b_hh = sum_for(w.b_hh, recurrent);
    d.sum_w_own = sum_for(w.w_own, cell.own_rows() * p.H);
    d.sum_w_hr = sum_for(w.w_hr, p.P * p.H);
  }

  void take_packed(Direction& d) {
    if (out.x) d.w_ih = workspace.take<E>(plain_size<E>(cell.gates * p.H, p.I, L));
    if (cell.first_gates) d.w_hh = workspace.take<E>(plain_size<E>(cell.first_gates * p.H, p.P, L));
    if (cell.second_gates) d.w_second = workspace.take<E>(plain_size<E>(cell.second_gates * p.H, p.H, L));
    if (has_projection()) d.w_hr = workspace.take<E>(plain_size<E>(p.P, p.H, L));
  }

  // The gate whose gradient of the input product is vector j.
  int64_t gate_at(int64_t j) const {
    int64_t gate = 0;
    while (cell.input_grad[gate] != j) ++gate;
    return gate;
  }

  T* sum_for(void* grad, int64_t count) {
    if (!grad) return nullptr;
    return kStoresDirectly ? static_cast<T*>(grad) : workspace.take<T>(count);
  }

  Scratch take_scratch(Workspace& from) const {
    const int64_t columns = round_up(larger(p.I, larger(p.P, p.H)), kPlain * L);
    Scratch s = {};
    s.a = from.take<E>(kBlockK * kBlockM), s.b = from.take<E>(kBlockK * columns);
    if (!kStoresDirectly) s.dx = from.take<T>(row_block() * p.I);
    if (packs_on_the_way()) s.panel = from.take<E>(kBlockOfPanels<E>);
    if (recomputes()) s.recompute = recompute.take_scratch(from);
    return s;
  }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
