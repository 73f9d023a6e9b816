// The gates of a chunk of steps from the states alone: what forward would have saved, in one product per weight matrix
// over all rows of the chunk. The sums run in the order of the forward pass, so in float and double the values are the
// same to the bit; 16-bit types start from the rounded h.
#pragma once

#include "../cells/sizes.h"
#include "gemm.h"
#include "given.h"
#include "states.h"
#include "unpacked.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Memory, packed weights and products, which are the same for every cell.
template <class S>
class RecomputePlan {
 public:
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;

  struct Scratch {         // of one worker, for kBlockM rows
    T *x, *h, *operand;    // [., Ip], [., Pp], [., Hp]
    T *input, *recurrent;  // [., Gp], [., Rp] the products of all gates
    T* first;              // [., S, Hp] what the first phase saves
  };

  RecomputePlan(const Layer& layer, const CellSizes& sizes)
      : p(layer),
        cell(sizes),
        Hp(pitch_of<T>(p.H)),
        Pp(pitch_of<T>(p.P)),
        Ip(pitch_of<T>(p.I)),
        Gp(pitch_of<T>(cell.gates * p.H) + L),  // + L: whole vectors are read at the end of a row
        Rp(pitch_of<T>(cell.recurrent_gates() * p.H) + L) {}

  // Memory for chunks of at most so many rows.
  void take(Workspace& from, int64_t rows) {
    for (int d = 0; d < p.D; ++d) {
      Direction& w = directions[d];
      w.saved = from.take<S>(rows * vectors() * p.H);
      w.w_ih = from.take<T>(plain_size<T>(p.I, cell.gates * p.H, L));
      w.w_hh = from.take<T>(plain_size<T>(p.P, cell.first_gates * p.H, L));
      w.w_second = from.take<T>(plain_size<T>(p.H, cell.second_gates * p.H, L));
      w.b_ih = from.take<T>(cell.gates * p.H), w.b_hh = from.take<T>(cell.recurrent_gates() * p.H);
    }
  }

  Scratch take_scratch(Workspace& from) const {
    Scratch s = {};
    s.x = from.take<T>(kBlockM * Ip), s.h = from.take<T>(kBlockM * Pp);
    s.input = from.take<T>(kBlockM * Gp), s.recurrent = from.take<T>(kBlockM * Rp);
    if (cell.second_gates) s.operand = from.take<T>(kBlockM * Hp), s.first = from.take<T>(kBlockM * cell.saved * Hp);
    return s;
  }

  // Task 2d packs what reads x, task 2d+1 what reads the state: this worker's part.
  void pack_weights(int task, Share share) const {
    if (reads_weights_in_place(p)) return;
    const Weights& w = p.weights[task / 2];
    const Direction& to = directions[task / 2];
    const bool reads_x = task % 2 == 0;
    const int64_t H = p.H, first = cell.first_gates * H;
    T* bias = reads_x ? to.b_ih : to.b_hh;
    const S* given = as<S>(reads_x ? w.b_ih : w.b_hh);
    const int64_t biases = share.worker == 0 ? (reads_x ? cell.gates : cell.recurrent_gates()) * H : 0;
    for (int64_t j = 0; j < biases; ++j) bias[j] = given ? widen(given[j]) : T(0);
    if (reads_x) return pack_part(share, to.w_ih, Matrix<S>{as<S>(w.w_ih), p.I}, p.I, cell.gates * H);
    if (first) pack_part(share, to.w_hh, Matrix<S>{as<S>(w.w_hh), p.P}, p.P, first);
    if (cell.second_gates)
      pack_part(share, to.w_second, Matrix<S>{as<S>(w.w_hh) + first * p.P, p.P}, p.H, cell.second_gates * H);
  }

  int tasks(Chunk chunk) const { return p.D * blocks(chunk); }
  int blocks(Chunk chunk) const { return int((chunk.rows(p) + kBlockM - 1) / kBlockM); }
  int64_t vectors() const { return cell.saved + p.projected; }  // no cell with normalization comes here

  // [chunk's rows, S, H], as forward saves it.
  S* saved(int d) const { return directions[d].saved; }

