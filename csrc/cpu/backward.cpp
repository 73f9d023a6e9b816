// Backward pass of one layer, in chunks of steps from the last to the first. Per chunk, first the steps in reverse, per
// range of rows: the cell's gate gradients of every step are written to one buffer, and one product with w_hh per step
// carries dh on. Then everything else is a few large products over that buffer while it is in the cache: dx = dG W_ih,
// dW += dG^T [x or h or operand] over all rows of the chunk.
#include "../cells/list.h"
#include "kernels.h"
#include "recompute.h"
#include "states.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

constexpr int64_t kChunkRows = 1024;  // steps times rows of a chunk, about: its gate gradients should stay in the cache

// S is the storage type, E that of panels and gate gradients.
template <class Cell, class S, class E>
struct BackwardPlan {
  using T = Accumulator<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kFirstGates = Cell::kGates - Cell::kSecondGates;
  static constexpr bool kStoresDirectly = sizeof(S) == sizeof(T);  // else gradients are summed in T, then rounded once

  struct Direction {
    E *w_ih, *w_hh, *w_second, *w_hr;  // plain panels of [G*H, I], [first*H, P], [second*H, H], [P, H]
    E* gates;                          // [chunk*B, Gp] gate gradients
    E* projected;                      // [chunk*B, P] dL/dh_t in full, if there is a projection
    T* dh[2];                          // [B, Pp] of the step at hand and of the one before it, in turns
    T *dc, *dunits;                    // [B, Hp]: dL/dc; what w_hr or the second product hands back
    T *sum_w_ih, *sum_w_hh, *sum_w_hr, *sum_b_ih, *sum_b_hh;  // the weight gradients in T
  };

  struct Scratch {  // of one worker
    E *a, *b;       // blocks of the weight-gradient products: [kBlockK, kBlockM], [kBlockK, N]
    T* dx;          // [kBlockM, I] where the gradient of x is rounded
    typename Recompute<Cell, S>::Scratch recompute;
  };

  BackwardPlan(const Layer& layer, const LayerGrads& grads, void* base)
      : p(layer), out(grads), tasks(layer, Cell::kGates), workspace(base), recompute(layer) {
    Hp = pitch_of<T>(p.H), Pp = pitch_of<T>(p.P), Gp = pitch_of<T>(Cell::kGrads * p.H);
    chunk = smaller(p.T, larger(1, kChunkRows / larger(1, p.B)));
    for (int d = 0; d < p.D; ++d) take_direction(directions[d], out.weights[d]);
    if (out.x && p.D == 2) sum_x = sum_for(out.x, p.T * p.B * p.I);
    if (!p.saved) recompute.take(workspace, chunk * p.B);
    scratch_begin = workspace.used();
    take_scratch(workspace);
    scratch_bytes = workspace.used() - scratch_begin;
  }

  size_t bytes() const { return scratch_begin + scratch_bytes * tasks.threads(); }

  Scratch scratch(void* base, int worker) const {
    Workspace own(static_cast<char*>(base) + scratch_begin + scratch_bytes * worker);
    return take_scratch(own);
  }

  bool has_projection() const { return p.projected; }

  // What forward saved of a row of [T, B] in the chunk, or what it would have saved.
  const S* saved(int d, Chunk chunk, int64_t row) const {
    const S* rows = p.saved ? as<S>(p.saved) + d * p.T * p.B * saved_size() : recompute.saved(d);
    return rows + (p.saved ? row : row - chunk.first_row(p, d)) * saved_size();
  }
  int64_t saved_size() const { return (Cell::kSaved + p.projected) * p.H; }

  const Layer& p;
  const LayerGrads& out;
  RowTasks tasks;
  Workspace workspace;
  Recompute<Cell, S> recompute;
  int64_t Hp, Pp, Gp;  // pitches of rows in scratch: of units, outputs, gate gradients
  int64_t chunk;       // steps
  T* sum_x = nullptr;  // [T*B, I] the gradient of x, where two directions add to it
  Direction directions[2] = {};
  size_t scratch_begin, scratch_bytes;

