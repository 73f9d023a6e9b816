// The one matrix product of the CPU backend: out = init + A * W, with W packed beforehand.
//
// Packing. W [K, N] is cut into panels of C columns of vectors, L lanes each; a panel is stored [K][C][L], so that one
// step of k reads C whole vectors in order. Columns past N are zero. In the product of a recurrent step a panel holds
// the same L units of every gate (C = gates); elsewhere C = 2. The elements of panels are of the type W: T itself, or
// for float products BFloat16, stored in pairs of k, [K/2][C][L][2], so that a shift or a mask of whole vectors widens
// them, or an instruction that multiplies pairs takes them as they are; or Int8Lane (int8.h).
//
// T is the type of sums, E that of A: T, or with such an instruction BFloat16; with Int8Lane int8_t.
//
// Every element of the result is one chain of fused multiply-adds over k = 0, 1, ... in blocks of kBlockK (int8: one
// sum of integers; a matrix unit: of groups of kMatrixDepth products), whatever the size of the tile it falls into: the
// bits do not depend on how rows and columns are shared among threads.
#pragma once

#include "matrix_unit.h"
#include "quantize.h"
#include "vec.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kBlockK = 256;  // a plain panel's block of k is 32 KB of floats: it stays in L1
constexpr int64_t kBlockM = 96;
constexpr int64_t kPrefetchRows = 64;                     // of a panel: 8 KB of floats ahead
constexpr int kPlain = 2;                                 // vectors in a panel of a plain product
constexpr int kAccumulators = FASTRNN_REGISTERS * 3 / 4;  // the rest hold the current vectors of A and W

template <class T>
constexpr int kLanes = Vec<T>::kLanes;

// How many elements a panel stores side by side in a lane.
template <class W>
constexpr int kGroup = 1;
template <>
inline constexpr int kGroup<BFloat16> = 2;

template <int n>
struct Constant {
  static constexpr int value = n;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How many k a product takes at a time: blocks of equal size, since a short one is hardly worth its start and end.
inline int64_t block_of(int64_t K) {
  const int64_t blocks = (K + kBlockK - 1) / kBlockK;
  return K <= kBlockK ? larger(1, K) : round_up((K + blocks - 1) / blocks, kMatrixDepth);
}

template <class W>
constexpr bool kIsInt8 = false;
template <>
inline constexpr bool kIsInt8<Int8Lane> = true;

// Elements of a panel of K rows, for each of its columns.
template <class W>
constexpr int64_t panel_depth(int64_t K) {
  return kIsInt8<W> ? (K + 3) / 4 + 2 : round_up(K, kGroup<W>);
}

// Elements from one row of a scratch matrix to the next: whole vectors, and not a multiple of 512 bytes, since rows
// that lie a large power of two apart share few sets of the cache and evict each other.
template <class T>
constexpr int64_t pitch_of(int64_t columns) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  return (vectors * int64_t(sizeof(Vec<T>)) % 512 ? vectors : vectors + 1) * kLanes<T>;
}

// What products read of inputs, states and gate gradients of a layer whose storage type is S.
template <class S>
struct ElementOf {
  using type = Accumulator<S>;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <class S>
using Element = typename ElementOf<S>::type;

// The same where products may round float32 numbers to bfloat16.
#if defined(__AVX512BF16__)
using RoundedElement = BFloat16;
#else
using RoundedElement = float;
#endif

// Whether products take elements two at a time.
template <class E>
constexpr bool kInPairs = false;
template <>
inline constexpr bool kInPairs<BFloat16> = true;

// A is read as a[row * row_stride + k * k_stride].
template <class E>
struct Operand {
  const E* data;
  int64_t row_stride, k_stride;