  // x and the state before, of `n` rows of [T, B] from `row` on.
  void gather(int d, int64_t row, int64_t n, const Scratch& own) const {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t t = (row + r) / p.B, b = (row + r) % p.B;
      const S* h = row_is_active(p, t, b) ? previous_h<S>(p, d, t, b) : nullptr;
      convert(own.x + r * Ip, as<S>(p.x) + (row + r) * p.I, p.I);
      memset(own.h + r * Pp, 0, size_t(Pp) * sizeof(T));
      if (h) convert(own.h + r * Pp, h, p.P);
    }
  }

  void input_products(int d, int64_t n, const Scratch& own) const {
    const Direction& w = directions[d];
    const Weights& given = p.weights[d];
    product(n, cell.gates * p.H, p.I, own.x, Ip, {w.w_ih, w.b_ih}, {given.w_ih, given.b_ih}, 0, own.input, Gp);
  }

  void recurrent_products(int d, int64_t n, const Scratch& own) const {
    const Direction& w = directions[d];
    const Weights& given = p.weights[d];
    if (cell.first_gates)
      product(n, cell.first_gates * p.H, p.P, own.h, Pp, {w.w_hh, w.b_hh}, {given.w_hh, given.b_hh}, 0, own.recurrent,
              Rp);
  }

  void second_products(int d, int64_t n, const Scratch& own) const {
    const Direction& w = directions[d];
    const Weights& given = p.weights[d];
    const int64_t begin = cell.first_gates * p.H;
    product(n, cell.second_gates * p.H, p.H, own.operand, Hp, {w.w_second, w.b_hh + begin}, {given.w_hh, given.b_hh},
            begin, own.recurrent + begin, Rp);
  }

  const Layer& p;
  const CellSizes& cell;
  const int64_t Hp, Pp, Ip, Gp, Rp;  // pitches of rows in scratch: of units, outputs, inputs, their products, others

 private:
  struct Direction {
    S* saved;
    T *w_ih, *w_hh, *w_second;  // plain panels of [I, G*H], [P, first*H], [H, second*H]
    T *b_ih, *b_hh;             // [G*H]
  };

  struct Packed {
    const T *w, *bias;
  };
  struct AsGiven {
    const void *w, *bias;
  };

  // out [n, N] = bias + a W^T as forward adds it up; `begin` is the first row of W in what is given.
  void product(int64_t n, int64_t N, int64_t depth, const T* a, int64_t lda, Packed packed, AsGiven given,
               int64_t begin, T* out, int64_t ldo) const {
    if (reads_weights_in_place(p)) {
      const S* const bias = as<S>(given.bias);
      multiply_unpacked(n, N, depth, a, lda, as<S>(given.w) + begin * depth, bias ? bias + begin : nullptr, out, ldo);
    } else {
      gemm(n, N, depth, rows_of(a, lda), packed.w, Init<T>{packed.bias, 0}, out, ldo);
    }
  }

  Direction directions[2] = {};
};

// What a cell makes of the products.
template <class Cell, class S>
class Recompute {
 public:
  using Plan = RecomputePlan<S>;
  using Scratch = typename Plan::Scratch;
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kRecurrent = Cell::kFirstGates + Cell::kSecondGates, K = Cell::kCarried;

  explicit Recompute(const Plan& memory) : p(memory.p), plan(memory) {}

  // One block of rows of one direction.
  void run(Chunk chunk, int task, const Scratch& own) const {
    const int d = task / plan.blocks(chunk);
    const int64_t m = task % plan.blocks(chunk) * kBlockM, n = smaller(kBlockM, chunk.rows(p) - m);
    const int64_t row = chunk.first_row(p, d) + m;
    plan.gather(d, row, n, own);
    plan.input_products(d, n, own);
    plan.recurrent_products(d, n, own);
    if constexpr (Cell::kSecondGates > 0) {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t u = 0; u < p.H; u += L) first(d, (row + r) / p.B, (row + r) % p.B, u, r, own);
      plan.second_products(d, n, own);
    }
    for (int64_t r = 0; r < n; ++r) {
      const int64_t t = (row + r) / p.B, b = (row + r) % p.B;
      for (int64_t u = 0; row_is_active(p, t, b) && u < p.H; u += L)
        finish(d, t, b, u, r, own, plan.saved(d) + (m + r) * plan.vectors() * p.H + u);
    }
  }

 private:
  void load_gates(int64_t r, int64_t u, const Scratch& own, V* x, V* h) const {
    for (int g = 0; g < Cell::kGates; ++g) x[g] = load(own.input + r * plan.Gp + g * p.H + u);
    for (int g = 0; g < kRecurrent; ++g) h[g] = load(own.recurrent + r * plan.Rp + g * p.H + u);
  }

  // What else the cell reads at a time of a row.
  void load_others(int d, int64_t t, int64_t b, int64_t u, V* given, V* carried) const {
    given_at<Cell, S>(p, d, t, b).load_all(given, 0, u, p.H);
    previous_c<S, K>(p, d, t, b).load_units(carried, u, p.H - u, p.H);
  }

  void first(int d, int64_t t, int64_t b, int64_t u, int64_t r, const Scratch& own) const {
    V x[Cell::kGates], h[at_least_one(kRecurrent)], saved[Cell::kSaved];
    V given[Given<Cell, S>::kCount], carried[at_least_one(K)];
    for (V& v : saved) v = V(0);
    load_gates(r, u, own, x, h);
    load_others(d, t, b, u, given, carried);
    store(own.operand + r * plan.Hp + u, Cell::first(x, h, load(own.h + r * plan.Pp + u), given, carried, saved));
    for (int j = 0; j < Cell::kSaved; ++j) store(own.first + (r * Cell::kSaved + j) * plan.Hp + u, saved[j]);
  }

  void finish(int d, int64_t t, int64_t b, int64_t u, int64_t r, const Scratch& own, S* to) const {
    V x[Cell::kGates], h[at_least_one(kRecurrent)], saved[at_least_one(Cell::kSaved)];
    V given[Given<Cell, S>::kCount], carried[at_least_one(K)];
    load_gates(r, u, own, x, h);
    load_others(d, t, b, u, given, carried);
    if constexpr (Cell::kSecondGates > 0)
      for (int j = 0; j < Cell::kSaved; ++j) saved[j] = load(own.first + (r * Cell::kSaved + j) * plan.Hp + u);
    const V out = Cell::forward(x, h, p.projected ? V(0) : load(own.h + r * plan.Pp + u), given, carried, saved);
    for (int j = 0; j < Cell::kSaved; ++j) store(to + j * p.H, saved[j], p.H - u);
    if (p.projected) store(to + Cell::kSaved * p.H, out, p.H - u);
  }

  const Layer& p;
  const Plan& plan;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
