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

// c [K, H] before time t of a row: as it was saved, as the caller gave it, or, with neither, zeros.
template <class S, int K>
struct PreviousC {
  const Accumulator<S>* saved;
  const S* given;

  // Of each state `count` units from u on, or as many as there are lanes; H units in all.
  FASTRNN_INLINE void load_units(Vec<Accumulator<S>>* to, int64_t u, int64_t count, int64_t H) const {
    for (int k = 0; k < K; ++k, u += H)
      to[k] = saved ? load(saved + u, count) : given ? load(given + u, count) : Vec<Accumulator<S>>(0);
  }
};

template <class S, int K>
PreviousC<S, K> previous_c(const Layer& p, int d, int64_t t, int64_t b) {
  const int64_t from = previous_time(p, d, t, b);
  if (K == 0) return {};
  if (from >= 0) return {as<Accumulator<S>>(p.saved_c) + ((d * p.T + from) * p.B + b) * K * p.H, nullptr};
  return {nullptr, from == kInitialState && p.c0 ? as<S>(p.c0) + (d * p.B + b) * K * p.H : nullptr};
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
