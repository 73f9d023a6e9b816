// Backward pass of one layer, in chunks of steps from the last to the first. Per chunk, first the steps in reverse
// (backward.cpp), then everything else in a few large products.
#include "backward_pass.h"

#include "large_products.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

// Task 2d packs w_ih, task 2d+1 the others: this worker's columns of each.
template <class S, class E>
void pack_weights(const BackwardPlan<S, E>& plan, int task, Share share) {
  const Layer& p = plan.p;
  const int d = task / 2;
  const auto& to = plan.directions[d];
  const auto pack = [share](E* packed, int64_t K, int64_t N, auto row) {
    int64_t begin, end;
    share.part(N, kPlain * BackwardPlan<S, E>::L, &begin, &end);
    pack_rows(packed + begin * round_up(K, kGroup<E>), K, end - begin, [=](int64_t k) { return row(k) + begin; });
  };
  if (task % 2 == 0) {
    if (to.w_ih) pack(to.w_ih, plan.cell.gates * p.H, p.I, [&](int64_t k) { return plan.w_ih_row(d, k); });
    return;
  }
  if (to.w_hh) pack(to.w_hh, plan.cell.first_gates * p.H, p.P, plan.w_hh_rows(d));
  if (to.w_second) pack(to.w_second, plan.cell.second_gates * p.H, p.H, plan.w_second_rows(d));
  if (to.w_hr) pack(to.w_hr, p.P, p.H, plan.w_hr_rows(d));
}

template <class S, class E>
void run_chunk(const BackwardPlan<S, E>& plan, BackwardOfCell<S, E> of_cell, Chunk chunk, void* workspace) {
  if (of_cell.recompute && plan.recomputes())
    parallel_for(plan.tasks.threads(), plan.recompute.tasks(chunk), [&](int task, int worker) {
      of_cell.recompute(plan.recompute, chunk, task, plan.scratch(workspace, worker).recompute);
    });
  walk_rows(plan.tasks, [&](RowRange rows, int, Share share) {
    const MatrixUnit<E> unit;
    of_cell.walk(plan, rows, chunk, share, plan.scratch(workspace, share.thread).panel);
  });
  const LargeProducts<S, E> products(plan, chunk);
  for (int round = 0; round < 2; ++round)
    parallel_for(plan.tasks.threads(), products.tasks(round), [&](int task, int worker) {
      const MatrixUnit<E> unit;
      products.run(round, task, plan.scratch(workspace, worker));
    });
}

// use(first element, count) for all of what two directions add to, if they do; threads share it.
template <class Plan, class Use>
void each_part_of_x(const Plan& plan, Use use) {
  const int64_t size = plan.p.T * plan.p.B * plan.p.I, block = int64_t{1} << 18;
  if (plan.sum_x)
    parallel_for(plan.tasks.threads(), int((size + block - 1) / block),
                 [&](int task, int) { use(task * block, smaller(block, size - task * block)); });
}

template <class N>
void zero(N* to, int64_t count) {
  memset(to, 0, size_t(count) * sizeof(N));
}

// to += from for elements [begin, end) of `count`, in whole vectors: there is room behind `to`.
template <class T, class N>
void add(T* to, const N* from, int64_t begin, int64_t end, int64_t count) {
  for (int64_t j = begin; j < end; j += kLanes<T>) store(to + j, load(to + j) + load(from + j, count - j));
}

}  // namespace

template <class S, class E>
BackwardRange<S, E>::BackwardRange(const Plan& plan, RowRange rows, Chunk chunk, Share share, E* panel)
    : p(plan.p),
      plan(plan),
      rows(rows),
      w(plan.directions[rows.d]),
      gates(plan.gates(rows.d, chunk)),
      chunk(chunk),
      share(share),
      panel(panel),
      dc(w.dc + rows.b0 * plan.cell.carried * plan.Hp),
      dunits(w.dunits + rows.b0 * plan.Hp) {
  share.part(p.H, kPlain * L, &begin, &end);
  share.part(p.P, kPlain * L, &out_begin, &out_end);
  choose_states(chunk.end - 1);
}

