// Forward pass of one layer but for what a cell computes (forward.cpp): packing, who walks which rows, where their
// states are, and the products of the input.
#include "forward_pass.h"

#include "unpacked.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

template <class S>
void pack_bias(Accumulator<S>* packed, const S* bias, int64_t H, int64_t gates) {
  constexpr int64_t L = kLanes<Accumulator<S>>;
  for (int64_t u = 0; u < H; u += L)
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t lane = 0; lane < L; ++lane)
        *packed++ = bias && u + lane < H ? widen(bias[g * H + u + lane]) : Accumulator<S>(0);
}

// The biases of normalized products, which are added to what is normalized.
template <class Plan, class T, class S>
void pack_shifts(const Plan& plan, T* to, const S* bias, int gates) {
  const int64_t H = plan.p.H;
  for (int g = 0; plan.cell.gains && g < gates; ++g)
    for (int64_t u = 0; u < H; ++u) to[g * plan.Hp + u] = bias ? widen(bias[g * H + u]) : T(0);
}

// Everything but the matrices: task 2d packs what goes with x, task 2d+1 what goes with the state.
template <class S, class E, class W>
void pack_vectors(const ForwardPlan<S, E, W>& plan, int task) {
  using T = Accumulator<S>;
  const Layer& p = plan.p;
  const CellSizes& cell = plan.cell;
  const int64_t first = cell.first_gates;
  const Weights& w = p.weights[task / 2];
  const auto& to = plan.packed[task / 2];
  if (task % 2 == 0) {
    pack_shifts(plan, to.shifts, as<S>(w.b_ih), cell.gates);
    const S* bias = cell.gains ? nullptr : as<S>(w.b_ih);
    for (int64_t j = 0; j < cell.gates * p.H; ++j) to.b_ih[j] = bias ? widen(bias[j]) : T(0);
    return;
  }
  pack_shifts(plan, to.shifts + cell.gates * plan.Hp, as<S>(w.b_hh), first);
  for (int j = 0; j < cell.own_rows(); ++j) convert(to.w_own + j * plan.Hp, as<S>(w.w_own) + j * p.H, p.H);
  const S* bias = as<S>(w.b_hh);
  if (first) pack_bias(to.b_hh, cell.gains ? nullptr : bias, p.H, first);
  if (cell.second_gates) pack_bias(to.b_second, bias ? bias + first * p.H : nullptr, p.H, cell.second_gates);
}

// A part of the matrices of a task.
template <class S, class E, class W>
void pack_matrices(const ForwardPlan<S, E, W>& plan, int task, Share share) {
  constexpr int64_t L = kLanes<Accumulator<S>>;
  const Layer& p = plan.p;
  const CellSizes& cell = plan.cell;
  const int first = cell.first_gates;
  const Weights& w = p.weights[task / 2];
  const auto& to = plan.packed[task / 2];
  if (task % 2 == 0) return pack_part(share, to.w_ih, Matrix<S>{as<S>(w.w_ih), p.I}, p.I, cell.gates * p.H);
  int64_t begin, end;
  share.part(p.H, L, &begin, &end);
  if (first) pack_gates(to.w_hh, Matrix<S>{as<S>(w.w_hh), p.P}, p.P, p.H, first, begin, end);
  if (cell.second_gates)
    pack_gates(to.w_second, Matrix<S>{as<S>(w.w_hh) + first * p.H * p.P, p.P}, p.H, p.H, cell.second_gates, begin, end);
  if (w.w_hr) pack_part(share, to.w_hr, Matrix<S>{as<S>(w.w_hr), p.H}, p.H, p.P);
}

template <class S, class E, class W>
void pack_all(const ForwardPlan<S, E, W>& plan) {
  pack_in_parts(plan.tasks, 2 * plan.p.D, [&](int task, Share share) {
    if (share.worker == 0) pack_vectors(plan, task);
    pack_matrices(plan, task, share);
  });
}

template <class N>
void swap(N*& a, N*& b) {
  N* const old = a;
  a = b, b = old;
}

template <class N>
void zero(N* to, int64_t count) {
  memset(to, 0, size_t(count) * sizeof(N));
}

}  // namespace

