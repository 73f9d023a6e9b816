// Vec<T>: one SIMD register of float or double, the lane type that the cells compute with on the CPU.
#pragma once

#include <string.h>

#include "number.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// The compiler's own vector types, and the integer ones that comparisons give.
template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Raw __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double Raw __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};

template <class T>
struct Vec {
  static constexpr int kLanes = FASTRNN_VECTOR_BYTES / sizeof(T);
  using Raw = typename Vector<T>::Raw;
  using Mask = typename Vector<T>::Mask;

  Raw raw;

  Vec() = default;
  FASTRNN_INLINE explicit Vec(T x) : raw(x - Raw{}) {}
  template <class N, class = decltype(T(N()))>
  FASTRNN_INLINE explicit Vec(N x) : Vec(T(x)) {}
  FASTRNN_INLINE explicit Vec(Raw x) : raw(x) {}

  friend FASTRNN_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.raw + b.raw); }
  friend FASTRNN_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.raw - b.raw); }
  friend FASTRNN_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.raw * b.raw); }
  friend FASTRNN_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.raw / b.raw); }
  friend FASTRNN_INLINE Mask operator<(Vec a, Vec b) { return a.raw < b.raw; }
};

template <class T>
FASTRNN_INLINE Vec<T> select(typename Vec<T>::Mask mask, Vec<T> a, Vec<T> b) {
  return Vec<T>(mask ? a.raw : b.raw);
}

// a * b + c, rounded once where the machine can. Written out, so that every instance of a kernel rounds alike.
template <class T>
FASTRNN_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Vec<T>(typename Vec<T>::Raw(_mm512_fmadd_ps(a.raw, b.raw, c.raw)));
  if constexpr (sizeof(T) == 8) return Vec<T>(typename Vec<T>::Raw(_mm512_fmadd_pd(a.raw, b.raw, c.raw)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return Vec<T>(typename Vec<T>::Raw(_mm256_fmadd_ps(a.raw, b.raw, c.raw)));
  if constexpr (sizeof(T) == 8) return Vec<T>(typename Vec<T>::Raw(_mm256_fmadd_pd(a.raw, b.raw, c.raw)));
#else
  return a * b + c;
#endif
}

// Keeps a vector that several rows multiply in its register: compilers would read it from memory for each.
template <class Raw>
FASTRNN_INLINE void hold(Raw& vector) {
#if defined(__x86_64__)
  __asm__("" : "+v"(vector));
#endif
}

// Lanes a0 b0 a1 b1 ... of the lower, and of the upper halves of a and b.
template <class T>
FASTRNN_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& lower, Vec<T>& upper) {
  constexpr int kHalf = Vec<T>::kLanes / 2;
#if defined(__clang__)
  for (int i = 0; i < kHalf; ++i) {
    lower.raw[2 * i] = a.raw[i], lower.raw[2 * i + 1] = b.raw[i];
    upper.raw[2 * i] = a.raw[kHalf + i], upper.raw[2 * i + 1] = b.raw[kHalf + i];
  }
#else
  typename Vec<T>::Mask low, high;
  for (int i = 0; i < kHalf; ++i) {
    low[2 * i] = i, low[2 * i + 1] = 2 * kHalf + i;
    high[2 * i] = kHalf + i, high[2 * i + 1] = 3 * kHalf + i;
  }
  lower = Vec<T>(__builtin_shuffle(a.raw, b.raw, low));
  upper = Vec<T>(__builtin_shuffle(a.raw, b.raw, high));
#endif
}

// Transposes a square of L vectors: log2(L) perfect shuffles of its rows.
template <class T>
FASTRNN_INLINE void transpose(Vec<T>* rows) {
  constexpr int L = Vec<T>::kLanes;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<T> shuffled[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) interleave(rows[i], rows[i + L / 2], shuffled[2 * i], shuffled[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = shuffled[i];
  }
}

// ---- memory: unaligned, whole vectors or the first `count` lanes (the others read as 0)

FASTRNN_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v.raw, p, sizeof v.raw);
  return v;
}

FASTRNN_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v.raw, p, sizeof v.raw);
  return v;
}

FASTRNN_INLINE Vec<float> load(const BFloat16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  Narrow bits;
  memcpy(&bits, p, sizeof bits);
  return Vec<float>((Vec<float>::Raw)(__builtin_convertvector(bits, Wide) << 16));
}

