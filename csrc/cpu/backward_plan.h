// The memory of a backward pass: packed weights, gate gradients of a chunk of steps, sums, and scratch of each thread.
#pragma once

#include "normalize.h"
#include "recompute.h"
#include "rows.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kChunkRows = 1024;  // steps times rows of a chunk, about: its gate gradients should stay in the cache

// A row of gate gradients has the cell's own vectors, then, of normalized products, the gradients of the products: the
// input's and the recurrent ones, both in the order of the gates.
template <class Cell>
constexpr int kGradVectors = Cell::kGrads + Cell::kGains;
template <class Cell>
constexpr int kRecurrentAt = kNormalizesProducts<Cell> ? Cell::kGrads + Cell::kGates : Cell::kRecurrentGrad[0];

// S is the storage type, E that of panels and gate gradients.
template <class Cell, class S, class E>
struct BackwardPlan {
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kFirstGates = Cell::kFirstGates, kRecurrent = kFirstGates + Cell::kSecondGates;
  static constexpr bool kStoresDirectly = sizeof(S) == sizeof(T);  // else gradients are summed in T, then rounded once

  struct Direction {
    E *w_ih, *w_hh, *w_second, *w_hr;  // plain panels of [G*H, I], [first*H, P], [second*H, H], [P, H]
    E* gates;                          // [chunk*B, Gp] gate gradients
    Norm<T>* norms;                    // [chunk*B, G + R] of normalized products
    E* projected;                      // [chunk*B, P] dL/dh_t in full, if there is a projection
    T* dh[2];                          // [B, Pp] of the step at hand and of the one before it, in turns
    T *dc, *dunits;                    // [B, K, Hp] dL/dc; [B, Hp] what w_hr or the second product hands back
    T *sum_w_ih, *sum_w_hh, *sum_w_hr, *sum_b_ih, *sum_b_hh, *sum_w_own;  // the weight gradients in T
  };

  struct Scratch {  // of one worker
    E *a, *b;       // blocks of the weight-gradient products: [kBlockK, kBlockM], [kBlockK, N]
    T* dx;          // [kBlockM, I] where the gradient of x is rounded
    typename Recompute<Cell, S>::Scratch recompute;
  };

  BackwardPlan(const Layer& layer, const LayerGrads& grads, void* base)
      : p(layer), out(grads), tasks(layer, Cell::kGates), workspace(base), recompute(layer) {
    Hp = pitch_of<T>(p.H), Pp = pitch_of<T>(p.P), Gp = pitch_of<T>(kGradVectors<Cell> * p.H);
    // Normalized products have about three times the vectors; half as many rows are no slower.
    chunk = smaller(p.T, larger(1, kChunkRows / (1 + kNormalizesProducts<Cell>) / larger(1, p.B)));
    for (int d = 0; d < p.D; ++d) take_direction(directions[d], out.weights[d]);
    if (out.x && p.D == 2) sum_x = sum_for(out.x, p.T * p.B * p.I);
    if (!p.saved) recompute.take(workspace, chunk * p.B);
    scratch_begin = workspace.used();
    take_scratch(workspace);
    scratch_bytes = workspace.used() - scratch_begin;
  }

  size_t bytes() const { return scratch_begin + scratch_bytes * tasks.threads(); }

  Scratch scratch(void* base, int worker) const {
    Workspace own(static_cast<char*>(base) + scratch_begin + scratch_bytes * worker);
    return take_scratch(own);
  }

  bool has_projection() const { return p.projected; }

  // What forward saved of a row of [T, B] in the chunk, or what it would have saved.
  const S* saved(int d, Chunk chunk, int64_t row) const {
    const S* rows = p.saved ? as<S>(p.saved) + d * p.T * p.B * saved_size() : recompute.saved(d);
    return rows + (p.saved ? row : row - chunk.first_row(p, d)) * saved_size();
  }
  int64_t saved_size() const { return (Cell::kSaved + p.projected) * p.H; }

  const Layer& p;
  const LayerGrads& out;
  RowTasks tasks;
  Workspace workspace;
  Recompute<Cell, S> recompute;
  int64_t Hp, Pp, Gp;  // pitches of rows in scratch: of units, outputs, gate gradients
  int64_t chunk;       // steps
  T* sum_x = nullptr;  // [T*B, I] the gradient of x, where two directions add to it
  Direction directions[2] = {};
  size_t scratch_begin, scratch_bytes;

 private:
  void take_direction(Direction& d, const WeightGrads& w) {
    const int64_t rows = chunk * p.B, gates = Cell::kGates * p.H;
    if (out.x) d.w_ih = workspace.take<E>(plain_size<E>(gates, p.I, L));
    d.w_hh = workspace.take<E>(plain_size<E>(kFirstGates * p.H, p.P, L));
    if (Cell::kSecondGates) d.w_second = workspace.take<E>(plain_size<E>(Cell::kSecondGates * p.H, p.H, L));
    if (has_projection()) d.w_hr = workspace.take<E>(plain_size<E>(p.P, p.H, L));
    d.gates = workspace.take<E>(rows * Gp);
    d.norms = workspace.take<Norm<T>>(rows * Cell::kGains);
    if (has_projection()) d.projected = workspace.take<E>(rows * p.P);
    for (T*& dh : d.dh) dh = workspace.take<T>(p.B * Pp);
    d.dc = workspace.take<T>(p.B * Cell::kCarried * Hp), d.dunits = workspace.take<T>(p.B * Hp);
    d.sum_w_ih = sum_for(w.w_ih, gates * p.I), d.sum_w_hh = sum_for(w.w_hh, kRecurrent * p.H * p.P);
    d.sum_b_ih = sum_for(w.b_ih, gates), d.sum_b_hh = sum_for(w.b_hh, kRecurrent * p.H);
    d.sum_w_own = sum_for(w.w_own, (Cell::kUnitWeights + Cell::kGains) * p.H);
    d.sum_w_hr = sum_for(w.w_hr, p.P * p.H);
  }

  T* sum_for(void* grad, int64_t count) {
    if (!grad) return nullptr;
    return kStoresDirectly ? static_cast<T*>(grad) : workspace.take<T>(count);
  }

  Scratch take_scratch(Workspace& from) const {
    const int64_t columns = round_up(larger(p.I, larger(p.P, p.H)), kPlain * L);
    Scratch s = {};
    s.a = from.take<E>(kBlockK * kBlockM), s.b = from.take<E>(kBlockK * columns);
    if (!kStoresDirectly) s.dx = from.take<T>(kBlockM * p.I);
    if (!p.saved) s.recompute = recompute.take_scratch(from);
    return s;
  }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
