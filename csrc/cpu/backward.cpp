// Backward pass of one layer, in chunks of steps from the last to the first. Per chunk, first the steps in reverse, per
// range of rows: the cell's gate gradients of every step are written to one buffer, and one product with w_hh per step
// carries dh on. Then everything else is a few large products over that buffer while it is in the cache: dx = dG W_ih,
// dW += dG^T [x or h or operand] over all rows of the chunk.
#include "../cells/lookup.h"
#include "backward_plan.h"
#include "kernels.h"
#include "large_products.h"
#include "states.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

// Task 2d packs w_ih, task 2d+1 the others: this worker's columns of each.
template <class Cell, class S, class E>
void pack_weights(const BackwardPlan<Cell, S, E>& plan, int task, Share share) {
  const Layer& p = plan.p;
  const int d = task / 2;
  const auto& to = plan.directions[d];
  const auto pack = [share](E* packed, int64_t K, int64_t N, auto row) {
    int64_t begin, end;
    share.part(N, kPlain * BackwardPlan<Cell, S, E>::L, &begin, &end);
    pack_rows(packed + begin * round_up(K, kGroup<E>), K, end - begin, [=](int64_t k) { return row(k) + begin; });
  };
  if (task % 2 == 0) {
    if (to.w_ih) pack(to.w_ih, Cell::kGates * p.H, p.I, [&](int64_t k) { return plan.w_ih_row(d, k); });
    return;
  }
  if (to.w_hh) pack(to.w_hh, plan.kFirstGates * p.H, p.P, [&](int64_t k) { return plan.w_hh_row(d, k); });
  if (to.w_second) pack(to.w_second, Cell::kSecondGates * p.H, p.H, [&](int64_t k) { return plan.w_second_row(d, k); });
  if (to.w_hr) pack(to.w_hr, p.P, p.H, [&](int64_t k) { return plan.w_hr_row(d, k); });
}

// One direction of a range of rows, from the last step of a chunk to its first.
template <class Cell, class S, class E>
class BackwardRows {
 public:
  using Plan = BackwardPlan<Cell, S, E>;
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t width = kPlain * L;
  static constexpr int K = Cell::kCarried;
  // Where a normalized operand is, in what is saved or among the states, and among what the cell is given.
  static constexpr int kSavedOperand = larger(0, Cell::kSavedOperand), kOperandState = larger(0, Cell::kOperandState);
  static constexpr int kNormalized = Cell::kUnitWeights + Cell::kMasks;
  static constexpr int64_t kSecondGrad = Cell::kSecondGates ? Cell::kRecurrentGrad[Cell::kFirstGates] : 0;

  // `panel` is this thread's.
  BackwardRows(const Plan& plan, RowRange rows, Chunk chunk, Share share, E* panel)
      : p(plan.p),
        plan(plan),
        rows(rows),
        w(plan.directions[rows.d]),
        gates(plan.gates(rows.d, chunk)),
        chunk(chunk),
        share(share),
        panel(panel),
        dc(w.dc + rows.b0 * K * plan.Hp),
        dunits(w.dunits + rows.b0 * plan.Hp) {
    share.part(p.H, width, &begin, &end);
    share.part(p.P, width, &out_begin, &out_end);
    choose_states(chunk.end - 1);
  }

  void run() {
    if (chunk.end == p.T && share.worker == 0) load_state_grads();
    share.wait();
    for (int64_t s = chunk.end - 1; s >= chunk.begin; --s) {
      choose_states(s);
      step(time_of_step(p, rows.d, s));
    }
    share.wait();
    if (chunk.begin == 0) {
      choose_states(-1);
      if (share.worker == 0) store_state_grads();
    }
  }

 private:
  // dh of step s and of the one before it.
  void choose_states(int64_t s) {
    dh = w.dh[s & 1] + rows.b0 * plan.Pp;
    dh_prev = w.dh[~s & 1] + rows.b0 * plan.Pp;
  }

