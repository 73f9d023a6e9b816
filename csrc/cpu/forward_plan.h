// Forward's memory: packed weights, and the scratch of each worker.
#pragma once

#include "normalize.h"
#include "rows.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kProjectionBytes = 384 << 10;  // of one chunk: it should stay in L2 until its steps have read it,
constexpr int64_t kProjectionRows = 128;         // but so many rows are worth reading all of w_ih for

// S is the storage type, E what products read of inputs and states, W the type of the packed weights. With int8 weights
// E is float: a product quantizes what it reads.
template <class Cell, class S, class E, class W>
struct ForwardPlan {
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kFirstGates = Cell::kFirstGates, K = Cell::kCarried;

  struct Packed {
    W *w_ih, *w_hh;             // plain panels of [I, G*H]; gate panels of the first product
    W* w_second;                // gate panels of the second product, if the cell has one
    W* w_hr;                    // plain panels of [H, P], if there is a projection
    T *b_ih, *b_hh, *b_second;  // [G*H]; in the order of the panels
    T* w_own;                   // [U, Hp]
    T* shifts;                  // [G + R, Hp] the biases of normalized products; b_ih and b_hh are 0 then
  };

  struct Scratch {            // of one thread, or of a team; rows are padded to whole vectors
    E* x;                     // [steps*n, Ip]
    T* gates;                 // [steps*n, Gp]
    T *h, *h_next, *c;        // [n, Pp], [n, Pp], [n, K, Hp]
    E *h_read, *h_read_next;  // [n, Pp] h as the products read it: the same memory, or a rounded copy
    T* hidden;                // [n, Hp] what the cell puts out: h_next, unless there is a projection
    T* sums;                  // [n, Rp] recurrent products of unpacked weights
    T* products;              // [n, R, Hp] recurrent products that are to be normalized
    T* to_normalize;          // [n, Hp] of a cell that normalizes its operand
    E* operand;               // [n, Hp] of a two-phase cell
    T* first;                 // [n, S, Hp] of a cell of two phases
    int8_t* quantized;        // [team, max(n, kBlockM), Qp] and its quanta, with int8 weights: a piece for each thread
    float* quanta;            // [team, max(n, kBlockM)]
  };

  ForwardPlan(const Layer& layer, void* base) : p(layer), tasks(layer, Cell::kGates, 1), workspace(base) {
    Hp = pitch_of<T>(p.H), Pp = pitch_of<T>(p.P), Ip = pitch_of<T>(p.I), Gp = pitch_of<T>(Cell::kGates * p.H);
    Rp = pitch_of<T>((kFirstGates + Cell::kSecondGates) * p.H);
    Qp = round_up(larger(p.I, larger(p.H, p.P)), 64) + 64;
    const int64_t n = tasks.max_rows();
    const int64_t row_bytes = Cell::kGates * p.H * int64_t(sizeof(T));
    steps = larger(1, smaller(p.T, larger(kProjectionRows, kProjectionBytes / row_bytes) / larger(1, n)));
    if (p.packed) {
      Workspace given(const_cast<void*>(p.packed));
      take_packed(given);
    } else if (!unpacked()) {
      take_packed(workspace);
    }
    scratch_begin = workspace.used();
    take_scratch(workspace, n);
    scratch_bytes = workspace.used() - scratch_begin;
  }

  bool unpacked() const { return reads_weights_in_place(p); }

  size_t bytes() const { return scratch_begin + scratch_bytes * tasks.workers(); }

  Scratch scratch(void* base, int place) const {
    Workspace own(static_cast<char*>(base) + scratch_begin + scratch_bytes * place);
    return take_scratch(own, tasks.max_rows());
  }

  void take_packed(Workspace& from) {
    for (int d = 0; d < p.D; ++d) packed[d] = take_direction(from);
  }

  const Layer& p;
  RowTasks tasks;
  Workspace workspace;
  // Pitches of rows in scratch: of units, outputs, inputs, their products, recurrent products, quantized numbers.
  int64_t Hp, Pp, Ip, Gp, Rp, Qp;
  int64_t steps;  // of a chunk
  Packed packed[2] = {};
  size_t scratch_begin, scratch_bytes;

 private:
  Packed take_direction(Workspace& from) const {
    Packed w = {};
    w.w_ih = from.take<W>(plain_size<W>(p.I, Cell::kGates * p.H, L));
    w.b_ih = from.take<T>(Cell::kGates * p.H);
    w.w_hh = from.take<W>(gates_size<W>(p.P, p.H, kFirstGates, L));
    w.b_hh = from.take<T>(kFirstGates * round_up(p.H, L));
    w.w_own = from.take<T>((Cell::kUnitWeights + Cell::kGains) * Hp);
    w.shifts = from.take<T>(Cell::kGains * Hp);
    if (Cell::kSecondGates) {
      w.w_second = from.take<W>(gates_size<W>(p.H, p.H, Cell::kSecondGates, L));
      w.b_second = from.take<T>(Cell::kSecondGates * round_up(p.H, L));
    }
    if (p.projected) w.w_hr = from.take<W>(plain_size<W>(p.H, p.P, L));
    return w;
  }

