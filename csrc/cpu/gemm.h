// The one matrix product of the CPU backend: out = init + A * W, with W packed beforehand (panels.h).
//
// T is the type of sums, E that of A, W that of panels.
//
// Every element of the result is one chain of multiply-adds over k (tiles.h), in blocks of kBlockK: the bits do not
// depend on how rows and columns are shared among threads.
#pragma once

#include "tiles.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kBlockK = 256;  // a plain panel's block of k is 32 KB of floats: it stays in L1
constexpr int64_t kBlockM = 96;

// How many k a product takes at a time: blocks of equal size, since a short one is hardly worth its start and end.
inline int64_t block_of(int64_t K) {
  const int64_t blocks = (K + kBlockK - 1) / kBlockK;
  return K <= kBlockK ? larger(1, K) : round_up((K + blocks - 1) / blocks, kMatrixDepth);
}

// A task whose products are of elements E holds one.
template <class E>
struct MatrixUnit {
  ~MatrixUnit() {
#if defined(__AVX512BF16__)
    if (kInPairs<E>) release_matrix_unit();
#endif
  }
};

// ---- packing

// Element (k, n) of W lies at data[k + n * n_stride].
template <class S>
struct Matrix {
  const S* data;
  int64_t n_stride;

  Matrix from_column(int64_t n) const { return {data + n * n_stride, n_stride}; }
};

// Elements of all plain panels of W [K, N].
template <class W>
int64_t plain_size(int64_t K, int64_t N, int64_t lanes) {
  return panel_depth<W>(K) * round_up(N, kPlain * lanes);
}

// All plain panels of W [K, N].
template <class W, class S>
void pack(W* packed, Matrix<S> source, int64_t K, int64_t N);

// Elements of all panels of `gates` gates of W [K, gates*H].
template <class W>
int64_t gates_size(int64_t K, int64_t H, int64_t gates, int64_t lanes) {
  return panel_depth<W>(K) * gates * round_up(H, lanes);
}

// Those of units [begin, end), whole vectors or up to H, to where they lie among all of them: L units of every gate
// together, gate_panel(gates) gates in a panel.
template <class W, class S>
void pack_gates(W* packed, Matrix<S> source, int64_t K, int64_t H, int gates, int64_t begin, int64_t end);

// The plain panels of W [K, N], given by its rows: row(k), or null for zeros, called once for each k in order.
template <class T, class Row>
void pack_rows(T* packed, int64_t K, int64_t N, Row row) {
  constexpr int64_t L = kLanes<T>, width = kPlain * L;
  for (int64_t k = 0; k < K; ++k) {
    const auto* from = row(k);
    for (int64_t n = 0; n < N; n += width)
#pragma GCC unroll 2
      for (int64_t j = 0; j < width; j += L)
        store(packed + n * K + k * width + j, from && n + j < N ? load(from + n + j, N - n - j) : Vec<T>(0));
  }
}

template <class Row>
void pack_rows(BFloat16* packed, int64_t K, int64_t N, Row row) {
  constexpr int64_t L = kLanes<float>, width = kPlain * L;
  const int64_t depth = round_up(K, 2), vectors = round_up(N, width) / L;
  const auto load_from = [N](const auto* from, int64_t n) {
    return from && n < N ? load(from + n, N - n) : Vec<float>(0);
  };
  for (int64_t k = 0; k < K; k += 2) {
    const auto *first = row(k), *second = k + 1 < K ? row(k + 1) : nullptr;
    for (int64_t v = 0; v < vectors; ++v)
      store_pairs(packed + v / kPlain * width * depth + k * width + v % kPlain * 2 * L, load_from(first, v * L),
                  load_from(second, v * L));
  }
}

// ---- the product

// Where a product starts from.
template <class T>
struct Init {
  const T* data;   // null: zero
  int64_t stride;  // between rows; 0: the same for all
};

// `rows` rows of `panels` whole panels, panel_stride apart, or of the first `columns` columns of the last panel; one
// block of k.
template <class T, class E, class W>
void gemm_panels(int64_t rows, int64_t columns, int panels, int64_t panel_stride, int64_t K, Operand<E> a, const W* w,
                 Init<T> init, T* c, int64_t ldc);

// C [M, N] = init + A [M, K] * W, W in plain panels.
template <class T, class E, class W>
void gemm(int64_t M, int64_t N, int64_t K, Operand<E> a, const W* packed, Init<T> init, T* c, int64_t ldc);

// The same of a W that no other product reads: row(k) is its row k, and each block of a panel is packed when its turn
// comes, in `panel`, of kBlockOfPanels elements.
template <class E>
constexpr int64_t kBlockOfPanels = kBlockK * Tiling<kPlain>::panels(1) * kPlain * kLanes<Accumulator<E>>;

template <class T, class E, class Row>
void gemm_of_rows(int64_t M, int64_t N, int64_t K, Operand<E> a, Row row, E* panel, Init<T> init, T* c, int64_t ldc) {
  constexpr int64_t width = kPlain * kLanes<T>;
  const int64_t block = block_of(K);
  for (int64_t k = 0; k == 0 || k < K; k += block) {
    const int64_t depth = smaller(block, K - k);
    const Init<T> from = k ? Init<T>{c, ldc} : init;
    int64_t columns;
    for (int64_t n = 0; n < N; n += columns) {
      const int panels = int(larger(1, smaller(Tiling<kPlain>::panels(M), (N - n) / width)));
      columns = smaller(panels * width, N - n);
      pack_rows(panel, depth, columns, [&](int64_t i) { return row(k + i) + n; });
      const Init<T> start{from.data ? from.data + n : nullptr, from.stride};
      gemm_panels(M, columns, panels, round_up(depth, kGroup<E>) * width, depth, a.at(0, k), panel, start, c + n, ldc);
    }
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
