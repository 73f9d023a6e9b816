// float32 to int8, symmetrically: x is about q * quantum, -127 <= q <= 127 (-128 of weights alone).
#pragma once

#include "int8.h"
#include "vec.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr float kLeastRange = 1e-30f;  // rows of smaller numbers count as zeros: the quantum could not be inverted

// The largest absolute value; NaN or infinite if there is such a number.
inline float range_of(const float* x, int64_t count) {
  using V = Vec<float>;
  V::Mask most = {};  // without their sign the bits of floats are in the order of the floats, NaN above all
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const V::Mask bits = (V::Mask)load(x + i, count - i).raw & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t range = 0;
  for (int lane = 0; lane < V::kLanes; ++lane) range = most[lane] > range ? most[lane] : range;
  return float_of(uint32_t(range));
}

inline bool is_finite(float x) { return x - x == 0.0f; }

// x / quantum rounded to the nearest integer, ties to even.
template <class V>
FASTRNN_INLINE V rounded(V x, V inverse_quantum) {
  const V magic = V(12582912.0f);  // 1.5 * 2^23: the sum has no place for a fraction
  return (x * inverse_quantum + magic) - magic;
}

inline int8_t to_int8(float x, float inverse_quantum) { return int8_t(rounded(x, inverse_quantum)); }

// What a row of numbers is rounded to multiples of, and what to multiply with for the multiple: 0 if all count as
// zeros; the quantum is NaN if one is not finite.
struct Grid {
  float quantum, inverse;
};

// The largest number is m quanta.
inline Grid grid_of(float range, int m = 127) {
  if (!is_finite(range)) return {__builtin_nanf(""), 0.0f};
  return {range / float(m), range < kLeastRange ? 0.0f : float(m) / range};
}

// Weights that are on a grid already, as of a model that was quantized elsewhere, keep it: the largest of them is m
// quanta for some m.
inline Grid weight_grid(const float* w, int64_t count) {
  constexpr float kTolerance = 1e-4f;  // of a quantum: a product of float32 numbers is off by 128 * 2^-23 at most
  const float range = range_of(w, count);
  for (int m = 128; is_finite(range) && m > 0; --m) {
    const Grid grid = grid_of(range, m);
    int64_t i = 0;
    for (; i < count; ++i) {
      const float q = w[i] * grid.inverse, distance = q - rounded(q, 1.0f);
      if (distance > kTolerance || distance < -kTolerance || q > 127.5f) break;
    }
    if (i == count) return grid;
  }
  return grid_of(range);
}

// `count` rows of K numbers, `pitch` apart, each with a quantum of its own, into rows of `to_pitch`: zeros up to a
// whole vector. A row with a number that is not finite gets the quantum NaN.
inline void quantize_rows(const float* x, int64_t pitch, int64_t count, int64_t K, int8_t* to, int64_t to_pitch,
                          float* quanta) {
  using V = Vec<float>;
  typedef int8_t Narrow __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 4)));
  for (int64_t r = 0; r < count; ++r, x += pitch, to += to_pitch) {
    const Grid grid = grid_of(range_of(x, K));
    quanta[r] = grid.quantum;
    if (grid.inverse == 0.0f) {
      memset(to, 0, size_t(to_pitch));
      continue;
    }
    for (int64_t k = 0; k < K; k += V::kLanes) {
      const V q = rounded(load(x + k, K - k), V(grid.inverse));
      const Narrow bytes = __builtin_convertvector(__builtin_convertvector(q.raw, V::Mask), Narrow);
      memcpy(to + k, &bytes, sizeof bytes);
    }
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
