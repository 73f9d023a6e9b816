// What the cell computes in one step of the forward pass, for a range of rows, and where it reads and writes.
#pragma once

#include "gemm.h"
#include "given.h"
#include "normalize.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Vector u of row r.
struct Place {
  int64_t r, u;
};

// Passed by value into the loops over rows and units: the compiler has to expect that a store changes what it can reach
// by a pointer, such as the members of an object, and would read each of them again for every vector.
// The base takes no room where it is empty.
template <class Cell, class S, class E>
struct Pointwise : Given<Cell, S> {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kFirst = Cell::kFirstGates, kCarried = Cell::kCarried;
  static constexpr int kRecurrent = Cell::kFirstGates + Cell::kSecondGates;

  const T* gates;          // [n, Gp] input products
  const T* h;              // [n, Pp] h_{t-1}; with a projection it has other dimensions, and no such cell reads it
  T* c;                    // [n, K, Hp]
  T* hidden;               // [n, Hp] what the cell puts out
  E* operand;              // [n, Hp] of a two-phase cell
  T* to_normalize;         // [n, Hp] of a two-phase cell that normalizes its operand
  T* first_saved;          // [n, S, Hp] of a two-phase cell
  S* saved;                // [n, vectors, H] what backward reads, or null
  T* saved_c;              // [n, K, H], or null
  const int64_t* lengths;  // [n], or null
  int64_t t, H, Gp, Pp, Hp;
  bool projected;

  int64_t saved_vectors() const { return Cell::kSaved + projected; }
  bool is_active(int64_t r) const { return !lengths || t < lengths[r]; }

  // The first phase of a two-phase cell; sums [kFirst].
  FASTRNN_INLINE void first(const V* sums, Place at) const {
    V x[Cell::kGates], own[Given<Cell, S>::kCount], carried[at_least_one(kCarried)];
    V kept[at_least_one(kCellSaved<Cell>)];
    for (V& v : kept) v = V(0);
    load_gates(x, at);
    this->load_all(own, at.r, at.u * L, H);
    load_carried(carried, at);
    const V found = Cell::first(x, sums, state(h, Pp, at), own, carried, kept);
    if constexpr (Cell::kNormalizes) {
      store(to_normalize + at.r * Hp + at.u * L, found);
    } else {
      store(operand + at.r * Hp + at.u * L, found);
    }
    for (int j = 0; j < kCellSaved<Cell>; ++j)
      store(first_saved + (at.r * kCellSaved<Cell> + j) * Hp + at.u * L, kept[j]);
  }

  // The second phase; sums [kSecondGates].
  FASTRNN_INLINE void second(const V* sums, Place at) const {
    V all[kRecurrent];
    for (int g = 0; g < Cell::kSecondGates; ++g) all[kFirst + g] = sums[g];
    finish(all, at);
  }

  // The only phase, or the end of the second; sums [kRecurrent], and what the operand is normalized by.
  FASTRNN_INLINE void finish(const V* sums, Place at, Norm<T> norm = {}) const {
    V x[Cell::kGates], own[Given<Cell, S>::kCount], carried[at_least_one(kCarried)];
    V kept[at_least_one(kCellSaved<Cell>)];
    load_gates(x, at);
    this->load_all(own, at.r, at.u * L, H);
    load_carried(carried, at);
    if constexpr (Cell::kNormalizes)
      own[Cell::kUnitWeights + Cell::kMasks] = norm(load(to_normalize + at.r * Hp + at.u * L));
    if constexpr (Cell::kSecondGates > 0 || Cell::kNormalizes)
      for (int j = 0; j < kCellSaved<Cell>; ++j)
        kept[j] = load(first_saved + (at.r * kCellSaved<Cell> + j) * Hp + at.u * L);
    const V out = Cell::forward(x, sums, projected ? V(0) : state(h, Pp, at), own, carried, kept);
    keep(at, out, carried, kept);
  }

  // The lines that finish() will write to `saved` lie far apart: each would be a miss of its own.
  FASTRNN_INLINE void expect(int64_t r, int64_t u) const {
    for (int64_t j = 0; saved && j < saved_vectors(); ++j)
      __builtin_prefetch(saved + (r * saved_vectors() + j) * H + u * L, 1);
    for (int k = 0; saved_c && k < kCarried; ++k) __builtin_prefetch(saved_c + (r * kCarried + k) * H + u * L, 1);
  }

 private:
  FASTRNN_INLINE static V state(const T* matrix, int64_t pitch, Place at) {
    return load(matrix + at.r * pitch + at.u * L);
  }

  FASTRNN_INLINE void load_gates(V* x, Place at) const {
    for (int g = 0; g < Cell::kGates; ++g) x[g] = load(gates + at.r * Gp + g * H + at.u * L);
  }

  FASTRNN_INLINE void load_carried(V* carried, Place at) const {
    for (int k = 0; k < kCarried; ++k) carried[k] = load(c + (at.r * kCarried + k) * Hp + at.u * L);
  }

  // A finished row keeps its state.
  FASTRNN_INLINE void keep(Place at, V out, const V* carried, const V* kept) const {
    const auto [r, u] = at;
    if (!is_active(r)) return;
    store(hidden + r * Hp + u * L, out);
    for (int k = 0; k < kCarried; ++k) store(c + (r * kCarried + k) * Hp + u * L, carried[k]);
    if (saved) {
      S* const to = saved + r * saved_vectors() * H + u * L;
      for (int j = 0; j < kCellSaved<Cell>; ++j) store(to + j * H, kept[j], H - u * L);
      if (projected) store(to + Cell::kSaved * H, out, H - u * L);
    }
    for (int k = 0; saved_c && k < kCarried; ++k)
      store(saved_c + (r * kCarried + k) * H + u * L, carried[k], H - u * L);
  }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