 private:
  void take_direction(Direction& d, const WeightGrads& w) {
    const int64_t rows = chunk * p.B, gates = Cell::kGates * p.H;
    if (out.x) d.w_ih = workspace.take<E>(plain_size<E>(gates, p.I, L));
    d.w_hh = workspace.take<E>(plain_size<E>(kFirstGates * p.H, p.P, L));
    if (Cell::kSecondGates) d.w_second = workspace.take<E>(plain_size<E>(Cell::kSecondGates * p.H, p.H, L));
    if (has_projection()) d.w_hr = workspace.take<E>(plain_size<E>(p.P, p.H, L));
    d.gates = workspace.take<E>(rows * Gp);
    if (has_projection()) d.projected = workspace.take<E>(rows * p.P);
    for (T*& dh : d.dh) dh = workspace.take<T>(p.B * Pp);
    d.dc = workspace.take<T>(p.B * Hp), d.dunits = workspace.take<T>(p.B * Hp);
    d.sum_w_ih = sum_for(w.w_ih, gates * p.I), d.sum_w_hh = sum_for(w.w_hh, gates * p.P);
    d.sum_b_ih = sum_for(w.b_ih, gates), d.sum_b_hh = sum_for(w.b_hh, gates);
    d.sum_w_hr = sum_for(w.w_hr, p.P * p.H);
  }

  T* sum_for(void* grad, int64_t count) {
    if (!grad) return nullptr;
    return kStoresDirectly ? static_cast<T*>(grad) : workspace.take<T>(count);
  }

  Scratch take_scratch(Workspace& from) const {
    const int64_t columns = round_up(larger(p.I, larger(p.P, p.H)), kPlain * L);
    Scratch s = {};
    s.a = from.take<E>(kBlockK * kBlockM), s.b = from.take<E>(kBlockK * columns);
    if (!kStoresDirectly) s.dx = from.take<T>(kBlockM * p.I);
    if (!p.saved) s.recompute = recompute.take_scratch(from);
    return s;
  }
};

// The gate whose gradient of the input product is vector j.
template <class Cell>
int64_t gate_at(int64_t j) {
  int64_t gate = 0;
  while (Cell::kInputGrad[gate] != j) ++gate;
  return gate;
}

// Task 2d packs w_ih, in the order in which the gate gradients lie; task 2d+1 packs the others.
template <class Cell, class S, class E>
void pack_weights(const BackwardPlan<Cell, S, E>& plan, int task) {
  constexpr int64_t kFirst = BackwardPlan<Cell, S, E>::kFirstGates;
  const Layer& p = plan.p;
  const Weights& w = p.weights[task / 2];
  const auto& to = plan.directions[task / 2];
  if (task % 2 == 0) {
    const auto row = [&](int64_t k) { return as<S>(w.w_ih) + (gate_at<Cell>(k / p.H) * p.H + k % p.H) * p.I; };
    if (to.w_ih) pack_rows(to.w_ih, Cell::kGates * p.H, p.I, row);
    return;
  }
  const S* w_hh = as<S>(w.w_hh);
  pack_rows(to.w_hh, kFirst * p.H, p.P, [&](int64_t k) { return w_hh + k * p.P; });
  if (Cell::kSecondGates)
    pack_rows(to.w_second, Cell::kSecondGates * p.H, p.H, [&](int64_t k) { return w_hh + (kFirst * p.H + k) * p.P; });
  if (w.w_hr) pack_rows(to.w_hr, p.P, p.H, [&](int64_t k) { return as<S>(w.w_hr) + k * p.H; });
}

// ---- the steps

// One direction of a range of rows, from the last step of a chunk to its first.
template <class Cell, class S, class E>
class BackwardRows {
 public:
  using Plan = BackwardPlan<Cell, S, E>;
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t width = kPlain * L;
  static constexpr int64_t kSecondGrad = Cell::kSecondGates ? Cell::kRecurrentGrad[Cell::kGates - 1] : 0;
  static_assert(Cell::kSecondGates <= 1, "several second gates: their gradients must lie side by side");

  BackwardRows(const Plan& plan, RowRange rows, Chunk chunk, Share share)
      : p(plan.p),
        plan(plan),
        rows(rows),
        w(plan.directions[rows.d]),
        chunk(chunk),
        share(share),
        dc(w.dc + rows.b0 * plan.Hp),
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
  E* gate_grads(int64_t t, int64_t r) const { return w.gates + chunk_row(t, r) * plan.Gp; }