  Operand at(int64_t row, int64_t k) const { return {data + row * row_stride + k * k_stride, row_stride, k_stride}; }
};

template <>
struct Operand<BFloat16> : BFloat16Rows {
  Operand at(int64_t row, int64_t k) const { return {{data + row * row_stride + k, row_stride}}; }
};

template <>
struct Operand<int8_t> : Int8Rows {
  Operand at(int64_t row, int64_t /*k: 0*/) const { return {{data + row * row_stride, row_stride, scales + row}}; }
};

template <class A>
constexpr bool kMultipliesPairs = false;
template <>
inline constexpr bool kMultipliesPairs<Operand<BFloat16>> = true;

// A matrix whose rows lie `pitch` apart.
template <class E>
Operand<E> rows_of(const E* data, int64_t pitch) {
  if constexpr (kInPairs<E>) {
    return {{data, pitch}};
  } else {
    return {data, pitch, 1};
  }
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

// ---- the register tile

// How many rows, and how many panels, one tile takes for panels of C vectors. Tall tiles reuse each vector of W most;
// few rows take several panels together, to keep the 8 sums in flight that hide the latency of the multiply-add.
template <int C>
struct Tiling {
  static constexpr int kTallPanels = C == 1 ? 2 : 1;
  static constexpr int kMaxRows = int(kAccumulators / (kTallPanels * C) < 12 ? kAccumulators / (kTallPanels * C) : 12);
  static constexpr int kFewRows = 3;

  // At most; a tile of fewer panels is there as well.
  static constexpr int panels(int64_t rows) {
    if (rows < 1 || rows > kFewRows) return kTallPanels;
    const int sums = int(rows) * C, enough = (8 + sums - 1) / sums;
    return enough > kTallPanels ? enough : kTallPanels;
  }
};

// A vector column of the `half`-th k of a group.
template <class T>
FASTRNN_INLINE Vec<T> load_column(const T* group, int) {
  return load(group);
}

template <class T>
FASTRNN_INLINE Vec<float> load_column(const BFloat16* group, int half) {
  return load_pairs(group, half);
}

// Vector j of row k of panels of C vectors; k is the first of a group.
template <class T, int C, class W>
FASTRNN_INLINE const W* column(const W* w, int64_t panel_stride, int64_t k, int j) {
  return w + (j / C) * panel_stride + kLanes<T> * (k * C + j % C * kGroup<W>);
}

// Brings row k of panels into L2, for tiles of so many rows that there is time for it: what a processor prefetches by
// itself ends with a page of memory.
template <class T, int R, int P, int C, class W>
FASTRNN_INLINE void prefetch_row(const W* w, int64_t panel_stride, int64_t k) {
  if constexpr (R > Tiling<C>::kFewRows) {
#pragma GCC unroll 32
    for (int j = 0; j < P * C; ++j) __builtin_prefetch(column<T, C>(w, panel_stride, k, j), 0, 2);
  }
}

template <int R, int J, class T>
FASTRNN_INLINE void load_sums(const T* init, int64_t init_stride, Vec<T> (&sum)[R][J]) {
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
    for (int j = 0; j < J; ++j) sum[r][j] = init ? load(init + r * init_stride + j * kLanes<T>) : Vec<T>(0);
}

template <int R, int J, class T>
FASTRNN_INLINE void store_sums(const Vec<T> (&sum)[R][J], T* out, int64_t out_stride) {
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
    for (int j = 0; j < J; ++j) store(out + r * out_stride + j * kLanes<T>, sum[r][j]);
}

// out[r][p*C + c] = init[r][p*C + c] + sum_k A[r, k] * panel p [k][c], for R rows, P panels, C vectors each.
// `init_stride` 0 gives every row the same start; init null starts at 0. Panels lie `panel_stride` apart.
template <class T, class W, int R, int P, int C, class E>
void tile(Operand<E> a, const W* w, int64_t panel_stride, int64_t K, const T* init, int64_t init_stride, T* out,
          int64_t out_stride) {
  using V = Vec<T>;
  V sum[R][P * C];
  load_sums<R, P * C>(init, init_stride, sum);
  const auto multiply = [&](int64_t k, int half) __attribute__((always_inline)) {
    V columns[P * C];
#pragma GCC unroll 32
    for (int j = 0; j < P * C; ++j) columns[j] = load_column<T>(column<T, C>(w, panel_stride, k, j), half);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const V element(a.data[r * a.row_stride + (k + half) * a.k_stride]);
#pragma GCC unroll 32
      for (int j = 0; j < P * C; ++j) sum[r][j] = fma(element, columns[j], sum[r][j]);
    }
  };
  int64_t k = 0;
  for (; k + kGroup<W> <= K; k += kGroup<W>) {
    prefetch_row<T, R, P, C>(w, panel_stride, k + kPrefetchRows);
#pragma GCC unroll 2
    for (int half = 0; half < kGroup<W>; ++half) multiply(k, half);
  }
  if (k < K) multiply(k, 0);
  store_sums<R, P * C>(sum, out, out_stride);
}

#if defined(__AVX512BF16__)
// The same with both operands rounded to bfloat16, two products in each lane.
template <int R, int P, int C>
void tile_of_pairs(BFloat16Rows a, const BFloat16* w, int64_t panel_stride, int64_t K, const float* init,
                   int64_t init_stride, float* out, int64_t out_stride) {
  Vec<float> sum[R][P * C];
  load_sums<R, P * C>(init, init_stride, sum);
  const auto multiply = [&](int64_t k, auto broadcast) __attribute__((always_inline)) {
    Pairs columns[P * C];
#pragma GCC unroll 32
    for (int j = 0; j < P * C; ++j) columns[j] = load_all_pairs(column<float, C>(w, panel_stride, k, j));
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const Pairs element = broadcast(a.data + r * a.row_stride + k);
#pragma GCC unroll 32
      for (int j = 0; j < P * C; ++j) sum[r][j] = multiply_add_pairs(element, columns[j], sum[r][j]);
    }
  };
  int64_t k = 0;
  for (; k + 2 <= K; k += 2) {
    prefetch_row<float, R, P, C>(w, panel_stride, k + kPrefetchRows);
    multiply(k, [](const BFloat16* pair) { return broadcast_pair(pair); });
  }
  if (k < K) multiply(k, [](const BFloat16* last) { return broadcast_single(last); });
  store_sums<R, P * C>(sum, out, out_stride);
}
#endif