FASTRNN_INLINE Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return Vec<float>(Vec<float>::Raw(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))));
#elif defined(__AVX2__)
  return Vec<float>(Vec<float>::Raw(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))));
#else
  Vec<float> v;
  for (int i = 0; i < Vec<float>::kLanes; ++i) v.raw[i] = widen(p[i]);
  return v;
#endif
}

// Two numbers in each lane.
typedef uint32_t Pairs __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

FASTRNN_INLINE Pairs load_all_pairs(const BFloat16* p) {
  Pairs pairs;
  memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

FASTRNN_INLINE Pairs broadcast_pair(const BFloat16* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof pair);
  return pair - Pairs{};
}

// One number and a zero.
FASTRNN_INLINE Pairs broadcast_single(const BFloat16* p) { return uint32_t(p->bits) - Pairs{}; }

#if defined(__AVX512BF16__)
// c plus the two products of a lane, which are added in float32, with subnormal numbers taken as 0.
FASTRNN_INLINE Vec<float> multiply_add_pairs(Pairs a, Pairs b, Vec<float> c) {
  return Vec<float>(Vec<float>::Raw(_mm512_dpbf16_ps(c.raw, (__m512bh)a, (__m512bh)b)));
}
#endif

// The first, or the second of every pair.
FASTRNN_INLINE Vec<float> load_pairs(const BFloat16* p, int half) {
  const Pairs pairs = load_all_pairs(p);
  return Vec<float>((Vec<float>::Raw)(half ? pairs & 0xffff0000 : pairs << 16));
}

FASTRNN_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v.raw, sizeof v.raw); }
FASTRNN_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v.raw, sizeof v.raw); }

// Rounded to nearest, ties to even, in the lower halves.
typedef uint32_t BFloat16Lanes __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

FASTRNN_INLINE BFloat16Lanes round_to_bfloat16(Vec<float> v) {
  const BFloat16Lanes bits = (BFloat16Lanes)v.raw;
  const BFloat16Lanes nan = BFloat16Lanes{} + 0x7fc0;
  return v.raw != v.raw ? nan : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

FASTRNN_INLINE void store(BFloat16* p, Vec<float> v) {
  typedef uint16_t Narrow __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));
  const Narrow out = __builtin_convertvector(round_to_bfloat16(v), Narrow);
  memcpy(p, &out, sizeof out);
}

FASTRNN_INLINE void store_pairs(BFloat16* p, Vec<float> first, Vec<float> second) {
  const BFloat16Lanes pairs = round_to_bfloat16(first) | round_to_bfloat16(second) << 16;
  memcpy(p, &pairs, sizeof pairs);
}

FASTRNN_INLINE void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Vec<float>::kLanes; ++i) narrow(v.raw[i], p + i);
#endif
}

// Copies `count` < 2 * kPiece elements in pieces, one for each bit of count: one by one each would be a branch of its
// own.
template <int kPiece, class S>
FASTRNN_INLINE void copy_pieces(S* to, const S* from, int64_t count) {
  if (count & kPiece) {
    memcpy(to, from, kPiece * sizeof(S));
    to += kPiece, from += kPiece;
  }
  if constexpr (kPiece > 1) copy_pieces<kPiece / 2>(to, from, count);
}

// Less than a vector. Where there is a masked load it is used; masked stores are slow on some machines.

template <class S>
FASTRNN_INLINE Vec<Accumulator<S>> load_part(const S* p, int64_t count) {
  constexpr int L = Vec<Accumulator<S>>::kLanes;
  S padded[L] = {};
  copy_pieces<L / 2>(padded, p, count);
  return load(padded);
}

#if defined(__AVX512F__)
FASTRNN_INLINE Vec<float> load_part(const float* p, int64_t count) {
  return Vec<float>(Vec<float>::Raw(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p)));
}

FASTRNN_INLINE Vec<double> load_part(const double* p, int64_t count) {
  return Vec<double>(Vec<double>::Raw(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p)));
}
#elif defined(__AVX2__)
alignas(64) constexpr int32_t kMasks[16] = {-1, -1, -1, -1,
                                            -1, -1, -1, -1};  // from the 8 - count-th on: of `count` lanes

