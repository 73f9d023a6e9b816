// The register tiles of vectors of float and double.
#include "tiles.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

constexpr int64_t kPrefetchRows = 64;  // of a panel: 8 KB of floats ahead

// A vector column of the `half`-th k of a group.
template <class T>
FASTRNN_INLINE Vec<T> load_column(const T* group, int) {
  return load(group);
}

template <class T>
FASTRNN_INLINE Vec<float> load_column(const BFloat16* group, int half) {
  return load_pairs(group, half);
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

template <class T, class W, int R, int P, int C, class E>
void multiply(Operand<E> a, const W* w, int64_t panel_stride, int64_t K, const T* init, int64_t init_stride, T* out,
              int64_t out_stride) {
  using V = Vec<T>;
  V sum[R][P * C];
  load_sums<R, P * C>(init, init_stride, sum);
  const auto add = [&](int64_t k, int half) __attribute__((always_inline)) {
    V columns[P * C];
#pragma GCC unroll 32
    for (int j = 0; j < P * C; ++j) {
      columns[j] = load_column<T>(column<T, C>(w, panel_stride, k, j), half);
      if constexpr (R > 1) hold(columns[j].raw);
    }
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
    for (int half = 0; half < kGroup<W>; ++half) add(k, half);
  }
  if (k < K) add(k, 0);
  store_sums<R, P * C>(sum, out, out_stride);
}

#if defined(__AVX512BF16__)
// The same with both operands rounded to bfloat16, two products in each lane.
template <int R, int P, int C>
void multiply_pairs(BFloat16Rows a, const BFloat16* w, int64_t panel_stride, int64_t K, const float* init,
                    int64_t init_stride, float* out, int64_t out_stride) {
  Vec<float> sum[R][P * C];
  load_sums<R, P * C>(init, init_stride, sum);
  const auto add = [&](int64_t k, auto broadcast) __attribute__((always_inline)) {
    Pairs columns[P * C];
#pragma GCC unroll 32
    for (int j = 0; j < P * C; ++j) {
      columns[j] = load_all_pairs(column<float, C>(w, panel_stride, k, j));
      if constexpr (R > 1) hold(columns[j]);
    }
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
    add(k, [](const BFloat16* pair) { return broadcast_pair(pair); });
  }
  if (k < K) add(k, [](const BFloat16* last) { return broadcast_single(last); });
  store_sums<R, P * C>(sum, out, out_stride);
}
#endif

template <class T, class E, class W>
struct Tiles {
  template <int R, int P, int C>
  static constexpr Tile<T, E, W> of = multiply<T, W, R, P, C>;
};

#if defined(__AVX512BF16__)
struct TilesOfPairs {
  template <int R, int P, int C>
  static constexpr BFloat16Tile of = multiply_pairs<R, P, C>;
};
#endif

}  // namespace

template <class T, class E, class W>
Tile<T, E, W> vector_tile(int vectors, int rows, int panels) {
  return choose_tile_of_width<Tiles<T, E, W>>(vectors, rows, panels);
}

template Tile<float, float, float> vector_tile<float, float, float>(int, int, int);
template Tile<double, double, double> vector_tile<double, double, double>(int, int, int);
template Tile<float, float, BFloat16> vector_tile<float, float, BFloat16>(int, int, int);

#if defined(__AVX512BF16__)
BFloat16Tile tile_of_pairs(int vectors, int rows, int panels) {
  return choose_tile_of_width<TilesOfPairs>(vectors, rows, panels);
}
#endif

}  // namespace fastrnn::cpu::FASTRNN_ISA