// How many of so many rows are taken next, at most `most`: parts of about equal size, since a low tile hides no
// latency.
constexpr int64_t next_rows(int64_t rows, int64_t most) {
  if (rows <= most) return rows;
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// Rows of a tile of panels of C vectors, at most; A is the type of the operand.
template <class A, int C>
int64_t max_rows() {
#if defined(__AVX512BF16__)
  if (kMultipliesPairs<A> && uses_matrix_unit()) return kMatrixRows;
#endif
  return Tiling<C>::kMaxRows;
}

// Vectors in a panel of C gates. Two are enough to use the registers, and a tile of more rows reads each of them less
// often from L2.
template <int C>
constexpr int kGatePanel = C % 2 ? C : 2;

// Tiles::of<R, P, C> for any number of rows from R to kMost.
template <class Tiles, int P, int C, int kMost, int R = 1>
auto tile_of_rows(int rows) {
  if constexpr (R < kMost) {
    return rows == R ? Tiles::template of<R, P, C> : tile_of_rows<Tiles, P, C, kMost, R + 1>(rows);
  } else {
    return Tiles::template of<R, P, C>;
  }
}

template <class Tiles, int R, int C, int P>
auto tile_of_panels(int panels) {
  if constexpr (P > 1) {
    return panels == P ? Tiles::template of<R, P, C> : tile_of_panels<Tiles, R, C, P - 1>(panels);
  } else {
    return Tiles::template of<R, 1, C>;
  }
}

// The tile for 1 to kMost rows and for 1 to Tiling<C>::panels(rows) panels.
template <class Tiles, int C, int kMost = Tiling<C>::kMaxRows>
auto choose_tile(int rows, int panels) {
  using Shape = Tiling<C>;
  if (rows == 1) return tile_of_panels<Tiles, 1, C, Shape::panels(1)>(panels);
  if (rows == 2) return tile_of_panels<Tiles, 2, C, Shape::panels(2)>(panels);
  if (rows == 3) return tile_of_panels<Tiles, 3, C, Shape::panels(3)>(panels);
  return panels == 1 ? tile_of_rows<Tiles, 1, C, kMost>(rows) : tile_of_rows<Tiles, Shape::kTallPanels, C, kMost>(rows);
}

// The same for a number of vectors in a panel that is not known before.
template <class Tiles, int... kMost>
auto choose_tile_of_width(int vectors, int rows, int panels) {
  switch (vectors) {
    case 1:
      return choose_tile<Tiles, 1, kMost...>(rows, panels);
    case 2:
      return choose_tile<Tiles, 2, kMost...>(rows, panels);
    case 3:
      return choose_tile<Tiles, 3, kMost...>(rows, panels);
    default:
      return choose_tile<Tiles, 4, kMost...>(rows, panels);
  }
}

template <class T, class A, class W>
struct PlainTiles {
  using Function = void (*)(A, const W*, int64_t, int64_t, const T*, int64_t, T*, int64_t);
  template <int R, int P, int C>
  static constexpr Function of = tile<T, W, R, P, C>;
};

#if defined(__AVX512BF16__)
struct TilesOfPairs {
  template <int R, int P, int C>
  static constexpr BFloat16Tile of = tile_of_pairs<R, P, C>;
};

template <int C>
BFloat16Tile choose_tile_of_pairs(int rows, int panels) {
  return uses_matrix_unit() ? matrix_tile(C, rows, panels) : choose_tile<TilesOfPairs, C>(rows, panels);
}
#endif

// A is the type of the operand.
template <class T, class A, class W, int C>
auto tile_for(int rows, int panels) {
  if constexpr (kIsInt8<W>) {
    return cpu::int8_tile(C, rows, panels);
#if defined(__AVX512BF16__)
  } else if constexpr (kMultipliesPairs<A>) {
    return choose_tile_of_pairs<C>(rows, panels);
#endif
  } else {
    return choose_tile<PlainTiles<T, A, W>, C>(rows, panels);
  }
}

// ---- without packing

// out[r][c] = bias[c] + sum_k A[r][k] * W[c][k] for R rows of A and `count` <= L / R of W, which is read as the caller
// stores it. L sums over vectors of k are transposed at the end, so that each lane adds up one of them, for any R in
// the same order.
template <int R, class T, class E, class S>
FASTRNN_INLINE void dot_rows(const E* a, int64_t lda, const S* w, int64_t K, int64_t count, const S* bias, T* out,
                             int64_t ldo) {
  using V = Vec<T>;
  constexpr int L = V::kLanes, C = L / R;
  V sum[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) sum[i] = V(0);
  const int64_t last = count - 1;  // stands in for the rows that are not there
  const auto add = [&](int64_t k, auto load_from) __attribute__((always_inline)) {
    V x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = load_from(a + r * lda + k);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const V y = load_from(w + smaller(c, last) * K + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r * C + c] = fma(y, x[r], sum[r * C + c]);
    }
  };
  int64_t k = 0;
  for (; k + L <= K; k += L) add(k, [](const auto* p) __attribute__((always_inline)) { return load(p); });
  if (k < K) add(k, [=](const auto* p) __attribute__((always_inline)) { return load(p, K - k); });
  transpose(sum);
#pragma GCC unroll 16
  for (int i = 1; i < L; ++i) sum[0] = sum[0] + sum[i];
  if constexpr (R == 1) {
    store(out, bias ? sum[0] + load(bias, count) : sum[0], count);
  } else {
    T total[L];
    store(total, sum[0]);
    for (int r = 0; r < R; ++r)
      for (int64_t c = 0; c < count; ++c) out[r * ldo + c] = total[r * C + c] + (bias ? widen(bias[c]) : T(0));
  }
}

