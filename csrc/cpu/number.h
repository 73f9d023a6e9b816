// The two 16-bit storage types. They live in memory only: arithmetic is done in float.
#pragma once

#include <stdint.h>
#include <string.h>

#include "isa.h"

namespace fastrnn::cpu::FASTRNN_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that numbers of a storage type are computed in.
template <class S>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class S>
using Accumulator = typename AccumulatorOf<S>::type;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal, exactly.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even.
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }

inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float x, Float16* out) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (x != x) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(half | (bits >> 16 & 0x8000));
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
