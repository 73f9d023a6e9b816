// What a product does for any cell: packing, and blocks of rows, columns and k.
#include "gemm.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

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

}  // namespace

template <class W, class S>
void pack(W* packed, Matrix<S> source, int64_t K, int64_t N) {
  constexpr int64_t width = kPlain * kLanes<Accumulator<S>>;
  for (int64_t n = 0; n < N; n += width)
    pack_panel(packed + n * panel_depth<W>(K), source.from_column(n), K, smaller(width, N - n), width, width);
}

template <class W, class S>
void pack_gates(W* packed, Matrix<S> source, int64_t K, int64_t H, int gates, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<Accumulator<S>>;
  const int64_t width = gate_panel(gates);
  for (int64_t u = begin; u < end; u += L)
    for (int64_t g = 0; g < gates; ++g)
      pack_panel(packed + (u * gates + g / width * width * L) * panel_depth<W>(K) + g % width * L * kGroup<W>,
                 source.from_column(g * H + u), K, smaller(L, H - u), L, width * L);
}

template <class T, class E, class W>
void gemm_panels(int64_t rows, int64_t columns, int panels, int64_t panel_stride, int64_t K, Operand<E> a, const W* w,
                 Init<T> init, T* c, int64_t ldc) {
  constexpr int64_t width = kPlain * kLanes<T>;
  constexpr int64_t kRows = larger(Tiling<kPlain>::kMaxRows, kInPairs<E> ? kMatrixRows : 0);
  const int64_t most = max_rows<E, kPlain>();
  T edge_init[kRows * width], edge[kRows * width];
  for (int64_t r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r, most);
    const auto tile = tile_for<T, E, W>(kPlain, int(n), panels);
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

#define FASTRNN_PACK(W, S)                                   \
  template void pack<W, S>(W*, Matrix<S>, int64_t, int64_t); \
  template void pack_gates<W, S>(W*, Matrix<S>, int64_t, int64_t, int, int64_t, int64_t);
FASTRNN_PACK(float, float)
FASTRNN_PACK(double, double)
FASTRNN_PACK(float, BFloat16)
FASTRNN_PACK(float, Float16)
FASTRNN_PACK(BFloat16, float)
FASTRNN_PACK(BFloat16, BFloat16)
FASTRNN_PACK(Int8Lane, float)

#define FASTRNN_GEMM(T, E, W)                                                                                     \
  template void gemm_panels(int64_t, int64_t, int, int64_t, int64_t, Operand<E>, const W*, Init<T>, T*, int64_t); \
  template void gemm(int64_t, int64_t, int64_t, Operand<E>, const W*, Init<T>, T*, int64_t);
FASTRNN_GEMM(float, float, float)
FASTRNN_GEMM(double, double, double)
FASTRNN_GEMM(float, float, BFloat16)
FASTRNN_GEMM(float, int8_t, Int8Lane)
#if defined(__AVX512BF16__)
FASTRNN_GEMM(float, BFloat16, BFloat16)
#endif

}  // namespace fastrnn::cpu::FASTRNN_ISA