// The same for `count` <= L rows of W.
template <int R, class T, class E, class S>
void dot_block(const E* a, int64_t lda, const S* w, int64_t K, int64_t count, const S* bias, T* out, int64_t ldo) {
  constexpr int64_t C = kLanes<T> / R;
  for (int64_t c = 0; c < count; c += C)
    dot_rows<R>(a, lda, w + c * K, K, smaller(C, count - c), bias ? bias + c : nullptr, out + c, ldo);
}

// out [M, N] = bias + A [M, K] * W^T, W [N, K] unpacked: for so few rows that packing W would cost more than it saves.
// L rows of W are read by all rows while they are in L1.
template <class T, class E, class S>
void multiply_unpacked(int64_t M, int64_t N, int64_t K, const E* a, int64_t lda, const S* w, const S* bias, T* out,
                       int64_t ldo) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t n = 0; n < N; n += L) {
    const int64_t count = smaller(L, N - n);
    const auto block = [&](auto rows, int64_t m) {
      constexpr int R = decltype(rows)::value;
      dot_block<R>(a + m * lda, lda, w + n * K, K, count, bias ? bias + n : nullptr, out + m * ldo + n, ldo);
    };
    int64_t m = 0;
    if constexpr (L >= 16)
      for (; m + 4 <= M; m += 4) block(Constant<4>{}, m);
    if constexpr (L >= 4)
      for (; m + 2 <= M; m += 2) block(Constant<2>{}, m);
    for (; m < M; ++m) block(Constant<1>{}, m);
  }
}

