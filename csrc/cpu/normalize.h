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

// What a row is normalized by: (value - mean) * scale, scale = 1 / sqrt(variance + kNormEpsilon).
template <class T>
struct Norm {
  T mean, scale;

  FASTRNN_INLINE Vec<T> operator()(Vec<T> value) const { return (value - Vec<T>(mean)) * Vec<T>(scale); }
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

// The sum of what(gate, u, count) over all vectors of a group, two chains at a time.
template <class T, class What>
FASTRNN_INLINE T sum_over(const Group& over, What what) {
  constexpr int64_t L = Vec<T>::kLanes;
  Vec<T> sum[2] = {Vec<T>(0), Vec<T>(0)};
  for (int g = 0; g < over.gates; ++g) {
    if (!over.has(g)) continue;
    int64_t u = 0;
    for (; u + 2 * L <= over.H; u += 2 * L)
      for (int i = 0; i < 2; ++i) sum[i] = sum[i] + what(g, u + i * L, L);
    for (; u < over.H; u += L) sum[0] = sum[0] + first_lanes(what(g, u, over.H - u), over.H - u);
  }
  return sum_of(sum[0] + sum[1]);
}

// Of a row of products, gate g at `row + g * pitch`.
template <class T, class N>
Norm<T> norm_of(const Group& over, const N* row, int64_t pitch) {
  const T count = T(over.size());
  const T mean = sum_over<T>(over, [=](int g, int64_t u, int64_t n) { return load(row + g * pitch + u, n); }) / count;
  const T squares = sum_over<T>(over, [=](int g, int64_t u, int64_t n) {
    const Vec<T> d = load(row + g * pitch + u, n) - Vec<T>(mean);
    return d * d;
  });
  const double spread = double(squares / count) + kNormEpsilon;
  return {mean, T(1 / __builtin_sqrt(spread))};
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
  const T mean = sum_over<T>(over, grad) / count;
  return {mean, sum_over<T>(over, [=](int g, int64_t u, int64_t n) { return grad(g, u, n) * value(g, u, n); }) / count};
}

// The gradient of what was normalized.
template <class T>
FASTRNN_INLINE Vec<T> grad_before(Norm<T> norm, NormGrad<T> lost, Vec<T> grad, Vec<T> normalized) {
  return Vec<T>(norm.scale) * (grad - Vec<T>(lost.mean) - normalized * Vec<T>(lost.slope));
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