  int64_t state_row(int64_t r) const { return rows.d * p.B + rows.b0 + r; }
  int64_t time_row(int64_t t, int64_t r) const { return t * p.B + rows.b0 + r; }
  bool active(int64_t t, int64_t r) const { return row_is_active(p, t, rows.b0 + r); }
  int64_t chunk_row(int64_t t, int64_t r) const { return time_row(t, r) - chunk.first_row(p, rows.d); }
  T* dc_at(int64_t r, int64_t k) const { return dc + (r * K + k) * plan.Hp; }
  const T* c_after(int64_t t, int64_t r, int64_t k) const {
    return K ? as<T>(p.saved_c) + ((rows.d * p.T * p.B + time_row(t, r)) * K + k) * p.H : nullptr;
  }
  E* gate_grads(int64_t t, int64_t r) const { return gates + chunk_row(t, r) * plan.Gp; }
  Norm<T>* norms(int64_t t, int64_t r) const { return w.norms + chunk_row(t, r) * Cell::kGains; }

  void load_state_grads() {
    zero(dh, rows.n * plan.Pp);
    zero(dc, rows.n * K * plan.Hp);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (plan.out.h_n) convert(dh + r * plan.Pp, as<S>(plan.out.h_n) + state_row(r) * p.P, p.P);
      for (int k = 0; plan.out.c_n && k < K; ++k)
        convert(dc_at(r, k), as<S>(plan.out.c_n) + (state_row(r) * K + k) * p.H, p.H);
    }
  }

  void store_state_grads() {
    for (int64_t r = 0; r < rows.n; ++r) {
      if (plan.out.h0) convert(as<S>(plan.out.h0) + state_row(r) * p.P, dh + r * plan.Pp, p.P);
      for (int k = 0; plan.out.c0 && k < K; ++k)
        convert(as<S>(plan.out.c0) + (state_row(r) * K + k) * p.H, dc_at(r, k), p.H);
    }
  }

  // A thread of a team does its own units, and of the products that give outputs its own outputs; without a projection
  // these are the same.
  void step(int64_t t) {
    add_output_grads(t);
    if (plan.has_projection()) unproject(t);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (active(t, r)) {
        cell_backward(t, r);
      } else {
        pass_on(t, r);
      }
    }
    if (plan.out.values) add_value_grads(t, true);
    share.wait();
    if constexpr (Cell::kNormalizes) {
      normalized_operand(t);
      share.wait();
    }
    if constexpr (kNormalizesProducts<Cell>) {
      normalized_products(t);
      share.wait();
    }
    if constexpr (Cell::kSecondGates > 0) {
      second_product(t);
      if (plan.out.values) add_value_grads(t, false);
      share.wait();
    }
    if (plan.out.h0 || t != time_of_step(p, rows.d, 0))
      carry_on(t);  // else nobody asks for dh of before the first step
    cut_restarted_rows(t);
  }

  // dh of the step before, from all gates.
  void carry_on(int64_t t) {
    if (Cell::kFirstGates == 0) return;
    const int64_t depth = Cell::kFirstGates * p.H;
    const Operand<E> grads = rows_of(gate_grads(t, 0) + kRecurrentAt<Cell> * p.H, plan.Gp);
    T* const to = dh_prev + out_begin;
    product(
        out_begin, out_end, depth, grads, w.w_hh, [&](int64_t k) { return plan.w_hh_row(rows.d, k); },
        Init<T>{to, plan.Pp}, to, plan.Pp);
  }

  // out = init + a W for columns [from, to) of W [depth, .], which is packed, or has the rows row(k).
  template <class Row>
  void product(int64_t from, int64_t to, int64_t depth, Operand<E> a, const E* packed, Row row, Init<T> init, T* out,
               int64_t pitch) const {
    if (plan.packs_on_the_way()) {
      gemm_of_rows(rows.n, to - from, depth, a, [&](int64_t k) { return row(k) + from; }, panel, init, out, pitch);
    } else {
      gemm(rows.n, to - from, depth, a, packed + from * round_up(depth, kGroup<E>), init, out, pitch);
    }
  }

  // A finished row: no gate gradients, dh as it was.
  void pass_on(int64_t t, int64_t r) {
    for (int j = 0; j < kGradVectors<Cell>; ++j) zero(gate_grads(t, r) + j * p.H + begin, end - begin);
    if (share.worker == 0) zero(norms(t, r), Cell::kGains);
    convert(dh_prev + r * plan.Pp + out_begin, dh + r * plan.Pp + out_begin, out_end - out_begin);
  }

  void add_output_grads(int64_t t) {
    for (int64_t r = 0; r < rows.n; ++r) {
      if (!active(t, r)) continue;
      if (plan.out.y)
        add(dh + r * plan.Pp, as<S>(plan.out.y) + (time_row(t, r) * p.D + rows.d) * p.P, out_begin, out_end, p.P);
      const T* const dc_t = as<T>(plan.out.saved_c) + (rows.d * p.T * p.B + time_row(t, r)) * K * p.H;
      for (int k = 0; plan.out.saved_c && k < K; ++k) add(dc_at(r, k), dc_t + k * p.H, begin, end, p.H);
    }
  }

  // to += from for elements [begin, end) of `count`, in whole vectors: there is room behind `to`.
  template <class N>
  static void add(T* to, const N* from, int64_t begin, int64_t end, int64_t count) {
    for (int64_t j = begin; j < end; j += L) store(to + j, load(to + j) + load(from + j, count - j));
  }

  // dunits = dL/d(hidden before the projection); keeps dL/dh_t for the gradient of w_hr.
  void unproject(int64_t t) {
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
    product(
        begin, end, p.P, rows_of(projected, p.P), w.w_hr, [&](int64_t k) { return plan.w_hr_row(rows.d, k); },
        Init<T>{nullptr, 0}, dunits + begin, plan.Hp);
  }

  const S* saved_row(int64_t t, int64_t r) const { return plan.saved(rows.d, chunk, time_row(t, r)); }

  void cell_backward(int64_t t, int64_t r) {
    const bool projection = plan.has_projection();
    const S* const h_prev_at = projection ? nullptr : previous_h<S>(p, rows.d, t, rows.b0 + r);
    const PreviousC<S, K> c_prev_at = previous_c<S, K>(p, rows.d, t, rows.b0 + r);
    const Given<Cell, S> given_here = given_at<Cell, S>(p, rows.d, t, rows.b0 + r);
    const S* const saved_at = saved_row(t, r);
    const T* const c_at = c_after(t, r, 0);
    const T* const dh_at = projection ? dunits + r * plan.Hp : dh + r * plan.Pp;
    T *const dcarried_at = dc_at(r, 0), *const dh_prev_at = dh_prev + r * plan.Pp;
    E* const grads_at = gate_grads(t, r);
    const int64_t H = p.H, Hp = plan.Hp;
    if (projection) zero(dh_prev_at + out_begin, out_end - out_begin);
    Norm<T> norm = {};
    if constexpr (Cell::kNormalizes) norm = with_operand(t, r, [&](auto from) { return norm_of<T>(alone(), from, 0); });
    const auto units = [=](int64_t u, int64_t count) __attribute__((always_inline)) {
      V saved[at_least_one(kCellSaved<Cell>)], grads[Cell::kGrads], dh_prev_now, given[Given<Cell, S>::kCount];
      V c[at_least_one(K)], c_prev[at_least_one(K)], dcarried[at_least_one(K)];
      for (int j = 0; j < kCellSaved<Cell>; ++j) saved[j] = load(saved_at + j * H + u, count);
      for (V& grad : grads) grad = V(0);
      for (int k = 0; k < K; ++k) c[k] = load(c_at + k * H + u, count), dcarried[k] = load(dcarried_at + k * Hp + u);
      c_prev_at.load_units(c_prev, u, count, H);
      given_here.load_all(given, 0, u, H);
      if constexpr (Cell::kNormalizes) {
        const V operand = Cell::kOperandState < 0 ? load(saved_at + kSavedOperand * H + u, count) : c[kOperandState];
        given[kNormalized] = norm(operand);
      }
      const V h_prev = h_prev_at ? load(h_prev_at + u, count) : V(0);
      Cell::backward(saved, h_prev, given, c_prev, c, load(dh_at + u), dcarried, grads, dh_prev_now);
      for (int j = 0; j < Cell::kGrads; ++j) store(grads_at + j * H + u, grads[j], count);
      for (int k = 0; k < K; ++k) store(dcarried_at + k * Hp + u, dcarried[k]);
      if (!projection) store(dh_prev_at + u, dh_prev_now);
    };
    int64_t u = begin;
    for (; u + L <= end; u += L) units(u, L);
    if (u < end) units(u, end - u);
  }

  // Of the second gates when their product is due, of the others when the step is done with them.
  void add_value_grads(int64_t t, bool is_second) {
    for (int64_t r = 0; r < rows.n; ++r) {
      if (!active(t, r)) continue;
      const S* const from = as<S>(plan.out.values) + (rows.d * p.T * p.B + time_row(t, r)) * Cell::kGrads * p.H;
      E* const to = gate_grads(t, r);
      for (int j = 0; j < Cell::kGrads; ++j) {
        if (Cell::kSecondGates > 0 && is_second_gate(j) != is_second) continue;
        for (int64_t u = j * p.H + begin; u < j * p.H + end; u += L) {
          const int64_t count = j * p.H + end - u;
          store(to + u, load(to + u, count) + load(from + u, count), count);
        }
      }
    }
  }

  static bool is_second_gate(int j) { return j >= kSecondGrad && j < kSecondGrad + Cell::kSecondGates; }

  // Two-phase cells: hands dL/d(second gate) through its product, then lets the cell finish its first gates.
  void second_product(int64_t t) {
    const Operand<E> grads = rows_of(gate_grads(t, 0) + kSecondGrad * p.H, plan.Gp);
    const int64_t depth = Cell::kSecondGates * p.H;
    product(
        begin, end, depth, grads, w.w_second, [&](int64_t k) { return plan.w_second_row(rows.d, k); },
        Init<T>{nullptr, 0}, dunits + begin, plan.Hp);
    for (int64_t r = 0; r < rows.n; ++r)
      if (active(t, r))
        finish_first_gates(t, r, Norm<T>{},
                           [&](int64_t u, const V*, const V*) { return load(dunits + r * plan.Hp + u); });
  }

  // Cell::backward_first; doperand(u, given, grads) is the gradient of the operand, `norm` what that is normalized by.
  template <class Doperand>
  void finish_first_gates(int64_t t, int64_t r, Norm<T> norm, Doperand doperand) {
    const S* h_prev = previous_h<S>(p, rows.d, t, rows.b0 + r);
    const S* saved_at = saved_row(t, r);
    E* grads_at = gate_grads(t, r);
    T* dh_prev_at = dh_prev + r * plan.Pp;
    const PreviousC<S, K> c_prev_at = previous_c<S, K>(p, rows.d, t, rows.b0 + r);
    const Given<Cell, S> given_here = given_at<Cell, S>(p, rows.d, t, rows.b0 + r);
    for (int64_t u = begin; u < end; u += L) {
      const int64_t count = p.H - u;
      V saved[at_least_one(kCellSaved<Cell>)], grads[Cell::kGrads], dh_prev_now = load(dh_prev_at + u);
      V given[Given<Cell, S>::kCount], c_prev[at_least_one(K)], c[at_least_one(K)], dcarried[at_least_one(K)];
      c_prev_at.load_units(c_prev, u, count, p.H);
      given_here.load_all(given, 0, u, p.H);
      for (int k = 0; k < K; ++k) c[k] = load(c_after(t, r, k) + u, count), dcarried[k] = load(dc_at(r, k) + u);
      for (int j = 0; j < kCellSaved<Cell>; ++j) saved[j] = load(saved_at + j * p.H + u, count);
      for (int j = 0; j < Cell::kGrads; ++j) grads[j] = load(grads_at + j * p.H + u, count);
      if constexpr (Cell::kNormalizes) {
        const V operand = Cell::kOperandState < 0 ? saved[kSavedOperand] : c[kOperandState];
        given[kNormalized] = norm(operand);
      }
      Cell::backward_first(saved, h_prev ? load(h_prev + u, count) : V(0), given, c_prev, c, doperand(u, given, grads),
                           dcarried, grads, dh_prev_now);
      for (int j = 0; j < Cell::kGrads; ++j)  // what the team's other threads may still read stays as it is
        if (!is_second_gate(j) && j != Cell::kNormalizedGrad) store(grads_at + j * p.H + u, grads[j], count);
      for (int k = 0; k < K; ++k) store(dc_at(r, k) + u, dcarried[k]);
      store(dh_prev_at + u, dh_prev_now);
    }
  }

  Group alone() const { return {1, kAlone, 0, p.H}; }

  // use() of the operand of a row's normalization, [H]: a state of the step, or saved.
  template <class Use>
  auto with_operand(int64_t t, int64_t r, Use use) const {
    if constexpr (Cell::kOperandState >= 0) {
      return use(c_after(t, r, Cell::kOperandState));
    } else {
      return use(saved_row(t, r) + kSavedOperand * p.H);
    }
  }

  // Cells that normalize their operand: hands the gradient through, then lets the cell finish its gates.
  void normalized_operand(int64_t t) {
    for (int64_t r = 0; r < rows.n; ++r)
      if (active(t, r))
        with_operand(t, r, [&](auto operand) {
          const E* const d = gate_grads(t, r) + Cell::kNormalizedGrad * p.H;
          const Norm<T> norm = norm_of<T>(alone(), operand, 0);
          const NormGrad<T> lost = norm_grad<T>(
              alone(), [=](int, int64_t u, int64_t n) { return load(d + u, n); },
              [=](int, int64_t u, int64_t n) { return norm(load(operand + u, n)); });
          finish_first_gates(t, r, norm, [=](int64_t, const V* given, const V* grads) {
            return grad_before(norm, lost, grads[Cell::kNormalizedGrad], given[kNormalized]);
          });
        });
  }

  // The gradients of the products themselves, from those of the normalized ones.
  void normalized_products(int64_t t) {
    for (int64_t r = 0; r < rows.n; ++r) {
      if (!active(t, r)) continue;
      normalized_gates(t, r, 0, Cell::kGates, Cell::kInputGroup, Cell::kInputGrad);
      normalized_gates(t, r, Cell::kGates, Cell::kFirstGates, Cell::kRecurrentGroup, Cell::kRecurrentGrad);
    }
  }

  // Of `gates` products from `first` on, the vectors `places` of the row's gradients being those after the gain.
  void normalized_gates(int64_t t, int64_t r, int first, int gates, const int* groups, const int* places) {
    const int64_t H = p.H;
    E* const grads = gate_grads(t, r);
    const S* const raw = saved_row(t, r) + (kCellSaved<Cell> + first) * H;
    const S* const gains = as<S>(p.weights[rows.d].w_own) + (Cell::kUnitWeights + first) * H;
    Norm<T> found[at_least_one(Cell::kGains)];
    norms_of(gates, groups, H, raw, H, found);
    const auto grad = [=](int g, int64_t u, int64_t n) {
      return load(grads + places[g] * H + u, n) * load(gains + g * H + u, n);
    };
    NormGrad<T> lost[at_least_one(Cell::kGains)];
    for (int g = 0; g < gates; ++g) {
      const Norm<T> norm = found[g];
      int same = 0;
      while (groups[same] != groups[g]) ++same;
      lost[g] = same < g ? lost[same]
                         : norm_grad<T>(
                               {gates, groups, groups[g], H}, grad,
                               [=](int k, int64_t u, int64_t n) { return norm(load(raw + k * H + u, n)); });
      if (share.worker == 0) norms(t, r)[first + g] = norm;
      for (int64_t u = begin; u < end; u += L)
        store(grads + (Cell::kGrads + first + g) * H + u,
              grad_before(norm, lost[g], grad(g, u, H - u), norm(load(raw + g * H + u, H - u))), H - u);
    }
  }

  void cut_restarted_rows(int64_t t) {
    for (int64_t r = 0; p.resets && r < rows.n; ++r) {
      if (!active(t, r) || !row_restarts(p, rows.d, t, rows.b0 + r)) continue;
      zero(dh_prev + r * plan.Pp + out_begin, out_end - out_begin);
      for (int k = 0; k < K; ++k) zero(dc_at(r, k) + begin, end - begin);
    }
  }

  template <class N>
  static void zero(N* to, int64_t count) {
    memset(to, 0, size_t(count) * sizeof(N));
  }

  const Layer& p;
  const Plan& plan;
  const RowRange rows;
  const typename Plan::Direction& w;
  E* const gates;  // [chunk*B, Gp]
  const Chunk chunk;
  const Share share;
  E* const panel;
  T *dh, *dh_prev;             // [n, Pp] of the step at hand, of the one before it
  T *const dc, *const dunits;  // [n, K, Hp], [n, Hp]
  int64_t begin, end;          // this thread's units
  int64_t out_begin, out_end;  // this thread's outputs
};