// ---- packing

// Element (k, n) of W lies at data[k + n * n_stride].
template <class S>
struct Matrix {
  const S* data;
  int64_t n_stride;

  Matrix from_column(int64_t n) const { return {data + n * n_stride, n_stride}; }
};

// use(k, n, block) for every block of L x L of W [K, N], transposed in registers: block[i] has columns n to n + L of
// row k + i. What K and N leave over is up to the caller.
template <class T, class S, class Use>
FASTRNN_INLINE void each_block(Matrix<S> source, int64_t K, int64_t N, Use use) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t n = 0; n + L <= N; n += L) {
    for (int64_t k = 0; k + L <= K; k += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = load(source.data + (n + i) * source.n_stride + k);
      transpose(block);
      use(k, n, block);
    }
  }
}

// One panel, or one vector column of it: columns [0, count) of `source`, zeros up to `width`, rows `pitch` apart.
template <class T, class S>
void pack_panel(T* panel, Matrix<S> source, int64_t K, int64_t count, int64_t width, int64_t pitch) {
  constexpr int64_t L = kLanes<T>;
  each_block<T>(source, K, count, [&](int64_t k, int64_t n, const Vec<T>* block) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(panel + (k + i) * pitch + n, block[i]);
  });
  for (int64_t n = 0; n < width; ++n)
    for (int64_t k = n < count / L * L ? K / L * L : 0; k < K; ++k)
      panel[k * pitch + n] = n < count ? widen(source.data[k + n * source.n_stride]) : T(0);
}

// The same in pairs of k. A last k without a partner is paired with zeros.
template <class S>
void pack_panel(BFloat16* panel, Matrix<S> source, int64_t K, int64_t count, int64_t width, int64_t pitch) {
  constexpr int64_t L = kLanes<float>;
  each_block<float>(source, K, count,
                    [&](int64_t k, int64_t n, const Vec<float>* block) __attribute__((always_inline)) {
#pragma GCC unroll 8
                      for (int i = 0; i < L; i += 2)
                        store_pairs(panel + (k + i) * pitch + 2 * n, block[i], block[i + 1]);
                    });
  for (int64_t n = 0; n < width; ++n)
    for (int64_t k = n < count / L * L ? K / L * L : 0; k < round_up(K, 2); ++k)
      narrow(k < K && n < count ? widen(source.data[k + n * source.n_stride]) : 0.0f,
             panel + k / 2 * 2 * pitch + 2 * n + k % 2);
}

// Quantized: every column of W, a row of `source`, has a quantum of its own.
inline void pack_panel(Int8Lane* panel, Matrix<float> source, int64_t K, int64_t count, int64_t width, int64_t pitch) {
  const int64_t depth = (K + 3) / 4;
  for (int64_t n = 0; n < width; ++n) {
    const float* const column = source.data + n * source.n_stride;
    const Grid grid = n < count ? weight_grid(column, K) : Grid{};
    int32_t sum = 0;
    for (int64_t k = 0; k < 4 * depth; ++k) {
      const int8_t q = k < K && grid.inverse > 0.0f ? to_int8(column[k], grid.inverse) : int8_t(0);
      panel[k / 4 * pitch + n].weights[k % 4] = q;
      sum += q;
    }
    panel[depth * pitch + n].offset = -128 * sum;
    panel[(depth + 1) * pitch + n].scale = grid.quantum;
  }
}

