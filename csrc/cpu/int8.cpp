// The register tiles of int8 products, once for every instruction set that has instructions of its own for them.
#include "int8.h"

#include "kernels.h"
#include "tiles.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

// L sums, and four int8 numbers in each lane.
typedef int32_t Sums __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

constexpr int64_t L = kLanes<float>;

template <class V>
FASTRNN_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// How an instruction set multiplies: what it makes of a vector of weights once for all rows, and of four numbers of a
// row; sum + the products of both, four to a lane. kOffset: whether sums start from the offsets in the panel.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// The instruction takes one operand without sign: a row's numbers are raised by 128, which the offset takes back.
constexpr bool kOffset = true;
using Weights4 = Bytes;

FASTRNN_INLINE Weights4 prepare(Bytes w) { return w; }

FASTRNN_INLINE Bytes broadcast(const int8_t* a) {
  uint32_t four;
  memcpy(&four, a, sizeof four);
  return (Bytes)((four ^ 0x80808080u) - Pairs{});
}

FASTRNN_INLINE Sums multiply_add(Bytes a, Weights4 w, Sums sum) {
#if defined(__AVX512VNNI__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
#else
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)w);
#endif
}
#else
constexpr bool kOffset = false;

FASTRNN_INLINE Bytes broadcast(const int8_t* a) {
  uint32_t four;
  memcpy(&four, a, sizeof four);
  return (Bytes)(four - Pairs{});
}

#if defined(__AVX2__)
// |w| times a with the sign of w: the sum of two is at most 2 * 128 * 127, which fits into 16 bits.
struct Weights4 {
  Bytes signs, sizes;
};

#if defined(__AVX512F__)
FASTRNN_INLINE Weights4 prepare(Bytes w) { return {w, (Bytes)_mm512_abs_epi8((__m512i)w)}; }

FASTRNN_INLINE Sums multiply_add(Bytes a, Weights4 w, Sums sum) {
  const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi16(1);
  const __m512i with_sign = _mm512_mask_sub_epi8((__m512i)a, _mm512_movepi8_mask((__m512i)w.signs), zero, (__m512i)a);
  return sum + (Sums)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w.sizes, with_sign), ones);
}
#else
FASTRNN_INLINE Weights4 prepare(Bytes w) { return {w, (Bytes)_mm256_abs_epi8((__m256i)w)}; }

FASTRNN_INLINE Sums multiply_add(Bytes a, Weights4 w, Sums sum) {
  const __m256i with_sign = _mm256_sign_epi8((__m256i)a, (__m256i)w.signs), ones = _mm256_set1_epi16(1);
  return sum + (Sums)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w.sizes, with_sign), ones);
}
#endif
#else
using Weights4 = Bytes;

FASTRNN_INLINE Weights4 prepare(Bytes w) { return w; }

FASTRNN_INLINE Sums multiply_add(Bytes a, Weights4 w, Sums sum) {
  for (int lane = 0; lane < L; ++lane)
    for (int i = 0; i < 4; ++i) sum[lane] += a[4 * lane + i] * w[4 * lane + i];
  return sum;
}
#endif
#endif

template <int R, int P, int C>
void tile(Int8Rows a, const Int8Lane* w, int64_t panel_stride, int64_t K, const float* init, int64_t init_stride,
          float* out, int64_t out_stride) {
  const int64_t depth = (K + 3) / 4;
  const auto column = [&](int64_t i, int j) { return w + (j / C) * panel_stride + (i * C + j % C) * L; };
  Sums sum[R][P * C];
#pragma GCC unroll 32
  for (int j = 0; j < P * C; ++j) {
    const Sums start = kOffset ? load_as<Sums>(column(depth, j)) : Sums{};
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) sum[r][j] = start;
  }
  for (int64_t i = 0; i < depth; ++i) {
    Weights4 columns[P * C];
#pragma GCC unroll 32
    for (int j = 0; j < P * C; ++j) {
      Bytes four = load_as<Bytes>(column(i, j));
      if constexpr (R > 1) hold(four);
      columns[j] = prepare(four);
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const Bytes four = broadcast(a.data + r * a.row_stride + 4 * i);
#pragma GCC unroll 32
      for (int j = 0; j < P * C; ++j) sum[r][j] = multiply_add(four, columns[j], sum[r][j]);
    }
  }
#pragma GCC unroll 32
  for (int j = 0; j < P * C; ++j) {
    const Vec<float> scale = load(reinterpret_cast<const float*>(column(depth + 1, j)));
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const Vec<float> product = Vec<float>(__builtin_convertvector(sum[r][j], Vec<float>::Raw));
      const Vec<float> start = init ? load(init + r * init_stride + j * L) : Vec<float>(0);
      store(out + r * out_stride + j * L, start + product * (scale * Vec<float>(a.scales[r])));
    }
  }
}

struct Int8Tiles {
  template <int R, int P, int C>
  static constexpr Int8Tile of = tile<R, P, C>;
};

}  // namespace

Int8Tile int8_tile(int vectors, int rows, int panels) { return choose_tile_of_width<Int8Tiles>(vectors, rows, panels); }

}  // namespace fastrnn::cpu::FASTRNN_ISA
