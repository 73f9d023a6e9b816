// What the cell computes in one step of the forward pass, for a range of rows, and where it reads and writes.
#pragma once

#include "gemm.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Vector u of row r.
struct Place {
  int64_t r, u;
};

// Passed by value into the loops over rows and units: the compiler has to expect that a store changes what it can reach
// by a pointer, such as the members of an object, and would read each of them again for every vector. The functions
// take one place, and then V is Vec<T>, or two, and then it is Pair<T>.
template <class Cell, class S, class E>
struct Pointwise {
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kFirst = Cell::kGates - Cell::kSecondGates;

  const T* gates;          // [n, Gp] input products
  const T* h;              // [n, Pp] h_{t-1}; with a projection it has other dimensions, and no such cell reads it
  T* c;                    // [n, Hp]
  T* hidden;               // [n, Hp] what the cell puts out
  E* operand;              // [n, Hp] of a two-phase cell
  T* first_saved;          // [n, S, Hp] of a two-phase cell
  S* saved;                // [n, vectors, H] what backward reads, or null
  T* saved_c;              // [n, H], or null
  const int64_t* lengths;  // [n], or null
  int64_t t, H, Gp, Pp, Hp;
  bool projected;

  int64_t saved_vectors() const { return Cell::kSaved + projected; }
  bool is_active(int64_t r) const { return !lengths || t < lengths[r]; }

  // The first phase of a two-phase cell; sums [kFirst].
  template <class V, class... At>
  FASTRNN_INLINE void first(const V* sums, At... at) const {
    V x[Cell::kGates], kept[Cell::kSaved];
    for (V& v : kept) v = V(0);
    load_gates(x, at...);
    scatter(operand, Hp, Cell::first(x, sums, gather(h, Pp, at...), kept), at...);
    for (int j = 0; j < Cell::kSaved; ++j) scatter(first_saved + j * Hp, Cell::kSaved * Hp, kept[j], at...);
  }

  // The second phase; sums [kSecondGates].
  template <class V, class... At>
  FASTRNN_INLINE void second(const V* sums, At... at) const {
    V all[Cell::kGates];
    for (int g = 0; g < Cell::kSecondGates; ++g) all[kFirst + g] = sums[g];
    finish(all, at...);
  }

  // The only phase, or the end of the second; sums [kGates].
  template <class V, class... At>
  FASTRNN_INLINE void finish(const V* sums, At... at) const {
    V x[Cell::kGates], kept[Cell::kSaved];
    load_gates(x, at...);
    if constexpr (Cell::kSecondGates > 0)
      for (int j = 0; j < Cell::kSaved; ++j) kept[j] = gather(first_saved + j * Hp, Cell::kSaved * Hp, at...);
    V new_c = gather(c, Hp, at...);
    const V out = Cell::forward(x, sums, projected ? V(0) : gather(h, Pp, at...), new_c, kept);
    keep_all(out, new_c, kept, at...);
  }

  // The lines that finish() will write to `saved` lie far apart: each would be a miss of its own.
  FASTRNN_INLINE void expect(int64_t r, int64_t u) const {
    for (int64_t j = 0; saved && j < saved_vectors(); ++j)
      __builtin_prefetch(saved + (r * saved_vectors() + j) * H + u * L, 1);
    if (Cell::kHasCell && saved_c) __builtin_prefetch(saved_c + r * H + u * L, 1);
  }

  // Backward never reads a finished row, but the same call should leave the same bits.
  void save_nothing(int64_t r) const {
    if (saved) memset(saved + r * saved_vectors() * H, 0, size_t(saved_vectors() * H) * sizeof(S));
    if (Cell::kHasCell && saved_c) memset(saved_c + r * H, 0, size_t(H) * sizeof(T));
  }

 private:
  FASTRNN_INLINE static Vec<T> gather(const T* matrix, int64_t pitch, Place at) {
    return load(matrix + at.r * pitch + at.u * L);
  }
  FASTRNN_INLINE static Pair<T> gather(const T* matrix, int64_t pitch, Place at, Place other) {
    return {gather(matrix, pitch, at), gather(matrix, pitch, other)};
  }

  template <class N>
  FASTRNN_INLINE static void scatter(N* matrix, int64_t pitch, Vec<T> v, Place at) {
    store(matrix + at.r * pitch + at.u * L, v);
  }
  template <class N>
  FASTRNN_INLINE static void scatter(N* matrix, int64_t pitch, Pair<T> v, Place at, Place other) {
    scatter(matrix, pitch, v.first, at);
    scatter(matrix, pitch, v.second, other);
  }

  template <class V, class... At>
  FASTRNN_INLINE void load_gates(V* x, At... at) const {
    for (int g = 0; g < Cell::kGates; ++g) x[g] = gather(gates + g * H, Gp, at...);
  }

  FASTRNN_INLINE void keep_all(Vec<T> out, Vec<T> new_c, const Vec<T>* kept, Place at) const {
    keep(at, out, new_c, [kept](int j) { return kept[j]; });
  }
  FASTRNN_INLINE void keep_all(Pair<T> out, Pair<T> new_c, const Pair<T>* kept, Place at, Place other) const {
    keep(at, out.first, new_c.first, [kept](int j) { return kept[j].first; });
    keep(other, out.second, new_c.second, [kept](int j) { return kept[j].second; });
  }

  // A finished row keeps its state.
  template <class Kept>
  FASTRNN_INLINE void keep(Place at, Vec<T> out, Vec<T> new_c, Kept kept) const {
    const auto [r, u] = at;
    if (!is_active(r)) return;
    store(hidden + r * Hp + u * L, out);
    if (Cell::kHasCell) store(c + r * Hp + u * L, new_c);
    if (saved) {
      S* const to = saved + r * saved_vectors() * H + u * L;
      for (int j = 0; j < Cell::kSaved; ++j) store(to + j * H, kept(j), H - u * L);
      if (projected) store(to + Cell::kSaved * H, out, H - u * L);
    }
    if (Cell::kHasCell && saved_c) store(saved_c + r * H + u * L, new_c, H - u * L);
  }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