// Elements of all plain panels of W [K, N].
template <class W>
int64_t plain_size(int64_t K, int64_t N, int64_t lanes) {
  return panel_depth<W>(K) * round_up(N, kPlain * lanes);
}

// All plain panels of W [K, N].
template <class T, class W, class S>
void pack(W* packed, Matrix<S> source, int64_t K, int64_t N) {
  constexpr int64_t width = kPlain * kLanes<T>;
  for (int64_t n = 0; n < N; n += width)
    pack_panel(packed + n * panel_depth<W>(K), source.from_column(n), K, smaller(width, N - n), width, width);
}

// Elements of all panels of `gates` gates of W [K, gates*H].
template <class W>
int64_t gates_size(int64_t K, int64_t H, int64_t gates, int64_t lanes) {
  return panel_depth<W>(K) * gates * round_up(H, lanes);
}

// All of them: L units of every gate together, kGatePanel<C> gates in a panel.
template <class T, int C, class W, class S>
void pack_gates(W* packed, Matrix<S> source, int64_t K, int64_t H) {
  constexpr int64_t L = kLanes<T>, width = kGatePanel<C>;
  for (int64_t u = 0; u < H; u += L)
    for (int64_t g = 0; g < C; ++g)
      pack_panel(packed + (u * C + g / width * width * L) * panel_depth<W>(K) + g % width * L * kGroup<W>,
                 source.from_column(g * H + u), K, smaller(L, H - u), L, width * L);
}

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
                 Init<T> init, T* c, int64_t ldc) {
  constexpr int64_t width = kPlain * kLanes<T>;
  constexpr int64_t kRows = larger(Tiling<kPlain>::kMaxRows, kInPairs<E> ? kMatrixRows : 0);
  const int64_t most = max_rows<Operand<E>, kPlain>();
  T edge_init[kRows * width], edge[kRows * width];
  for (int64_t r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r, most);
    const auto tile = tile_for<T, Operand<E>, W, kPlain>(int(n), panels);
    const T* start = init.data ? init.data + r * init.stride : nullptr;
    if (columns == panels * width) {
      tile(a.at(r, 0), w, panel_stride, K, start, init.stride, c + r * ldc, ldc);
      continue;
    }
    for (int64_t i = 0; start && i < n; ++i) convert(edge_init + i * width, start + i * init.stride, columns);
    tile(a.at(r, 0), w, panel_stride, K, start ? edge_init : nullptr, width, edge, width);
    for (int64_t i = 0; i < n; ++i) convert(c + (r + i) * ldc, edge + i * width, columns);
  }
}

// C [M, N] = init + A [M, K] * W, W in plain panels.
template <class T, class E, class W>
void gemm(int64_t M, int64_t N, int64_t K, Operand<E> a, const W* packed, Init<T> init, T* c, int64_t ldc) {
  constexpr int64_t width = kPlain * kLanes<T>;
  const int64_t depth = panel_depth<W>(K), block = kIsInt8<W> ? larger(1, K) : block_of(K);
  for (int64_t m = 0; m < M; m += kBlockM) {
    const int64_t rows = smaller(kBlockM, M - m);
    for (int64_t k = 0; k == 0 || k < K; k += block) {
      const Init<T> from = k ? Init<T>{c, ldc} : init;
      int64_t columns;
      for (int64_t n = 0; n < N; n += columns) {
        const int panels = int(larger(1, smaller(Tiling<kPlain>::panels(rows), (N - n) / width)));
        columns = smaller(panels * width, N - n);
        const Init<T> start{from.data ? from.data + m * from.stride + n : nullptr, from.stride};
        gemm_panels(rows, columns, panels, depth * width, smaller(block, K - k), a.at(m, k),
                    packed + n * depth + k * width, start, c + m * ldc + n, ldc);
      }
    }
  }
}

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