FASTRNN_INLINE Vec<float> load_part(const float* p, int64_t count) {
  const __m256i mask = _mm256_loadu_si256((const __m256i*)(kMasks + 8 - count));
  return Vec<float>(Vec<float>::Raw(_mm256_maskload_ps(p, mask)));
}

FASTRNN_INLINE Vec<double> load_part(const double* p, int64_t count) {
  const __m256i mask = _mm256_loadu_si256((const __m256i*)(kMasks + 8 - 2 * count));
  return Vec<double>(Vec<double>::Raw(_mm256_maskload_pd(p, mask)));
}
#endif

// count > 0; more than there are lanes stands for all.
template <class S>
FASTRNN_INLINE Vec<Accumulator<S>> load(const S* p, int64_t count) {
  return count >= Vec<Accumulator<S>>::kLanes ? load(p) : load_part(p, count);
}

template <class S>
FASTRNN_INLINE void store(S* p, Vec<Accumulator<S>> v, int64_t count) {
  if (count >= v.kLanes) return store(p, v);
  S padded[v.kLanes];
  store(padded, v);
  copy_pieces<v.kLanes / 2>(p, padded, count);
}

// Copies `count` numbers between a storage type and its accumulator type, either way.
template <class To, class From>
inline void convert(To* to, const From* from, int64_t count) {
  constexpr int kLanes = Vec<Accumulator<From>>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, count - i), count - i);
}

// ---- activations

// The scalar function of the C library, lane by lane.
template <class F>
FASTRNN_INLINE Vec<double> each_lane(Vec<double> x, F f) {
  double lanes[Vec<double>::kLanes];
  store(lanes, x);
  for (double& lane : lanes) lane = f(lane);
  return load(lanes);
}

FASTRNN_INLINE Vec<double> tanh(Vec<double> x) {
  return each_lane(x, [](double v) { return __builtin_tanh(v); });
}

FASTRNN_INLINE Vec<double> sigmoid(Vec<double> x) {
  return each_lane(x, [](double v) { return 1.0 / (1.0 + __builtin_exp(-v)); });
}

// x, but not beyond a bound. NaN passes.
FASTRNN_INLINE Vec<float> at_least(Vec<float> bound, Vec<float> x) {
#if defined(__AVX512F__)
  return Vec<float>(Vec<float>::Raw(_mm512_max_ps(bound.raw, x.raw)));  // the second one if either is NaN
#elif defined(__AVX2__)
  return Vec<float>(Vec<float>::Raw(_mm256_max_ps(bound.raw, x.raw)));
#else
  return select(x < bound, bound, x);
#endif
}

FASTRNN_INLINE Vec<float> at_most(Vec<float> bound, Vec<float> x) {
#if defined(__AVX512F__)
  return Vec<float>(Vec<float>::Raw(_mm512_min_ps(bound.raw, x.raw)));
#elif defined(__AVX2__)
  return Vec<float>(Vec<float>::Raw(_mm256_min_ps(bound.raw, x.raw)));
#else
  return select(bound < x, bound, x);
#endif
}

// x = n ln 2 + r, |r| <= ln(2)/2: scale = 2^n, expm1_r = e^r - 1. For -87 <= x <= 88, where 2^n is a normal float.
struct ExpParts {
  Vec<float> scale, expm1_r;
};

FASTRNN_INLINE ExpParts split_exp(Vec<float> x) {
  using V = Vec<float>;
  const V magic = V(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
  const V shifted = fma(x, V(1.44269504f), magic);
  const V n = shifted - magic;
  V r = fma(n, V(-0.693145752f), x);  // ln 2 in two parts, the first with zeros at its end
  r = fma(n, V(-1.42860677e-6f), r);
  V p = V(0.001388251665f);  // r + r^2 q(r) with the q of degree 4 whose largest relative error is least, 1.7e-8
  p = fma(p, r, V(0.008366547525f));
  p = fma(p, r, V(0.041667200625f));
  p = fma(p, r, V(0.166665434837f));
  p = fma(p, r, V(0.499999970198f));
  p = fma(p * r, r, r);
  const V::Mask exponent = (V::Mask)shifted.raw - 0x4b400000 + 127;  // 0x4b400000 is magic
  return {V((V::Raw)(exponent << 23)), p};
}

// 1 / (1 + e^-x), with a small relative error also where it is tiny.
FASTRNN_INLINE Vec<float> sigmoid(Vec<float> x) {
  using V = Vec<float>;
  const ExpParts e = split_exp(at_most(V(88.0f), at_least(V(-87.0f), V(0.0f) - x)));
  return V(1.0f) / (V(1.0f) + fma(e.scale, e.expm1_r, e.scale));
}

// m / (m + 2) with m = e^2x - 1, which has no cancellation near 0.
FASTRNN_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V clamped = at_most(V(10.0f), at_least(V(-10.0f), x));  // tanh(10) rounds to 1
  const ExpParts e = split_exp(clamped + clamped);
  const V m = fma(e.scale, e.expm1_r, e.scale - V(1.0f));
  return m / (m + V(2.0f));
}