template <class S, class E, class W>
ForwardRange<S, E, W>::ForwardRange(const Plan& plan, RowRange rows, typename Plan::Scratch scratch, Share share)
    : p(plan.p), plan(plan), rows(rows), w(plan.packed[rows.d]), given(p.weights[rows.d]), share(share), own(scratch) {
  share.part(p.H, kPlain * L, &begin, &end);
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::load_states() {
  const int K = plan.cell.carried;
  zero(own.h, rows.n * plan.Pp);
  zero(own.c, rows.n * K * plan.Hp);
  for (int64_t r = 0; r < rows.n; ++r) {
    if (p.h0) convert(own.h + r * plan.Pp, as<S>(p.h0) + state_row(r) * p.P, p.P);
    if (kInPairs<E>) convert(own.h_read + r * plan.Pp, own.h + r * plan.Pp, p.P);
    for (int k = 0; p.c0 && k < K; ++k) convert(c_at(r, k), as<S>(p.c0) + (state_row(r) * K + k) * p.H, p.H);
  }
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::store_states() {
  const int K = plan.cell.carried;
  for (int64_t r = 0; r < rows.n; ++r) {
    convert(as<S>(p.h_n) + state_row(r) * p.P, own.h + r * plan.Pp, p.P);
    for (int k = 0; p.c_n && k < K; ++k) convert(as<S>(p.c_n) + (state_row(r) * K + k) * p.H, c_at(r, k), p.H);
  }
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::restart_rows(int64_t t) {
  if (!p.resets) return;
  for (int64_t r = 0; share.worker == 0 && r < rows.n; ++r) {
    if (!active(t, r) || !row_restarts(p, rows.d, t, rows.b0 + r)) continue;
    zero(own.h + r * plan.Pp, plan.Pp);
    zero(own.h_read + r * plan.Pp, plan.Pp);
    zero(c_at(r, 0), plan.cell.carried * plan.Hp);
  }
  share.wait();
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::project_inputs(int64_t s, int64_t count) {
  if (plan.unpacked()) return project_unpacked(s, count);
  int64_t from = 0, to = count, left = 0, right = plan.cell.gates * p.H;
  if (count >= share.count) {
    share.part(count, 1, &from, &to);
    gather_inputs(s, from, to);
  } else {
    if (share.worker == 0) gather_inputs(s, from, to);
    share.wait();
    share.part(right, kPlain * L, &left, &right);
  }
  const int64_t row = from * rows.n;
  multiply((to - from) * rows.n, right - left, p.I, own.x + row * plan.Ip, plan.Ip, w.w_ih + left * panel_depth<W>(p.I),
           w.b_ih + left, own.gates + row * plan.Gp + left, plan.Gp);
}

// out [M, N] = bias + a W, for a W [K, N] in plain panels.
template <class S, class E, class W>
template <class A>
void ForwardRange<S, E, W>::multiply(int64_t M, int64_t N, int64_t K, const A* a, int64_t lda, const W* packed,
                                     const T* bias, T* out, int64_t ldo) {
  const int64_t block = kIsInt8<W> ? kBlockM : larger(1, M);
  for (int64_t m = 0; m < M; m += block) {
    const int64_t count = smaller(block, M - m);
    gemm(count, N, K, operand(a + m * lda, lda, count, K), packed, Init<T>{bias, 0}, out + m * ldo, ldo);
  }
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::gather_inputs(int64_t s, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    const S* x = as<S>(p.x) + (time_of_step(p, rows.d, s + i) * p.B + rows.b0) * p.I;
    for (int64_t r = 0; r < rows.n; ++r) convert(own.x + (i * rows.n + r) * plan.Ip, x + r * p.I, p.I);
  }
}

// There may be a single step: a team shares the units.
template <class S, class E, class W>
void ForwardRange<S, E, W>::project_unpacked(int64_t s, int64_t count) {
  if (share.worker == 0) gather_inputs(s, 0, count);
  share.wait();
  multiply_gates(0, plan.cell.gates, count * rows.n, own.x, plan.Ip, p.I, given.w_ih, given.b_ih, own.gates, plan.Gp);
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::multiply_gates(int gate, int gates, int64_t n, const E* a, int64_t lda, int64_t K,
                                           const void* weight, const void* bias, T* out, int64_t ldo) {
  for (int g = 0; g < gates; ++g) {
    const int64_t row = (gate + g) * p.H + begin;
    multiply_unpacked(n, end - begin, K, a, lda, as<S>(weight) + row * K, bias ? as<S>(bias) + row : nullptr,
                      out + g * p.H + begin, ldo);
  }
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::project_outputs() {
  share.wait();
  int64_t from, to;
  share.part(p.P, kPlain * L, &from, &to);
  multiply(rows.n, to - from, p.H, own.hidden, plan.Hp, w.w_hr + from * panel_depth<W>(p.H), nullptr, own.h_next + from,
           plan.Pp);
}

template <class S, class E, class W>
void ForwardRange<S, E, W>::emit(int64_t t) {
  int64_t from, to;
  share.part(p.P, kPlain * L, &from, &to);
  for (int64_t r = 0; r < rows.n; ++r) {
    S* y = as<S>(p.y) + ((t * p.B + rows.b0 + r) * p.D + rows.d) * p.P;
    T* h_next = own.h_next + r * plan.Pp;
    if (active(t, r)) {
      convert(y + from, h_next + from, to - from);
    } else {
      memset(y + from, 0, size_t(to - from) * sizeof(S));
      convert(h_next + from, own.h + r * plan.Pp + from, to - from);
      if (share.worker == 0) save_nothing(t, r);
    }
    if (kInPairs<E>) convert(own.h_read_next + r * plan.Pp + from, h_next + from, to - from);
  }
  swap(own.h, own.h_next);
  swap(own.h_read, own.h_read_next);
}

// Backward never reads a finished row, but the same call should leave the same bits.
template <class S, class E, class W>
void ForwardRange<S, E, W>::save_nothing(int64_t t, int64_t r) {
  const int64_t carried = plan.cell.carried * p.H;
  if (p.saved) zero(saved_row(t, r), (plan.cell.saved + p.projected) * p.H);
  if (carried && p.saved_c) zero(as<T>(p.saved_c) + ((rows.d * p.T + t) * p.B + rows.b0 + r) * carried, carried);
}

template <class S, class E, class W>
void run_forward(const CellSizes& cell, WalkForward<S, E, W> walk, const Layer& layer, void* workspace) {
  const ForwardPlan<S, E, W> plan(cell, layer, workspace);
  if (!plan.unpacked() && !layer.packed) pack_all(plan);
  walk_rows(plan.tasks, [&](RowRange rows, int place, Share share) {
    const MatrixUnit<E> unit;
    walk(plan, rows, plan.scratch(workspace, place), share);
  });
}

template <class S, class E, class W>
size_t measure_forward(const CellSizes& cell, const Layer& layer) {
  return ForwardPlan<S, E, W>(cell, layer, nullptr).bytes();
}

template <class S, class E, class W>
size_t pack_forward(const CellSizes& cell, const Layer& layer, void* to) {
  ForwardPlan<S, E, W> plan(cell, layer, nullptr);
  Workspace packed(to);
  plan.take_packed(packed);
  if (to) pack_all(plan);
  return packed.used();
}

#define FASTRNN_FORWARD(S, E, W)                                                          \
  template class ForwardRange<S, E, W>;                                                   \
  template void run_forward(const CellSizes&, WalkForward<S, E, W>, const Layer&, void*); \
  template size_t measure_forward<S, E, W>(const CellSizes&, const Layer&);               \
  template size_t pack_forward<S, E, W>(const CellSizes&, const Layer&, void*);
FASTRNN_FORWARD(float, float, float)
FASTRNN_FORWARD(double, double, double)
FASTRNN_FORWARD(BFloat16, Element<BFloat16>, BFloat16)
FASTRNN_FORWARD(Float16, float, float)
FASTRNN_FORWARD(float, float, BFloat16)
FASTRNN_FORWARD(float, float, Int8Lane)
#if defined(__AVX512BF16__)
FASTRNN_FORWARD(float, BFloat16, BFloat16)
#endif

}  // namespace fastrnn::cpu::FASTRNN_ISA
