// Sums along k, in vectors of the rows of W.
#include "unpacked.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

template <int n>
struct Constant {
  static constexpr int value = n;
};

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
      V y = load_from(w + smaller(c, last) * K + k);
      if constexpr (R > 1) hold(y.raw);
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

}  // namespace

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

#define FASTRNN_UNPACKED(E, S)                                                                                       \
  template void multiply_unpacked(int64_t, int64_t, int64_t, const E*, int64_t, const S*, const S*, Accumulator<S>*, \
                                  int64_t);
FASTRNN_UNPACKED(float, float)
FASTRNN_UNPACKED(double, double)
FASTRNN_UNPACKED(float, BFloat16)
FASTRNN_UNPACKED(float, Float16)
#if defined(__AVX512BF16__)
FASTRNN_UNPACKED(BFloat16, float)
FASTRNN_UNPACKED(BFloat16, BFloat16)
#endif

}  // namespace fastrnn::cpu::FASTRNN_ISA