// The square of e^(x/2), which reaches 0 and infinity where e^x does.
FASTRNN_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const ExpParts e = split_exp(at_most(V(45.0f), at_least(V(-60.0f), x * V(0.5f))));
  const V root = fma(e.scale, e.expm1_r, e.scale);
  return root * root;
}

FASTRNN_INLINE Vec<double> exp(Vec<double> x) {
  return each_lane(x, [](double v) { return __builtin_exp(v); });
}

// min(x, 0) - log(1 + e), e = e^-|x|. With s = e / (2 + e) the logarithm is 2 (s + s^3/3 + s^5/5 + ...), s <= 1/3.
FASTRNN_INLINE Vec<float> logsigmoid(Vec<float> x) {
  using V = Vec<float>;
  const V negative = select(x < V(0.0f), x, V(0.0f) - x);
  const ExpParts parts = split_exp(at_least(V(-87.0f), negative));
  const V e = fma(parts.scale, parts.expm1_r, parts.scale), s = e / (V(2.0f) + e), square = s * s;
  V p = V(1.0f / 15.0f);
#pragma GCC unroll 7
  for (int k = 13; k >= 1; k -= 2) p = fma(p, square, V(1.0f / float(k)));
  return at_most(V(0.0f), x) - (s + s) * p;
}

FASTRNN_INLINE Vec<double> logsigmoid(Vec<double> x) {
  return each_lane(x,
                   [](double v) { return (v < 0.0 ? v : 0.0) - __builtin_log1p(__builtin_exp(-__builtin_fabs(v))); });
}

// As of a scalar lane, see cells/cell.h.
template <class T>
FASTRNN_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select((a.raw > b.raw) | (a.raw != a.raw), a, b);
}

template <class T>
FASTRNN_INLINE Vec<T> maximum_backward(Vec<T> a, Vec<T> b, Vec<T> dm) {
  return select(a.raw > b.raw, dm, select(a.raw == b.raw, dm * Vec<T>(0.5f), Vec<T>(0)));
}

template <class T>
FASTRNN_INLINE Vec<T> step(Vec<T> x) {
  return select(Vec<T>(0) < x, Vec<T>(1), select(x.raw <= Vec<T>(0).raw, Vec<T>(0), x));
}

template <class T>
FASTRNN_INLINE Vec<T> relu(Vec<T> x) {
  return select(x < Vec<T>(0), Vec<T>(0), x);
}

template <class T>
FASTRNN_INLINE Vec<T> relu_backward(Vec<T> y, Vec<T> dy) {
  return select(Vec<T>(0) < y, dy, select(y < Vec<T>(1), Vec<T>(0), dy));
}

// The first `depth` <= 2L rows of `from`, `pitch` apart, of the first `count` <= L numbers each: transposed to `count`
// rows, to_pitch apart, of 2L numbers, 0 from the depth on.
inline void transpose_pairs(const BFloat16* from, int64_t pitch, int64_t depth, int64_t count, BFloat16* to,
                            int64_t to_pitch) {
  constexpr int L = Vec<float>::kLanes;
  Vec<float> block[L];
  for (int i = 0; i < L; ++i) {
    BFloat16 pairs[2 * L];
    const BFloat16* const first = from + 2 * i * pitch;
    store_pairs(pairs, 2 * i < depth ? load(first, count) : Vec<float>(0),
                2 * i + 1 < depth ? load(first + pitch, count) : Vec<float>(0));
    memcpy(&block[i].raw, pairs, sizeof pairs);
  }
  transpose(block);
  for (int j = 0; j < count; ++j) memcpy(to + j * to_pitch, &block[j].raw, sizeof block[j].raw);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