template <class Cell, class S, class E>
void run_chunk(const BackwardPlan<Cell, S, E>& plan, Chunk chunk, void* workspace) {
  if constexpr (!kNormalizesProducts<Cell> && !Cell::kNormalizes)  // those always save
    if (plan.recomputes())
      parallel_for(plan.tasks.threads(), plan.recompute.tasks(chunk), [&](int task, int worker) {
        plan.recompute.run(chunk, task, plan.scratch(workspace, worker).recompute);
      });
  walk_rows(plan.tasks, [&](RowRange rows, int, Share share) {
    const MatrixUnit<E> unit;
    BackwardRows<Cell, S, E>(plan, rows, chunk, share, plan.scratch(workspace, share.thread).panel).run();
  });
  const LargeProducts<Cell, S, E> products(plan, chunk);
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

template <class Cell, class S, class E>
void run_backward(const Layer& layer, const LayerGrads& grads, void* workspace) {
  using T = Accumulator<S>;
  const BackwardPlan<Cell, S, E> plan(layer, grads, workspace);
  if (!plan.packs_on_the_way())
    pack_in_parts(plan.tasks, 2 * layer.D, [&](int task, Share share) { pack_weights(plan, task, share); });
  if (plan.recomputes())
    pack_in_parts(plan.tasks, 2 * layer.D, [&](int task, Share share) { plan.recompute.pack_weights(task, share); });
  each_part_of_x(plan, [&](int64_t at, int64_t count) { memset(plan.sum_x + at, 0, size_t(count) * sizeof(T)); });
  Chunk chunk{0, layer.T};
  do {
    chunk.begin = larger(0, chunk.end - plan.chunk);
    run_chunk(plan, chunk, workspace);
    chunk.end = chunk.begin;
  } while (chunk.end > 0);
  if (!plan.kStoresDirectly)
    each_part_of_x(plan, [&](int64_t at, int64_t count) { convert(as<S>(grads.x) + at, plan.sum_x + at, count); });
}

template <class Cell, class S, class E>
size_t measure_backward(const Layer& layer, const LayerGrads& grads) {
  return BackwardPlan<Cell, S, E>(layer, grads, nullptr).bytes();
}

template <class Cell, class S, class E = Element<S>>
constexpr BackwardKernels kernels_of = {run_backward<Cell, S, E>, measure_backward<Cell, S, E>};

// Where weights alone are rounded, which is for inference, there are none.
template <class Cell, int variant>
constexpr BackwardKernels kernels_for() {
  if constexpr (variant == kFloat32) return kernels_of<Cell, float>;
  if constexpr (variant == kFloat64) return kernels_of<Cell, double>;
  if constexpr (variant == kBFloat16) return kernels_of<Cell, BFloat16>;
  if constexpr (variant == kFloat16) return kernels_of<Cell, Float16>;
  if constexpr (variant == kBFloat16Products) return kernels_of<Cell, float, RoundedElement>;
  return {};
}

}  // namespace

FASTRNN_DEFINE_LOOKUP(backward_kernels, BackwardKernels)

}  // namespace fastrnn::cpu::FASTRNN_ISA