template <class S, class E>
void BackwardRange<S, E>::load_state_grads() {
  const int K = plan.cell.carried;
  zero(dh, rows.n * plan.Pp);
  zero(dc, rows.n * K * plan.Hp);
  for (int64_t r = 0; r < rows.n; ++r) {
    if (plan.out.h_n) convert(dh + r * plan.Pp, as<S>(plan.out.h_n) + state_row(r) * p.P, p.P);
    for (int k = 0; plan.out.c_n && k < K; ++k)
      convert(dc_at(r, k), as<S>(plan.out.c_n) + (state_row(r) * K + k) * p.H, p.H);
  }
}

template <class S, class E>
void BackwardRange<S, E>::store_state_grads() {
  const int K = plan.cell.carried;
  for (int64_t r = 0; r < rows.n; ++r) {
    if (plan.out.h0) convert(as<S>(plan.out.h0) + state_row(r) * p.P, dh + r * plan.Pp, p.P);
    for (int k = 0; plan.out.c0 && k < K; ++k)
      convert(as<S>(plan.out.c0) + (state_row(r) * K + k) * p.H, dc_at(r, k), p.H);
  }
}

template <class S, class E>
void BackwardRange<S, E>::add_output_grads(int64_t t) {
  const int K = plan.cell.carried;
  for (int64_t r = 0; r < rows.n; ++r) {
    if (!active(t, r)) continue;
    if (plan.out.y)
      add(dh + r * plan.Pp, as<S>(plan.out.y) + (time_row(t, r) * p.D + rows.d) * p.P, out_begin, out_end, p.P);
    const T* const dc_t = as<T>(plan.out.saved_c) + (rows.d * p.T * p.B + time_row(t, r)) * K * p.H;
    for (int k = 0; plan.out.saved_c && k < K; ++k) add(dc_at(r, k), dc_t + k * p.H, begin, end, p.H);
  }
}

// out = init + a W for columns [from, to) of W [depth, .], which is packed, or lies as the caller stores it.
template <class S, class E>
void BackwardRange<S, E>::product(int64_t from, int64_t to, int64_t depth, Operand<E> a, const E* packed,
                                  WeightRows<S> stored, Init<T> init, T* out, int64_t pitch) const {
  if (plan.packs_on_the_way()) {
    gemm_of_rows(rows.n, to - from, depth, a, stored.from_column(from), panel, init, out, pitch);
  } else {
    gemm(rows.n, to - from, depth, a, packed + from * round_up(depth, kGroup<E>), init, out, pitch);
  }
}

template <class S, class E>
void BackwardRange<S, E>::unproject(int64_t t) {
  E* projected = w.projected + chunk_row(t, 0) * p.P;
  const int64_t count = out_end - out_begin;
  for (int64_t r = 0; r < rows.n; ++r) {
    if (active(t, r)) {
      convert(projected + r * p.P + out_begin, dh + r * plan.Pp + out_begin, count);
    } else {
      zero(projected + r * p.P + out_begin, count);
    }
  }
  share.wait();
  product(begin, end, p.P, rows_of(projected, p.P), w.w_hr, plan.w_hr_rows(rows.d), {nullptr, 0}, dunits + begin,
          plan.Hp);
}

template <class S, class E>
void BackwardRange<S, E>::second_product(int64_t t) {
  const int first = plan.cell.recurrent_grad[plan.cell.first_gates];
  product(begin, end, plan.cell.second_gates * p.H, rows_of(gate_grads(t, 0) + first * p.H, plan.Gp), w.w_second,
          plan.w_second_rows(rows.d), {nullptr, 0}, dunits + begin, plan.Hp);
}

template <class S, class E>
void BackwardRange<S, E>::pass_on(int64_t t, int64_t r) {
  for (int j = 0; j < plan.grad_vectors(); ++j) zero(gate_grads(t, r) + j * p.H + begin, end - begin);
  if (share.worker == 0) zero(norms(t, r), plan.cell.gains);
  convert(dh_prev + r * plan.Pp + out_begin, dh + r * plan.Pp + out_begin, out_end - out_begin);
}

