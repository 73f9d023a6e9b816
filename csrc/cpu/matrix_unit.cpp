#include "matrix_unit.h"

#include <immintrin.h>

#include "tiles.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

constexpr int64_t kRows = 16, kColumns = 16;  // of a register, of sums

// gcc does not know that the unit reads and writes memory.
FASTRNN_INLINE void finish_memory_accesses() { asm volatile("" ::: "memory"); }

// Registers 0 and 1 hold the sums of rows 0 to 15 in two vectors of columns, 2 and 3 those of rows 16 to 31; 4 and 5
// rows of A, 6 and 7 columns of W.
struct Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Configuration(int count) {
    const int upper = count < kRows ? count : int(kRows), lower = count - upper;
    const int by_register[8] = {upper, upper, lower, lower, upper, lower, kRows, kRows};
    for (int i = 0; i < 8; ++i) rows[i] = uint8_t(by_register[i]), row_bytes[i] = by_register[i] ? 64 : 0;
  }
};
static_assert(sizeof(Configuration) == 64, "as the processor reads it");

thread_local int configured_rows = 0;

void configure(int rows) {
  if (configured_rows == rows) return;
  const Configuration configuration(rows);
  asm volatile("" : : "r"(&configuration) : "memory");  // gcc 12 believes that only 8 of its bytes are read
  _tile_loadconfig(&configuration);
  configured_rows = rows;
}

// Adds the products of 32 k to the sums of R rows and V vectors; strides in bytes.
template <int R, int V>
FASTRNN_INLINE void multiply(const BFloat16* a, int64_t a_stride, const BFloat16* first, const BFloat16* second,
                             int64_t w_stride) {
  _tile_loadd(4, a, a_stride);
  _tile_loadd(6, first, w_stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (V == 2) {
    _tile_loadd(7, second, w_stride);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (R > kRows) {
    _tile_loadd(5, reinterpret_cast<const char*>(a) + kRows * a_stride, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (V == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

template <int R, int V>
FASTRNN_INLINE void load_all_sums(const float* init, int64_t stride) {
  if (!init) {
    _tile_zero(0);
    if constexpr (V == 2) _tile_zero(1);
    if constexpr (R > kRows) _tile_zero(2);
    if constexpr (R > kRows && V == 2) _tile_zero(3);
    return;
  }
  const int64_t bytes = stride * int64_t(sizeof(float));
  _tile_loadd(0, init, bytes);
  if constexpr (V == 2) _tile_loadd(1, init + kColumns, bytes);
  if constexpr (R > kRows) _tile_loadd(2, init + kRows * stride, bytes);
  if constexpr (R > kRows && V == 2) _tile_loadd(3, init + kRows * stride + kColumns, bytes);
}

template <int R, int V>
FASTRNN_INLINE void store_all_sums(float* out, int64_t stride) {
  const int64_t bytes = stride * int64_t(sizeof(float));
  _tile_stored(0, out, bytes);
  if constexpr (V == 2) _tile_stored(1, out + kColumns, bytes);
  if constexpr (R > kRows) _tile_stored(2, out + kRows * stride, bytes);
  if constexpr (R > kRows && V == 2) _tile_stored(3, out + kRows * stride + kColumns, bytes);
}

// The first `count` of `size` rows, the first `length` <= 32 numbers of each; zeros for the rest.
FASTRNN_INLINE void copy_padded(const BFloat16* from, int64_t stride, int64_t count, int64_t length, int64_t size,
                                BFloat16* to) {
  const __mmask32 mask = __mmask32((uint64_t(1) << length) - 1);
  for (int64_t i = 0; i < size; ++i)
    _mm512_store_si512(to + i * kMatrixDepth,
                       i < count ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512());
}

// The last `depth` < 32 of K.
template <int R, int V>
void multiply_rest(BFloat16Rows a, const BFloat16* first, const BFloat16* second, int64_t pitch, int64_t depth) {
  alignas(64) BFloat16 rows[R * kMatrixDepth], columns[V][kRows * kMatrixDepth];
  constexpr int64_t kBytes = kMatrixDepth * int64_t(sizeof(BFloat16));
  copy_padded(a.data, a.row_stride, R, depth, R, rows);
  copy_padded(first, pitch, (depth + 1) / 2, kMatrixDepth, kRows, columns[0]);
  if constexpr (V == 2) copy_padded(second, pitch, (depth + 1) / 2, kMatrixDepth, kRows, columns[1]);
  finish_memory_accesses();
  multiply<R, V>(rows, kBytes, columns[0], columns[V - 1], kBytes);
}

template <int R, int V, int C>
FASTRNN_INLINE void multiply_columns(BFloat16Rows a, const BFloat16* first, const BFloat16* second, int64_t K,
                                     const float* init, int64_t init_stride, float* out, int64_t out_stride) {
  constexpr int64_t kPitch = 2 * kColumns * C;  // from one pair of k to the next
  constexpr int64_t kStep = kMatrixDepth / 2 * kPitch, kBytes = int64_t(sizeof(BFloat16));
  load_all_sums<R, V>(init, init_stride);
  int64_t k = 0;
  for (; k + kMatrixDepth <= K; k += kMatrixDepth, first += kStep, second += kStep)
    multiply<R, V>(a.data + k, a.row_stride * kBytes, first, second, kPitch * kBytes);
  if (k < K) multiply_rest<R, V>({a.data + k, a.row_stride}, first, second, kPitch, K - k);
  store_all_sums<R, V>(out, out_stride);
}

template <int R, int P, int C>
void tile(BFloat16Rows a, const BFloat16* w, int64_t panel_stride, int64_t K, const float* init, int64_t init_stride,
          float* out, int64_t out_stride) {
  configure(R);
  finish_memory_accesses();
#pragma GCC unroll 8
  for (int j = 0; j + 1 < P * C; j += 2)
    multiply_columns<R, 2, C>(a, column<float, C>(w, panel_stride, 0, j), column<float, C>(w, panel_stride, 0, j + 1),
                              K, init ? init + j * kColumns : nullptr, init_stride, out + j * kColumns, out_stride);
  if constexpr (P * C % 2) {
    constexpr int j = P * C - 1;
    const BFloat16* const last = column<float, C>(w, panel_stride, 0, j);
    multiply_columns<R, 1, C>(a, last, last, K, init ? init + j * kColumns : nullptr, init_stride, out + j * kColumns,
                              out_stride);
  }
  finish_memory_accesses();
}

struct Tiles {
  template <int R, int P, int C>
  static constexpr BFloat16Tile of = tile<R, P, C>;
};

}  // namespace

BFloat16Tile matrix_tile(int vectors, int rows, int panels) {
  return choose_tile_of_width<Tiles, kMatrixRows>(vectors, rows, panels);
}

void release_matrix_unit() {
  if (!configured_rows) return;
  _tile_release();
  configured_rows = 0;
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
