// The storage types on the device, and the type that a cell's maths runs in for each of them.
#pragma once

#include <string.h>

#include <type_traits>

#include "../cells/cell.h"
#include "device.h"

namespace fastrnn::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A float whose products may be of TF32: operands rounded to ten bits after the binary point.
struct TFloat32 {
  float value;
};

template <class S>
constexpr bool kIs16Bit = sizeof(S) == 2;
// Whether products run on the tensor cores.
template <class S>
constexpr bool kUsesMma = kIs16Bit<S> || std::is_same_v<S, TFloat32>;

// ---- conversions: to the accumulator (float, or double for double) and back, to nearest with ties to even

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

__device__ __forceinline__ uint32_t bits_of(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(TFloat32 x) { return x.value; }
__device__ __forceinline__ float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  return emulate::float_of_half(x.bits);
#endif
}

template <class S, class A>
__device__ __forceinline__ S narrow(A x) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return S{x};
  } else {
    S to;
#ifdef __CUDACC__
    if constexpr (std::is_same_v<S, BFloat16>) {
      to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    } else {
      to.bits = __half_as_ushort(__float2half_rn(x));
    }
#else
    to.bits = std::is_same_v<S, BFloat16> ? emulate::bfloat16_of(x) : emulate::half_of(x);
#endif
    return to;
  }
}

template <class S>
using Accumulator = decltype(widen(S{}));

// ---- numbers that are read or written once in a launch, see device.h

template <class S>
using WordOf = std::conditional_t<sizeof(S) == 2, uint16_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>>;

// A number that was read ahead: a word that nobody looks at before the number is used.
template <class S>
class Ahead {
 public:
  Ahead() = default;
  __device__ __forceinline__ explicit Ahead(const S* from)
      : word_(load_once(reinterpret_cast<const WordOf<S>*>(from))) {}
  __device__ __forceinline__ S get() const {
    const WordOf<S> word = WordOf<S>(word_);
    S number;
    memcpy(&number, &word, sizeof number);
    return number;
  }

 private:
  decltype(load_once(static_cast<const WordOf<S>*>(nullptr))) word_;
};

template <class S>
__device__ __forceinline__ void write_once(S* to, S number) {
  WordOf<S> word;
  memcpy(&word, &number, sizeof number);
  store_once(reinterpret_cast<WordOf<S>*>(to), word);
}

// ---- the lane that a cell computes in

// A float whose activations are the hardware's approximations, for cells of bfloat16.
struct Approximate {
  float value;

  Approximate() = default;
  FASTRNN_HD explicit Approximate(float x) : value(x) {}
  FASTRNN_HD explicit operator float() const { return value; }
};

FASTRNN_HD static inline Approximate operator+(Approximate a, Approximate b) { return Approximate(a.value + b.value); }
FASTRNN_HD static inline Approximate operator-(Approximate a, Approximate b) { return Approximate(a.value - b.value); }
FASTRNN_HD static inline Approximate operator*(Approximate a, Approximate b) { return Approximate(a.value * b.value); }
FASTRNN_HD static inline Approximate operator/(Approximate a, Approximate b) { return Approximate(a.value / b.value); }
FASTRNN_HD static inline Approximate tanh(Approximate x) { return Approximate(tanh_approximate(x.value)); }
FASTRNN_HD static inline Approximate sigmoid(Approximate x) {
  return Approximate(0.5f * tanh_approximate(0.5f * x.value) + 0.5f);
}
FASTRNN_HD static inline Approximate relu(Approximate x) { return Approximate(fastrnn::relu(x.value)); }
FASTRNN_HD static inline Approximate relu_backward(Approximate y, Approximate dy) {
  return Approximate(fastrnn::relu_backward(y.value, dy.value));
}
FASTRNN_HD static inline Approximate exp(Approximate x) { return Approximate(fastrnn::exp(x.value)); }
FASTRNN_HD static inline Approximate logsigmoid(Approximate x) { return Approximate(fastrnn::logsigmoid(x.value)); }
FASTRNN_HD static inline Approximate step(Approximate x) { return Approximate(fastrnn::step(x.value)); }
FASTRNN_HD static inline Approximate maximum(Approximate a, Approximate b) {
  return Approximate(fastrnn::maximum(a.value, b.value));
}
FASTRNN_HD static inline Approximate maximum_backward(Approximate a, Approximate b, Approximate dm) {
  return Approximate(fastrnn::maximum_backward(a.value, b.value, dm.value));
}

template <class S>
using Lane = std::conditional_t<std::is_same_v<S, BFloat16>, Approximate, Accumulator<S>>;

}  // namespace fastrnn::cuda