template <class S, class E>
void BackwardRange<S, E>::add_value_grads(int64_t t, bool is_second) {
  const int vectors = plan.cell.grads;
  for (int64_t r = 0; r < rows.n; ++r) {
    if (!active(t, r)) continue;
    const S* const from = as<S>(plan.out.values) + (rows.d * p.T * p.B + time_row(t, r)) * vectors * p.H;
    E* const to = gate_grads(t, r);
    for (int j = 0; j < vectors; ++j) {
      if (plan.cell.second_gates && plan.cell.is_second_grad(j) != is_second) continue;
      for (int64_t u = j * p.H + begin; u < j * p.H + end; u += L) {
        const int64_t count = j * p.H + end - u;
        store(to + u, load(to + u, count) + load(from + u, count), count);
      }
    }
  }
}

template <class S, class E>
void BackwardRange<S, E>::carry_on(int64_t t) {
  const Operand<E> grads = rows_of(gate_grads(t, 0) + plan.recurrent_vectors_at() * p.H, plan.Gp);
  T* const to = dh_prev + out_begin;
  if (plan.cell.first_gates)
    product(out_begin, out_end, plan.cell.first_gates * p.H, grads, w.w_hh, plan.w_hh_rows(rows.d), {to, plan.Pp}, to,
            plan.Pp);
}

template <class S, class E>
void BackwardRange<S, E>::cut_restarted_rows(int64_t t) {
  for (int64_t r = 0; p.resets && r < rows.n; ++r) {
    if (!active(t, r) || !row_restarts(p, rows.d, t, rows.b0 + r)) continue;
    zero(dh_prev + r * plan.Pp + out_begin, out_end - out_begin);
    for (int k = 0; k < plan.cell.carried; ++k) zero(dc_at(r, k) + begin, end - begin);
  }
}

template <class S, class E>
void run_backward(const CellSizes& cell, BackwardOfCell<S, E> of_cell, const Layer& layer, const LayerGrads& grads,
                  void* workspace) {
  using T = Accumulator<S>;
  const BackwardPlan<S, E> plan(cell, layer, grads, workspace);
  if (!plan.packs_on_the_way())
    pack_in_parts(plan.tasks, 2 * layer.D, [&](int task, Share share) { pack_weights(plan, task, share); });
  if (plan.recomputes())
    pack_in_parts(plan.tasks, 2 * layer.D, [&](int task, Share share) { plan.recompute.pack_weights(task, share); });
  each_part_of_x(plan, [&](int64_t at, int64_t count) { memset(plan.sum_x + at, 0, size_t(count) * sizeof(T)); });
  Chunk chunk{0, layer.T};
  do {
    chunk.begin = larger(0, chunk.end - plan.chunk);
    run_chunk(plan, of_cell, chunk, workspace);
    chunk.end = chunk.begin;
  } while (chunk.end > 0);
  if (!plan.kStoresDirectly)
    each_part_of_x(plan, [&](int64_t at, int64_t count) { convert(as<S>(grads.x) + at, plan.sum_x + at, count); });
}

template <class S, class E>
size_t measure_backward(const CellSizes& cell, const Layer& layer, const LayerGrads& grads) {
  return BackwardPlan<S, E>(cell, layer, grads, nullptr).bytes();
}

#define FASTRNN_BACKWARD(S, E)                                                                                \
  template class BackwardRange<S, E>;                                                                         \
  template void run_backward(const CellSizes&, BackwardOfCell<S, E>, const Layer&, const LayerGrads&, void*); \
  template size_t measure_backward<S, E>(const CellSizes&, const Layer&, const LayerGrads&);
FASTRNN_BACKWARD(float, float)
FASTRNN_BACKWARD(double, double)
FASTRNN_BACKWARD(BFloat16, Element<BFloat16>)
FASTRNN_BACKWARD(Float16, float)
#if defined(__AVX512BF16__)
FASTRNN_BACKWARD(float, BFloat16)
#endif

}  // namespace fastrnn::cpu::FASTRNN_ISA
