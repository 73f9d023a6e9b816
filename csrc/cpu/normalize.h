// Layer normalization (Ba et al. 2016), forward and backward: of the products of a group of gates, or of one vector of
// units. Each thread of a team looks at whole rows, and writes its own units.
#pragma once

#include "rows.h"

namespace fastrnn::cpu::FASTRNN_ISA {

template <class Cell>
constexpr bool kNormalizesProducts = Cell::kGains > 0;

// What the cell itself saves; the products that are normalized come after it, the input's, then the recurrent ones.
template <class Cell>
constexpr int kCellSaved = Cell::kSaved - Cell::kGains;

// What a row is normalized by: (value - mean - rest) * scale, scale = 1 / sqrt(variance + kNormEpsilon). `rest` is what
// a mean far from zero loses in its last bits: without it the normalized values would have a mean of their own, and the
// gradient of what all values have in common, which is 0, would be a number.
template <class T>
struct Norm {
  T mean, rest, scale;

  FASTRNN_INLINE Vec<T> operator()(Vec<T> value) const { return (value - Vec<T>(mean) - Vec<T>(rest)) * Vec<T>(scale); }
};

// What a row's gradient loses: scale * (d - mean - normalized * slope), d being the gradient of the normalized value.
template <class T>
struct NormGrad {
  T mean, slope;
};

// One of the vectors that are normalized together: `gates` vectors of H, `pitch` apart, of which those count whose
// `groups` entry is `group`.
struct Group {
  int gates;
  const int* groups;
  int group;
  int64_t H;

  bool has(int gate) const { return groups[gate] == group; }
  int64_t size() const {
    int64_t found = 0;
    for (int g = 0; g < gates; ++g) found += has(g) ? H : 0;
    return found;
  }
};

constexpr int kAlone[1] = {0};

// The first `count` lanes, the others 0.
template <class T>
FASTRNN_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  if (count >= Vec<T>::kLanes) return v;
  T lanes[Vec<T>::kLanes] = {};
  store(lanes, v, count);
  return load(lanes);
}

template <class T>
FASTRNN_INLINE T sum_of(Vec<T> v) {
  T lanes[Vec<T>::kLanes], sum = 0;
  store(lanes, v);
  for (T lane : lanes) sum += lane;
  return sum;
}

// add(gate, u, count, sums) for all vectors of a group, by turns with four arrays of sums, so that no addition waits
// for the one before it; then `to` has the sums of all lanes. What add() adds behind the end of a gate's last vector
// does not count.
template <int kSums, class T, class Add>
FASTRNN_INLINE void sum_over(const Group& over, T* to, Add add) {
  constexpr int64_t L = Vec<T>::kLanes, kChains = 4;
  Vec<T> sums[kChains][kSums];
  for (auto& chain : sums)
    for (Vec<T>& sum : chain) sum = Vec<T>(0);
  for (int g = 0; g < over.gates; ++g) {
    if (!over.has(g)) continue;
    int64_t u = 0;
    for (; u + kChains * L <= over.H; u += kChains * L)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kChains; ++i) add(g, u + i * L, L, sums[i]);
    for (; u < over.H; u += L) {
      Vec<T> last[kSums];
      for (Vec<T>& sum : last) sum = Vec<T>(0);
      add(g, u, over.H - u, last);
      for (int i = 0; i < kSums; ++i) sums[0][i] = sums[0][i] + first_lanes(last[i], over.H - u);
    }
  }
  for (int i = 0; i < kSums; ++i) to[i] = sum_of((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
}

// Of a row of products, gate g at `row + g * pitch`.
template <class T, class N>
Norm<T> norm_of(const Group& over, const N* row, int64_t pitch) {
  const T count = T(over.size());
  T sum, rests[2];
  sum_over<1>(over, &sum,
              [=](int g, int64_t u, int64_t n, Vec<T>* sums) { sums[0] = sums[0] + load(row + g * pitch + u, n); });
  const T mean = sum / count;
  sum_over<2>(over, rests, [=](int g, int64_t u, int64_t n, Vec<T>* sums) {
    const Vec<T> d = load(row + g * pitch + u, n) - Vec<T>(mean);
    sums[0] = sums[0] + d, sums[1] = fma(d, d, sums[1]);
  });
  const T rest = rests[0] / count;
  const double spread = double(rests[1] / count) - double(rest) * double(rest);
  return {mean, rest, T(1 / __builtin_sqrt((spread > 0 ? spread : 0) + kNormEpsilon))};
}

// Of each of a row's gates.
template <class T, class N>
void norms_of(int gates, const int* groups, int64_t H, const N* row, int64_t pitch, Norm<T>* to) {
  for (int g = 0; g < gates; ++g) {
    int first = 0;
    while (groups[first] != groups[g]) ++first;
    to[g] = first < g ? to[first] : norm_of<T>({gates, groups, groups[g], H}, row, pitch);
  }
}

// grad(gate, u, count) is the gradient of the normalized value, value(gate, u, count) that value.
template <class T, class Grad, class Value>
NormGrad<T> norm_grad(const Group& over, Grad grad, Value value) {
  const T count = T(over.size());
  T sums_of_both[2];
  sum_over<2>(over, sums_of_both, [=](int g, int64_t u, int64_t n, Vec<T>* sums) {
    const Vec<T> d = grad(g, u, n);
    sums[0] = sums[0] + d, sums[1] = fma(d, value(g, u, n), sums[1]);
  });
  return {sums_of_both[0] / count, sums_of_both[1] / count};
}

// The gradient of what was normalized.
template <class T>
FASTRNN_INLINE Vec<T> grad_before(Norm<T> norm, NormGrad<T> lost, Vec<T> grad, Vec<T> normalized) {
  return Vec<T>(norm.scale) * (grad - Vec<T>(lost.mean) - normalized * Vec<T>(lost.slope));
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
