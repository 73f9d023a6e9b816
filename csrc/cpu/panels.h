// How the operands of products lie in memory: W [K, N] packed in panels, A in rows.
//
// W is cut into panels of C columns of vectors, L lanes each; a panel is stored [K][C][L], so that one step of k reads
// C whole vectors in order. Columns past N are zero. In the product of a recurrent step a panel holds the same L units
// of C gates; elsewhere C = 2. The elements of panels are of the type W: that of the sums T itself, or for float
// products BFloat16, stored in pairs of k, [K/2][C][L][2], so that a shift or a mask of whole vectors widens them, or
// an instruction that multiplies pairs takes them as they are; or Int8Lane (int8.h).
//
// The elements of A are of the type E: T, or with such an instruction BFloat16; with Int8Lane int8_t.
#pragma once

#include "matrix_unit.h"
#include "quantize.h"
#include "vec.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int kPlain = 2;  // vectors in a panel of a plain product

template <class T>
constexpr int kLanes = Vec<T>::kLanes;

// How many elements a panel stores side by side in a lane.
template <class W>
constexpr int kGroup = 1;
template <>
inline constexpr int kGroup<BFloat16> = 2;

// Vectors in a panel of gates. Two are enough to use the registers, and a tile of more rows reads each of them less
// often from L2.
constexpr int gate_panel(int gates) { return gates % 2 ? gates : 2; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

// A matrix whose rows lie `pitch` apart.
template <class E>
Operand<E> rows_of(const E* data, int64_t pitch) {
  if constexpr (kInPairs<E>) {
    return {{data, pitch}};
  } else {
    return {data, pitch, 1};
  }
}

// Vector j of row k of panels of C vectors; k is the first of a group.
template <class T, int C, class W>
FASTRNN_INLINE const W* column(const W* w, int64_t panel_stride, int64_t k, int j) {
  return w + (j / C) * panel_stride + kLanes<T> * (k * C + j % C * kGroup<W>);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
