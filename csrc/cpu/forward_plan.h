// Forward's memory: packed weights, and the scratch of each worker.
#pragma once

#include "../cells/sizes.h"
#include "rows.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kProjectionBytes = 384 << 10;  // of one chunk: it should stay in L2 until its steps have read it,
constexpr int64_t kProjectionRows = 128;         // but so many rows are worth reading all of w_ih for

// S is the storage type, E what products read of inputs and states, W the type of the packed weights. With int8 weights
// E is float: a product quantizes what it reads. It is the same for every cell.
template <class S, class E, class W>
struct ForwardPlan {
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;

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

  ForwardPlan(const CellSizes& sizes, const Layer& layer, void* base)
      : cell(sizes), p(layer), tasks(layer, sizes.gates, 1), workspace(base) {
    Hp = pitch_of<T>(p.H), Pp = pitch_of<T>(p.P), Ip = pitch_of<T>(p.I), Gp = pitch_of<T>(cell.gates * p.H);
    Rp = pitch_of<T>(cell.recurrent_gates() * p.H);
    Qp = round_up(larger(p.I, larger(p.H, p.P)), 64) + 64;
    const int64_t n = tasks.max_rows();
    const int64_t row_bytes = cell.gates * p.H * int64_t(sizeof(T));
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

  const CellSizes& cell;
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
    w.w_ih = from.take<W>(plain_size<W>(p.I, cell.gates * p.H, L));
    w.b_ih = from.take<T>(cell.gates * p.H);
    w.w_hh = from.take<W>(gates_size<W>(p.P, p.H, cell.first_gates, L));
    w.b_hh = from.take<T>(cell.first_gates * round_up(p.H, L));
    w.w_own = from.take<T>(cell.own_rows() * Hp);
    w.shifts = from.take<T>(cell.gains * Hp);
    if (cell.second_gates) {
      w.w_second = from.take<W>(gates_size<W>(p.H, p.H, cell.second_gates, L));
      w.b_second = from.take<T>(cell.second_gates * round_up(p.H, L));
    }
    if (p.projected) w.w_hr = from.take<W>(plain_size<W>(p.H, p.P, L));
    return w;
  }

  Scratch take_scratch(Workspace& from, int64_t n) const {
    Scratch s = {};
    s.x = from.take<E>(steps * n * Ip);
    s.gates = from.take<T>(steps * n * Gp + L);  // + L: whole vectors are read at the end of a row
    s.h = from.take<T>(n * Pp), s.h_next = from.take<T>(n * Pp), s.c = from.take<T>(n * cell.carried * Hp);
    if constexpr (kInPairs<E>) {
      s.h_read = from.take<E>(n * Pp), s.h_read_next = from.take<E>(n * Pp);
    } else {
      s.h_read = s.h, s.h_read_next = s.h_next;
    }
    if (unpacked()) s.sums = from.take<T>(n * Rp + L);
    if (p.projected) s.hidden = from.take<T>(n * Hp);
    if (cell.second_gates) {
      s.operand = from.take<E>(n * Hp);
      s.first = from.take<T>(n * cell.saved * Hp);
    }
    if (cell.gains) s.products = from.take<T>(n * cell.first_gates * Hp);
    if (cell.normalizes) {
      s.to_normalize = from.take<T>(n * Hp);
      s.first = from.take<T>(n * (cell.saved - cell.gains) * Hp);
    }
    if (kIsInt8<W>) {
      const int64_t rows = tasks.team() * larger(n, kBlockM);
      s.quantized = from.take<int8_t>(rows * Qp), s.quanta = from.take<float>(rows);
    }
    return s;
  }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
