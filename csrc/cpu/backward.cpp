// The steps of a backward pass in reverse, per range of rows: the cell's gate gradients of every step are written to
// one buffer, and one product with w_hh per step carries dh on (backward_pass.cpp).
#include "../cells/lookup.h"
#include "backward_pass.h"
#include "kernels.h"
#include "recompute.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

// One direction of a range of rows, from the last step of a chunk to its first.
template <class Cell, class S, class E>
class BackwardRows : BackwardRange<S, E> {
 public:
  using Base = BackwardRange<S, E>;
  using T = Accumulator<S>;
  using V = Vec<T>;
  using Base::Base, Base::L;
  static constexpr int K = Cell::kCarried;
  // Where a normalized operand is, in what is saved or among the states, and among what the cell is given.
  static constexpr int kSavedOperand = larger(0, Cell::kSavedOperand), kOperandState = larger(0, Cell::kOperandState);
  static constexpr int kNormalized = Cell::kUnitWeights + Cell::kMasks;

  void run() {
    if (chunk.end == p.T && share.worker == 0) this->load_state_grads();
    share.wait();
    for (int64_t s = chunk.end - 1; s >= chunk.begin; --s) {
      this->choose_states(s);
      step(time_of_step(p, rows.d, s));
    }
    share.wait();
    if (chunk.begin == 0) {
      this->choose_states(-1);
      if (share.worker == 0) this->store_state_grads();
    }
  }

 private:
  using Base::active, Base::gate_grads, Base::saved_row, Base::time_row;
  using Base::p, Base::plan, Base::rows, Base::chunk, Base::share, Base::begin, Base::end, Base::out_begin,
      Base::out_end, Base::dh, Base::dh_prev, Base::dunits;

  // As that of the base, but with a K that the compiler knows.
  T* dc_at(int64_t r, int64_t k) const { return this->dc + (r * K + k) * plan.Hp; }
  const T* c_after(int64_t t, int64_t r, int64_t k) const {
    return K ? as<T>(p.saved_c) + ((rows.d * p.T * p.B + time_row(t, r)) * K + k) * p.H : nullptr;
  }

  void step(int64_t t) {
    this->add_output_grads(t);
    if (plan.has_projection()) this->unproject(t);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (active(t, r)) {
        cell_backward(t, r);
      } else {
        this->pass_on(t, r);
      }
    }
    if (plan.out.values) this->add_value_grads(t, true);
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
      finish_second_gates(t);
      if (plan.out.values) this->add_value_grads(t, false);
      share.wait();
    }
    if (plan.out.h0 || t != time_of_step(p, rows.d, 0))
      this->carry_on(t);  // else nobody asks for dh of before the first step
    this->cut_restarted_rows(t);
  }

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
    if (projection) memset(dh_prev_at + out_begin, 0, size_t(out_end - out_begin) * sizeof(T));
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

  // Two-phase cells: hands dL/d(second gate) through its product, then lets the cell finish its first gates.
  void finish_second_gates(int64_t t) {
    this->second_product(t);
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
        if (!kSizes<Cell>.is_second_grad(j) && j != Cell::kNormalizedGrad)
          store(grads_at + j * p.H + u, grads[j], count);
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
      if (share.worker == 0) this->norms(t, r)[first + g] = norm;
      for (int64_t u = begin; u < end; u += L)
        store(grads + (Cell::kGrads + first + g) * H + u,
              grad_before(norm, lost[g], grad(g, u, H - u), norm(load(raw + g * H + u, H - u))), H - u);
    }
  }
};

template <class Cell, class S, class E>
void walk(const BackwardPlan<S, E>& plan, RowRange rows, Chunk chunk, Share share, E* panel) {
  BackwardRows<Cell, S, E>(plan, rows, chunk, share, panel).run();
}

template <class Cell, class S>
void recompute(const RecomputePlan<S>& plan, Chunk chunk, int task, const typename RecomputePlan<S>::Scratch& own) {
  if constexpr (!Cell::kIsNormalized) Recompute<Cell, S>(plan).run(chunk, task, own);
}

template <class Cell, class S, class E>
void run(const Layer& layer, const LayerGrads& grads, void* workspace) {
  constexpr BackwardOfCell<S, E> of_cell{walk<Cell, S, E>, Cell::kIsNormalized ? nullptr : recompute<Cell, S>};
  run_backward(kSizes<Cell>, of_cell, layer, grads, workspace);
}

template <class Cell, class S, class E>
size_t measure(const Layer& layer, const LayerGrads& grads) {
  return measure_backward<S, E>(kSizes<Cell>, layer, grads);
}

template <class Cell, class S, class E = Element<S>>
constexpr BackwardKernels backward_in = {run<Cell, S, E>, measure<Cell, S, E>};

// Where weights alone are rounded, which is for inference, there are none.
template <class Cell, int variant>
constexpr BackwardKernels backward_kernels_of() {
  if constexpr (variant == kFloat32) return backward_in<Cell, float>;
  if constexpr (variant == kFloat64) return backward_in<Cell, double>;
  if constexpr (variant == kBFloat16) return backward_in<Cell, BFloat16>;
  if constexpr (variant == kFloat16) return backward_in<Cell, Float16>;
  if constexpr (variant == kBFloat16Products) return backward_in<Cell, float, RoundedElement>;
  return {};
}

}  // namespace

FASTRNN_DEFINE_LOOKUP(backward_kernels, BackwardKernels)

}  // namespace fastrnn::cpu::FASTRNN_ISA
