// Where the backward pass finds the states that forward left.
#pragma once

#include "rows.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Steps [begin, end) of a direction.
struct Chunk {
  int64_t begin, end;

  // The first of the chunk's times, the row of [T, B] where they begin, and how many rows they are.
  int64_t first_time(const Layer& p, int d) const { return d == 0 ? begin : p.T - end; }
  int64_t first_row(const Layer& p, int d) const { return first_time(p, d) * p.B; }
  int64_t rows(const Layer& p) const { return (end - begin) * p.B; }
};

// h before time t of a row, in storage, or null: zeros.
template <class S>
const S* previous_h(const Layer& p, int d, int64_t t, int64_t b) {
  const int64_t from = previous_time(p, d, t, b);
  if (from >= 0) return as<S>(p.y) + ((from * p.B + b) * p.D + d) * p.P;
  return from == kInitialState && p.h0 ? as<S>(p.h0) + (d * p.B + b) * p.P : nullptr;
}

// Units [u, u + L) of c before time t of a row.
template <class S>
Vec<Accumulator<S>> previous_c(const Layer& p, int d, int64_t t, int64_t b, int64_t u) {
  using T = Accumulator<S>;
  const int64_t from = previous_time(p, d, t, b);
  if (from >= 0) return load(as<T>(p.saved_c) + ((d * p.T + from) * p.B + b) * p.H + u, p.H - u);
  return from == kInitialState && p.c0 ? load(as<S>(p.c0) + (d * p.B + b) * p.H + u, p.H - u) : Vec<T>(0);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