  void load_state_grads() {
    zero(dh, rows.n * plan.Pp);
    zero(dc, rows.n * plan.Hp);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (plan.out.h_n) convert(dh + r * plan.Pp, as<S>(plan.out.h_n) + state_row(r) * p.P, p.P);
      if (plan.out.c_n) convert(dc + r * plan.Hp, as<S>(plan.out.c_n) + state_row(r) * p.H, p.H);
    }
  }

  void store_state_grads() {
    for (int64_t r = 0; r < rows.n; ++r) {
      if (plan.out.h0) convert(as<S>(plan.out.h0) + state_row(r) * p.P, dh + r * plan.Pp, p.P);
      if (plan.out.c0) convert(as<S>(plan.out.c0) + state_row(r) * p.H, dc + r * plan.Hp, p.H);
    }
  }

  // A thread of a team does its own units, and in a product its own columns, which are the same.
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
    share.wait();
    if constexpr (Cell::kSecondGates > 0) {
      second_product(t);
      share.wait();
    }
    if (plan.out.h0 || t != time_of_step(p, rows.d, 0))
      carry_on(t);  // else nobody asks for dh of before the first step
    cut_restarted_rows(t);
  }

  // dh of the step before, from all gates.
  void carry_on(int64_t t) {
    const int64_t K = Plan::kFirstGates * p.H;
    const Operand<E> gates{gate_grads(t, 0) + Cell::kRecurrentGrad[0] * p.H, plan.Gp, 1};
    gemm(rows.n, out_end - out_begin, K, gates, w.w_hh + out_begin * round_up(K, kGroup<E>),
         Init<T>{dh_prev + out_begin, plan.Pp}, dh_prev + out_begin, plan.Pp);
  }

  // A finished row: no gate gradients, dh as it was.
  void pass_on(int64_t t, int64_t r) {
    for (int j = 0; j < Cell::kGrads; ++j) zero(gate_grads(t, r) + j * p.H + begin, end - begin);
    convert(dh_prev + r * plan.Pp + out_begin, dh + r * plan.Pp + out_begin, out_end - out_begin);
  }

  void add_output_grads(int64_t t) {
    if (!plan.out.y) return;
    for (int64_t r = 0; r < rows.n; ++r) {
      if (!active(t, r)) continue;
      const S* dy = as<S>(plan.out.y) + (time_row(t, r) * p.D + rows.d) * p.P;
      T* to = dh + r * plan.Pp;
      for (int64_t j = out_begin; j < out_end; j += L) store(to + j, load(to + j) + load(dy + j, p.P - j));
    }
  }

  // dunits = dL/d(hidden before the projection); keeps dL/dh_t for the gradient of w_hr.
  void unproject(int64_t t) {
    E* projected = w.projected + chunk_row(t, 0) * p.P;
    for (int64_t r = 0; r < rows.n; ++r) {
      if (active(t, r)) {
        convert(projected + r * p.P, dh + r * plan.Pp, p.P);
      } else {
        zero(projected + r * p.P, p.P);
      }
    }
    gemm(rows.n, p.H, p.P, Operand<E>{projected, p.P, 1}, w.w_hr, Init<T>{nullptr, 0}, dunits, plan.Hp);
  }

  const S* saved_row(int64_t t, int64_t r) const { return plan.saved(rows.d, chunk, time_row(t, r)); }

  void cell_backward(int64_t t, int64_t r) {
    const bool projection = plan.has_projection();
    const int64_t time = time_row(t, r);
    const S* const h_prev_at = projection ? nullptr : previous_h<S>(p, rows.d, t, rows.b0 + r);
    const PreviousC<S> c_prev_at = Cell::kHasCell ? previous_c<S>(p, rows.d, t, rows.b0 + r) : PreviousC<S>{};
    const S* const saved_at = saved_row(t, r);
    const T* const c_at = Cell::kHasCell ? as<T>(p.saved_c) + (rows.d * p.T * p.B + time) * p.H : nullptr;
    const T* const dh_at = projection ? dunits + r * plan.Hp : dh + r * plan.Pp;
    T *const dc_at = dc + r * plan.Hp, *const dh_prev_at = dh_prev + r * plan.Pp;
    E* const grads_at = gate_grads(t, r);
    const int64_t H = p.H;
    if (projection) zero(dh_prev_at, plan.Pp);
    const auto units = [=](int64_t u, int64_t count) __attribute__((always_inline)) {
      V saved[Cell::kSaved], grads[Cell::kGrads], carried, c(0), c_prev(0), dc_now = load(dc_at + u);
      for (int j = 0; j < Cell::kSaved; ++j) saved[j] = load(saved_at + j * H + u, count);
      for (V& grad : grads) grad = V(0);
      if constexpr (Cell::kHasCell) c = load(c_at + u, count), c_prev = c_prev_at.load_units(u, count);
      const V h_prev = h_prev_at ? load(h_prev_at + u, count) : V(0);
      Cell::backward(saved, h_prev, c_prev, c, load(dh_at + u), dc_now, grads, carried);
      for (int j = 0; j < Cell::kGrads; ++j) store(grads_at + j * H + u, grads[j], count);
      store(dc_at + u, dc_now);
      if (!projection) store(dh_prev_at + u, carried);
    };
    int64_t u = begin;
    for (; u + L <= end; u += L) units(u, L);
    if (u < end) units(u, end - u);
  }

  // Two-phase cells: hands dL/d(second gate) through its product, then lets the cell finish its first gates.
  void second_product(int64_t t) {
    const Operand<E> gates{gate_grads(t, 0) + kSecondGrad * p.H, plan.Gp, 1};
    const int64_t K = Cell::kSecondGates * p.H;
    gemm(rows.n, end - begin, K, gates, w.w_second + begin * round_up(K, kGroup<E>), Init<T>{nullptr, 0},
         dunits + begin, plan.Hp);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (!active(t, r)) continue;
      const S* h_prev = previous_h<S>(p, rows.d, t, rows.b0 + r);
      const S* saved_at = saved_row(t, r);
      E* grads_at = gate_grads(t, r);
      T* dh_prev_at = dh_prev + r * plan.Pp;
      for (int64_t u = begin; u < end; u += L) {
        const int64_t count = p.H - u;
        V saved[Cell::kSaved], grads[Cell::kGrads], carried = load(dh_prev_at + u);
        for (int j = 0; j < Cell::kSaved; ++j) saved[j] = load(saved_at + j * p.H + u, count);
        for (int j = 0; j < Cell::kGrads; ++j) grads[j] = load(grads_at + j * p.H + u, count);
        Cell::backward_first(saved, h_prev ? load(h_prev + u, count) : V(0), load(dunits + r * plan.Hp + u), grads,
                             carried);
        for (int j = 0; j < Cell::kGrads; ++j)  // the second gate's may still be read by the team's other threads
          if (j != kSecondGrad) store(grads_at + j * p.H + u, grads[j], count);
        store(dh_prev_at + u, carried);
      }
    }
  }

  void cut_restarted_rows(int64_t t) {
    for (int64_t r = 0; p.resets && r < rows.n; ++r) {
      if (!active(t, r) || !row_restarts(p, rows.d, t, rows.b0 + r)) continue;
      int64_t from, to;
      share.part(p.P, width, &from, &to);
      zero(dh_prev + r * plan.Pp + out_begin, out_end - out_begin);
      zero(dc + r * plan.Hp + begin, end - begin);
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
  const Chunk chunk;
  const Share share;
  T *dh, *dh_prev;             // [n, Pp] of the step at hand, of the one before it
  T *const dc, *const dunits;  // [n, Hp]
  int64_t begin, end;          // this thread's units
  int64_t out_begin, out_end;  // this thread's outputs
};

// ---- the large products

// What the rows of a chunk add to the gradients of x and of the weights. A task has its own part of one output.
template <class Cell, class S, class E>
class LargeProducts {
 public:
  using Plan = BackwardPlan<Cell, S, E>;
  using T = Accumulator<S>;
  static constexpr int64_t width = kPlain * kLanes<T>;

  LargeProducts(const Plan& plan, Chunk chunk)
      : p(plan.p), plan(plan), chunk(chunk), rows(chunk.rows(p)), splits(plan.tasks.threads()) {}

  // Two rounds, the second for the reverse direction's part of dx, which may be of the same rows as the forward one's.
  int tasks(int round) const {
    const int inputs = int(plan.out.x ? (rows + kBlockM - 1) / kBlockM : 0);
    return round == 0 ? weight_tasks() + inputs : p.D == 2 ? inputs : 0;
  }

  void run(int round, int task, typename Plan::Scratch own) const {
    if (round == 1) return input_grads(1, task * kBlockM, own);
    if (task >= weight_tasks()) return input_grads(0, (task - weight_tasks()) * kBlockM, own);
    const int d = task / splits % p.D, part = task % splits;
    switch (task / splits / p.D) {
      case 0:
        return w_ih_grads(d, part, own);
      case 1:
        return w_hh_grads(d, part, own);
      case 2:
        return w_second_grads(d, part, own);
      default:
        return w_hr_grads(d, part, own);
    }
  }

 private:
  // One weight matrix, or rows of it: grad[m, :] = sum over k of a[k, column(m)] * row(k), and the sum of a itself for
  // a bias.
  struct Target {
    T *sum, *bias_sum;
    S *grad, *bias;
    int64_t begin, end, N;  // rows [begin, end) of [., N]
  };

  int weight_tasks() const { return 4 * splits * p.D; }

  Target part_of(int64_t begin, int64_t end, int part, int64_t N, T* sum, T* bias_sum, void* grad, void* bias) const {
    const int64_t count = end - begin;
    return {sum, bias_sum, as<S>(grad), as<S>(bias), begin + count * part / splits, begin + count * (part + 1) / splits,
            N};
  }

  void w_ih_grads(int d, int part, typename Plan::Scratch own) const {
    const auto& from = plan.directions[d];
    const WeightGrads& to = plan.out.weights[d];
    const Target target = part_of(0, Cell::kGates * p.H, part, p.I, from.sum_w_ih, from.sum_b_ih, to.w_ih, to.b_ih);
    sum_outer_products(d, target, from.gates, plan.Gp, p.H, Cell::kInputGrad, own,
                       [&](int64_t t, int64_t b) { return as<S>(p.x) + (t * p.B + b) * p.I; });
  }

  void w_hh_grads(int d, int part, typename Plan::Scratch own) const {
    const auto& from = plan.directions[d];
    const WeightGrads& to = plan.out.weights[d];
    const Target target =
        part_of(0, Plan::kFirstGates * p.H, part, p.P, from.sum_w_hh, from.sum_b_hh, to.w_hh, to.b_hh);
    sum_outer_products(d, target, from.gates, plan.Gp, p.H, Cell::kRecurrentGrad, own,
                       [&](int64_t t, int64_t b) { return previous_h<S>(p, d, t, b); });
  }

  void w_second_grads(int d, int part, typename Plan::Scratch own) const {
    if constexpr (Cell::kSecondGates > 0) {
      const auto& from = plan.directions[d];
      const WeightGrads& to = plan.out.weights[d];
      const Target target = part_of(Plan::kFirstGates * p.H, Cell::kGates * p.H, part, p.P, from.sum_w_hh,
                                    from.sum_b_hh, to.w_hh, to.b_hh);
      sum_outer_products(d, target, from.gates, plan.Gp, p.H, Cell::kRecurrentGrad, own, [&](int64_t t, int64_t b) {
        return plan.saved(d, chunk, t * p.B + b) + Cell::kSavedOperand * p.H;
      });
    }
  }

  void w_hr_grads(int d, int part, typename Plan::Scratch own) const {
    if (!plan.has_projection()) return;
    const auto& from = plan.directions[d];
    const Target target = part_of(0, p.P, part, p.H, from.sum_w_hr, nullptr, plan.out.weights[d].w_hr, nullptr);
    static constexpr int kOneBlock[1] = {0};
    sum_outer_products(d, target, from.projected, p.P, p.P, kOneBlock, own,
                       [&](int64_t t, int64_t b) { return plan.saved(d, chunk, t * p.B + b) + Cell::kSaved * p.H; });
  }

  // Row m of the target belongs to gate m / block, whose gradient is block `blocks[gate]` of a's columns. row(t, b) is
  // asked of active rows alone.
  template <class Row>
  void sum_outer_products(int d, const Target& to, const E* a, int64_t lda, int64_t block, const int* blocks,
                          typename Plan::Scratch own, Row row) const {
    if (!to.sum && !to.bias_sum) return;
    int64_t t = chunk.first_time(p, d), b = 0;
    const auto next_row = [&](int64_t) {
      const S* const found = row_is_active(p, t, b) ? row(t, b) : nullptr;
      if (++b == p.B) b = 0, ++t;
      return found;
    };
    const bool is_first = chunk.end == p.T, is_last = chunk.begin == 0;
    if (is_first && to.sum) memset(to.sum + to.begin * to.N, 0, size_t((to.end - to.begin) * to.N) * sizeof(T));
    if (is_first && to.bias_sum) memset(to.bias_sum + to.begin, 0, size_t(to.end - to.begin) * sizeof(T));
    for (int64_t k = 0; k < rows; k += kBlockK) {
      const int64_t depth = smaller(kBlockK, rows - k);
      if (to.sum) pack_rows(own.b, depth, to.N, next_row);
      int64_t count;
      for (int64_t m = to.begin; m < to.end; m += count) {
        count = smaller(smaller(kBlockM, to.end - m), block - m % block);
        const E* columns = a + k * lda + (blocks ? blocks[m / block] * block : 0) + m % block;
        if (to.bias_sum) add_rows(to.bias_sum + m, columns, lda, depth, count);
        if (to.sum) multiply_add(columns, lda, depth, count, to.N, own, to.sum + m * to.N);
      }
    }
    if (!Plan::kStoresDirectly && is_last) round_target(to);
  }

  // The left operand of the product, [depth, pitch], or in pairs of rows [depth/2, pitch, 2].
  static void copy_columns(E* to, int64_t pitch, const E* columns, int64_t lda, int64_t depth, int64_t count) {
    constexpr int64_t L = kLanes<T>;
    for (int64_t i = 0; i < depth; i += kGroup<E>) {
      const E *first = columns + i * lda, *second = i + 1 < depth ? first + lda : nullptr;
      for (int64_t j = 0; j < count; j += L) {
        if constexpr (kInPairs<E>) {
          store_pairs(to + i * pitch + 2 * j, load(first + j, count - j),
                      second ? load(second + j, count - j) : Vec<T>(0));
        } else {
          store(to + i * pitch + j, load(first + j, count - j));
        }
      }
    }
  }

  static void add_rows(T* sum, const E* rows, int64_t lda, int64_t depth, int64_t count) {
    constexpr int64_t L = kLanes<T>;
    for (int64_t j = 0; j < count; j += L) {
      Vec<T> total = load(sum + j, count - j);
      for (int64_t i = 0; i < depth; ++i) total = total + load(rows + i * lda + j, count - j);
      store(sum + j, total, count - j);
    }
  }

  // c [M, N] += columns^T [M, depth] * own.b [depth, N]. A copy of the columns pays where several panels read it.
  static void multiply_add(const E* columns, int64_t lda, int64_t depth, int64_t M, int64_t N,
                           typename Plan::Scratch own, T* c) {
    Operand<E> left{columns, 1, lda};
    if (kInPairs<E> || N > 2 * width) {
      const int64_t pitch = round_up(M, kLanes<T>);
      copy_columns(own.a, pitch, columns, lda, depth, M);
      left = {own.a, kGroup<E>, pitch};
    }
    for (int64_t n = 0; n < N; n += width)
      gemm_panels(M, smaller(width, N - n), 1, 0, depth, left, own.b + n * round_up(depth, kGroup<E>),
                  Init<T>{c + n, N}, c + n, N);
  }

  static void round_target(const Target& to) {
    if (to.sum) convert(to.grad + to.begin * to.N, to.sum + to.begin * to.N, (to.end - to.begin) * to.N);
    if (to.bias_sum) convert(to.bias + to.begin, to.bias_sum + to.begin, to.end - to.begin);
  }

  // dx for rows [m, m + kBlockM) of the chunk, from one direction.
  void input_grads(int d, int64_t m, typename Plan::Scratch own) const {
    const auto& from = plan.directions[d];
    const int64_t count = smaller(kBlockM, rows - m), at = (chunk.first_row(p, d) + m) * p.I;
    const bool rounds = !Plan::kStoresDirectly && !plan.sum_x;
    T* dx = plan.sum_x ? plan.sum_x + at : rounds ? own.dx : as<T>(plan.out.x) + at;
    gemm(count, p.I, Cell::kGates * p.H, Operand<E>{from.gates + m * plan.Gp, plan.Gp, 1}, from.w_ih,
         Init<T>{plan.sum_x ? dx : nullptr, p.I}, dx, p.I);
    if (rounds) convert(as<S>(plan.out.x) + at, dx, count * p.I);
  }

  const Layer& p;
  const Plan& plan;
  const Chunk chunk;
  const int64_t rows;
  const int splits;
};

template <class Cell, class S, class E>
void run_chunk(const BackwardPlan<Cell, S, E>& plan, Chunk chunk, void* workspace) {
  if (!plan.p.saved)
    parallel_for(plan.tasks.threads(), plan.recompute.tasks(chunk), [&](int task, int worker) {
      plan.recompute.run(chunk, task, plan.scratch(workspace, worker).recompute);
    });
  walk_rows(plan.tasks,
            [&](RowRange rows, int, Share share) { BackwardRows<Cell, S, E>(plan, rows, chunk, share).run(); });
  const LargeProducts<Cell, S, E> products(plan, chunk);
  for (int round = 0; round < 2; ++round)
    parallel_for(plan.tasks.threads(), products.tasks(round),
                 [&](int task, int worker) { products.run(round, task, plan.scratch(workspace, worker)); });
}

template <class Cell, class S, class E>
void run_backward(const Layer& layer, const LayerGrads& grads, void* workspace) {
  using T = Accumulator<S>;
  const BackwardPlan<Cell, S, E> plan(layer, grads, workspace);
  const int64_t dx_size = layer.T * layer.B * layer.I;
  parallel_for(plan.tasks.threads(), 2 * layer.D, [&](int task, int) { pack_weights(plan, task); });
  if (!layer.saved)
    parallel_for(plan.tasks.threads(), 2 * layer.D, [&](int task, int) { plan.recompute.pack_weights(task); });
  if (plan.sum_x) memset(plan.sum_x, 0, size_t(dx_size) * sizeof(T));
  Chunk chunk{0, layer.T};
  do {
    chunk.begin = larger(0, chunk.end - plan.chunk);
    run_chunk(plan, chunk, workspace);
    chunk.end = chunk.begin;
  } while (chunk.end > 0);
  if (plan.sum_x && !plan.kStoresDirectly) convert(as<S>(grads.x), plan.sum_x, dx_size);
}

template <class Cell, class S, class E>
size_t measure_backward(const Layer& layer, const LayerGrads& grads) {
  return BackwardPlan<Cell, S, E>(layer, grads, nullptr).bytes();
}

struct Functions {
  void (*run)(const Layer&, const LayerGrads&, void*);
  size_t (*workspace)(const Layer&, const LayerGrads&);
};

template <class Cell, class S, class E = Element<S>>
constexpr Functions functions_of = {run_backward<Cell, S, E>, measure_backward<Cell, S, E>};

// By cell, then by dtype; the last one is of float32 with products of numbers rounded to bfloat16.
#define FASTRNN_BACKWARD(name, Cell)                                                                                 \
  {functions_of<Cell, float>, functions_of<Cell, double>, functions_of<Cell, BFloat16>, functions_of<Cell, Float16>, \
   functions_of<Cell, float, RoundedElement>},

const Functions& functions(const Layer& layer) {
  static constexpr Functions kByCell[][5] = {FASTRNN_CELLS(FASTRNN_BACKWARD)};
  return kByCell[layer.cell][layer.products == Products::kBFloat16 ? 4 : int(layer.dtype)];
}

}  // namespace

size_t backward_workspace(const Layer& layer, const LayerGrads& grads) {
  return functions(layer).workspace(layer, grads);
}

void backward(const Layer& layer, const LayerGrads& grads, void* workspace) {
  functions(layer).run(layer, grads, workspace);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