  Scratch take_scratch(Workspace& from, int64_t n) const {
    Scratch s = {};
    s.x = from.take<E>(steps * n * Ip);
    s.gates = from.take<T>(steps * n * Gp + L);  // + L: whole vectors are read at the end of a row
    s.h = from.take<T>(n * Pp), s.h_next = from.take<T>(n * Pp), s.c = from.take<T>(n * K * Hp);
    if constexpr (kInPairs<E>) {
      s.h_read = from.take<E>(n * Pp), s.h_read_next = from.take<E>(n * Pp);
    } else {
      s.h_read = s.h, s.h_read_next = s.h_next;
    }
    if (unpacked()) s.sums = from.take<T>(n * Rp + L);
    if (p.projected) s.hidden = from.take<T>(n * Hp);
    if (Cell::kSecondGates) {
      s.operand = from.take<E>(n * Hp);
      s.first = from.take<T>(n * Cell::kSaved * Hp);
    }
    if (kNormalizesProducts<Cell>) s.products = from.take<T>(n * kFirstGates * Hp);
    if (Cell::kNormalizes) {
      s.to_normalize = from.take<T>(n * Hp);
      s.first = from.take<T>(n * kCellSaved<Cell> * Hp);
    }
    if (kIsInt8<W>) {
      const int64_t rows = tasks.team() * larger(n, kBlockM);
      s.quantized = from.take<int8_t>(rows * Qp), s.quanta = from.take<float>(rows);
    }
    return s;
  }
};

template <class Cell, class S>
void pack_bias(Accumulator<S>* packed, const S* bias, int64_t H, int64_t gates) {
  constexpr int64_t L = kLanes<Accumulator<S>>;
  for (int64_t u = 0; u < H; u += L)
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t lane = 0; lane < L; ++lane)
        *packed++ = bias && u + lane < H ? widen(bias[g * H + u + lane]) : Accumulator<S>(0);
}

// The biases of normalized products, which are added to what is normalized.
template <class Cell, class Plan, class T, class S>
void pack_shifts(const Plan& plan, T* to, const S* bias, int gates) {
  const int64_t H = plan.p.H;
  for (int g = 0; kNormalizesProducts<Cell> && g < gates; ++g)
    for (int64_t u = 0; u < H; ++u) to[g * plan.Hp + u] = bias ? widen(bias[g * H + u]) : T(0);
}

// Everything but the matrices: task 2d packs what goes with x, task 2d+1 what goes with the state.
template <class Cell, class S, class E, class W>
void pack_vectors(const ForwardPlan<Cell, S, E, W>& plan, int task) {
  using T = Accumulator<S>;
  constexpr int64_t kFirst = Cell::kFirstGates;
  const Layer& p = plan.p;
  const Weights& w = p.weights[task / 2];
  const auto& to = plan.packed[task / 2];
  if (task % 2 == 0) {
    pack_shifts<Cell>(plan, to.shifts, as<S>(w.b_ih), Cell::kGates);
    const S* bias = kNormalizesProducts<Cell> ? nullptr : as<S>(w.b_ih);
    for (int64_t j = 0; j < Cell::kGates * p.H; ++j) to.b_ih[j] = bias ? widen(bias[j]) : T(0);
    return;
  }
  pack_shifts<Cell>(plan, to.shifts + Cell::kGates * plan.Hp, as<S>(w.b_hh), kFirst);
  for (int j = 0; j < Cell::kUnitWeights + Cell::kGains; ++j)
    convert(to.w_own + j * plan.Hp, as<S>(w.w_own) + j * p.H, p.H);
  const S* bias = as<S>(w.b_hh);
  if (kFirst > 0) pack_bias<Cell, S>(to.b_hh, kNormalizesProducts<Cell> ? nullptr : bias, p.H, kFirst);
  if (Cell::kSecondGates > 0)
    pack_bias<Cell, S>(to.b_second, bias ? bias + kFirst * p.H : nullptr, p.H, Cell::kSecondGates);
}

// A part of the matrices of a task.
template <class Cell, class S, class E, class W>
void pack_matrices(const ForwardPlan<Cell, S, E, W>& plan, int task, Share share) {
  constexpr int64_t L = kLanes<Accumulator<S>>;
  constexpr int kFirst = Cell::kFirstGates;
  const Layer& p = plan.p;
  const Weights& w = p.weights[task / 2];
  const auto& to = plan.packed[task / 2];
  if (task % 2 == 0) return pack_part(share, to.w_ih, Matrix<S>{as<S>(w.w_ih), p.I}, p.I, Cell::kGates * p.H);
  int64_t begin, end;
  share.part(p.H, L, &begin, &end);
  if (kFirst > 0) pack_gates(to.w_hh, Matrix<S>{as<S>(w.w_hh), p.P}, p.P, p.H, kFirst, begin, end);
  if (Cell::kSecondGates > 0)
    pack_gates(to.w_second, Matrix<S>{as<S>(w.w_hh) + kFirst * p.H * p.P, p.P}, p.H, p.H, Cell::kSecondGates, begin,
               end);
  if (w.w_hr) pack_part(share, to.w_hr, Matrix<S>{as<S>(w.w_hr), p.H}, p.H, p.P);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
