// Forward pass of one layer. For a range of rows: project a chunk of steps (one GEMM), then walk through it; per step
// the recurrent product of L units of all gates goes straight into the cell, whose results are the next state.
#include "../cells/lookup.h"
#include "forward_pass.h"
#include "kernels.h"
#include "normalize.h"
#include "pointwise.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

constexpr int64_t kSumRows = 48;  // of recurrent products that are finished before the cell has them: they stay in L1

// One direction of a range of rows, from the first step to the last.
template <class Cell, class S, class E, class W>
class ForwardRows : ForwardRange<S, E, W> {
 public:
  using Base = ForwardRange<S, E, W>;
  using T = Accumulator<S>;
  using Now = Pointwise<Cell, S, E>;
  using Base::Base, Base::L;
  static constexpr int kFirst = Cell::kFirstGates, K = Cell::kCarried;

  void run() {
    if (share.worker == 0) this->load_states();
    for (int64_t s = 0; s < p.T; s += plan.steps) {
      const int64_t count = smaller(plan.steps, p.T - s);
      this->project_inputs(s, count);
      share.wait();
      if constexpr (kNormalizesProducts<Cell>) normalize_inputs(s, count);
      for (int64_t i = 0; i < count; ++i) step(time_of_step(p, rows.d, s + i), own.gates + i * rows.n * plan.Gp);
    }
    if (share.worker == 0) this->store_states();
  }

 private:
  using Base::active, Base::saved_row;
  using Base::p, Base::plan, Base::rows, Base::w, Base::given, Base::share, Base::begin, Base::end, Base::own;

  void step(int64_t t, const T* gates) {
    this->restart_rows(t);
    const Now now = arrays_at(t, gates);
    const auto nothing = [](int64_t, int64_t) {};
    const auto expect = [now](int64_t r, int64_t u) { now.expect(r, u); };
    if constexpr (Cell::kSecondGates > 0) {
      product<0, kFirst>(own.h_read, plan.Pp, p.P, w.w_hh, w.b_hh, nothing,
                         [now](const Vec<T>* sums, Place at) { now.first(sums, at); });
      share.wait();
      product<kFirst, Cell::kSecondGates>(own.operand, plan.Hp, p.H, w.w_second, w.b_second, expect,
                                          [now](const Vec<T>* sums, Place at) { now.second(sums, at); });
    } else if constexpr (Cell::kNormalizes) {
      all_products(now, nothing, [now](const Vec<T>* sums, Place at) { now.first(sums, at); });
      share.wait();
      finish_normalized(now);
    } else {
      all_products(now, expect, [now](const Vec<T>* sums, Place at) { now.finish(sums, at); });
    }
    backwards = !backwards;
    if (p.projected) this->project_outputs();
    this->emit(t);
    share.wait();
  }

  // For every row and vector of this thread's units, use() of the products of h; expect(r, u) comes before it.
  template <class Expect, class Use>
  FASTRNN_INLINE void all_products(const Now& now, Expect expect, Use use) {
    if constexpr (kFirst == 0) {
      for (int64_t r = 0; r < rows.n; ++r)
        for (int64_t u = begin / L; u * L < end; ++u) use(nullptr, {r, u});
    } else if constexpr (kNormalizesProducts<Cell>) {
      T* const to = own.products;
      const int64_t Hp = plan.Hp;
      product<0, kFirst>(own.h_read, plan.Pp, p.P, w.w_hh, w.b_hh, expect, [=](const Vec<T>* sums, Place at) {
        for (int g = 0; g < kFirst; ++g) store(to + (at.r * kFirst + g) * Hp + at.u * L, sums[g]);
      });
      share.wait();
      normalize_products(now, use);
    } else {
      product<0, kFirst>(own.h_read, plan.Pp, p.P, w.w_hh, w.b_hh, expect, use);
    }
  }

  // gate * gain + bias of normalized product `gate`, the input's first, from unit u on.
  FASTRNN_INLINE Vec<T> gained(Vec<T> normalized, int gate, int64_t u) const {
    return fma(normalized, load(w.w_own + (Cell::kUnitWeights + gate) * plan.Hp + u),
               load(w.shifts + gate * plan.Hp + u));
  }

  // Normalizes the input's products of `count` steps from step s on; a team shares the rows.
  void normalize_inputs(int64_t s, int64_t count) {
    int64_t from, to;
    share.part(count * rows.n, 1, &from, &to);
    for (int64_t row = from; row < to; ++row) {
      const int64_t t = time_of_step(p, rows.d, s + row / rows.n), r = row % rows.n;
      T* const gates = own.gates + row * plan.Gp;
      S* const raw = p.saved && active(t, r) ? saved_row(t, r) + kCellSaved<Cell> * p.H : nullptr;
      Norm<T> norms[Cell::kGates];
      norms_of(Cell::kGates, Cell::kInputGroup, p.H, gates, p.H, norms);
      if (raw) convert(raw, gates, Cell::kGates * p.H);
      for (int g = 0; g < Cell::kGates; ++g)
        for (int64_t u = 0; u < p.H; u += L) {
          T* const at = gates + g * p.H + u;
          store(at, gained(norms[g](load(at, p.H - u)), g, u), p.H - u);
        }
    }
    share.wait();
  }

  // use() of the normalized products of h; what backward reads of them goes to `saved` as they were.
  template <class Use>
  FASTRNN_INLINE void normalize_products(const Now& now, Use use) const {
    for (int64_t r = 0; r < rows.n; ++r) {
      const T* const row = own.products + r * kFirst * plan.Hp;
      S* const raw = p.saved && active(now.t, r) ? saved_row(now.t, r) + (Cell::kSaved - kFirst) * p.H : nullptr;
      Norm<T> norms[kFirst];
      norms_of(kFirst, Cell::kRecurrentGroup, p.H, row, plan.Hp, norms);
      for (int64_t u = begin; u < end; u += L) {
        Vec<T> h[kFirst];
        for (int g = 0; g < kFirst; ++g) {
          const Vec<T> product = load(row + g * plan.Hp + u);
          if (raw) store(raw + g * p.H + u, product, p.H - u);
          h[g] = gained(norms[g](product), Cell::kGates + g, u);
        }
        use(h, {r, u / L});
      }
    }
  }

  // The second phase of a cell that normalizes its operand.
  void finish_normalized(const Now& now) const {
    for (int64_t r = 0; r < rows.n; ++r) {
      const Norm<T> norm = norm_of<T>({1, kAlone, 0, p.H}, own.to_normalize + r * plan.Hp, 0);
      for (int64_t u = begin / L; u * L < end; ++u) now.finish(nullptr, {r, u}, norm);
    }
  }

  Now arrays_at(int64_t t, const T* gates) const {
    const int64_t row = (rows.d * p.T + t) * p.B + rows.b0;
    Now now = {};
    now.gates = gates, now.h = own.h, now.c = own.c, now.hidden = p.projected ? own.hidden : own.h_next;
    now.operand = own.operand, now.to_normalize = own.to_normalize, now.first_saved = own.first;
    now.t = t, now.H = p.H, now.Gp = plan.Gp, now.Pp = plan.Pp, now.Hp = plan.Hp, now.projected = p.projected;
    if (p.saved) now.saved = as<S>(p.saved) + row * now.saved_vectors() * p.H;
    if (p.saved_c) now.saved_c = as<T>(p.saved_c) + row * K * p.H;
    if (p.lengths) now.lengths = p.lengths + rows.b0;
    if constexpr (kIsGiven<Cell>) {
      static_cast<Given<Cell, S>&>(now) = given_at<Cell, S>(p, rows.d, t, rows.b0);
      now.widened = w.w_own, now.pitch = plan.Hp;
    }
    return now;
  }

  // For every row r and vector u of this thread's units: before(r, u), then use(bias + A W for the C gates from kGate
  // on, place). Every other step goes through the panels backwards: it
  // begins with those that are still in the cache.
  template <int kGate, int C, class Before, class Use>
  FASTRNN_INLINE void product(const E* a, int64_t lda, int64_t K, const W* packed, const T* bias, Before before,
                              Use use) {
    if (plan.unpacked()) return product_unpacked<kGate, C>(a, lda, K, use);
    constexpr int kWidth = gate_panel(C), kPanels = C / kWidth;
    using Shape = Tiling<kWidth>;
    constexpr int64_t kMaxUnits = larger(1, Shape::panels(1) / kPanels);
    T sums[larger(kSumRows * larger(1, Shape::kTallPanels / kPanels), 2 * kMaxUnits) * C * L];
    const auto left = this->operand(a, lda, rows.n, K);
    const int64_t first = begin / L, vectors = (end + L - 1) / L - first;
    const int64_t together = larger(1, Shape::panels(rows.n) / kPanels), groups = (vectors + together - 1) / together;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t group = backwards ? groups - 1 - i : i, u = first + group * together;
      const int64_t units = smaller(together, vectors - group * together);
      for (int64_t r = 0, count; r < rows.n; r += count) {
        count = next_rows(rows.n - r, kSumRows);
        multiply_units<C>(left.at(r, 0), count, units, K, packed + u * C * L * panel_depth<W>(K), bias + u * C * L,
                          sums, [&](int64_t row) {
                            for (int64_t v = 0; v < units; ++v) before(r + row, u + v);
                          });
        use_sums<C>(sums, r, count, u, units, use);
      }
    }
  }

  // use() for `count` rows from r on of `units` vectors from u on; sums [count, units, C, L].
  template <int C, class Use>
  FASTRNN_INLINE static void use_sums(const T* sums, int64_t r, int64_t count, int64_t u, int64_t units, Use use) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < units; ++v, sums += C * L) use_one<C>(sums, L, L, {r + i, u + v}, use);
  }

  // sums [count, units, C, L] = bias + A W for `units` vectors of units. A block of a panel is read by all rows while
  // it is in L1. before(row) comes before the last tile of a row.
  template <int C, class A, class Before>
  FASTRNN_INLINE static void multiply_units(A left, int64_t count, int64_t units, int64_t K, const W* packed,
                                            const T* bias, T* sums, Before before) {
    constexpr int kWidth = gate_panel(C);
    using Shape = Tiling<kWidth>;
    const int64_t panels = units * C / kWidth, at_once = smaller(panels, Shape::panels(count));
    const int64_t panel = panel_depth<W>(K) * kWidth * L, stride = units * C * L;
    const int64_t most = max_rows<E, kWidth>();
    const bool is_whole = kIsInt8<W> || count <= most;
    for (int64_t j = 0; j < panels; j += at_once) {
      T* const out = sums + j * kWidth * L;
      for (int64_t k = 0, depth; k == 0 || k < K; k += depth) {
        depth = is_whole ? K : smaller(block_of(K), K - k);
        for (int64_t r = 0, n; r < count; r += n) {
          n = next_rows(count - r, most);
          if (j + at_once == panels && k + depth == K)
            for (int64_t row = r; row < r + n; ++row) before(row);
          const T* const start = k ? out + r * stride : bias + j * kWidth * L;
          const auto tile = tile_for<T, E, W>(kWidth, int(n), int(at_once));
          tile(left.at(r, k), packed + j * panel + k * kWidth * L, panel, depth, start, k ? stride : 0,
               out + r * stride, stride);
        }
      }
    }
  }

  // The sums lie `stride` apart and have `count` elements.
  template <int C, class Use>
  FASTRNN_INLINE static void use_one(const T* sums, int64_t stride, int64_t count, Place at, Use use) {
    Vec<T> found[C];
    for (int g = 0; g < C; ++g) found[g] = load(sums + g * stride, count);
    use(found, at);
  }

  template <int kGate, int C, class Use>
  FASTRNN_INLINE void product_unpacked(const E* a, int64_t lda, int64_t K, Use use) {
    this->multiply_gates(kGate, C, rows.n, a, lda, K, given.w_hh, given.b_hh, own.sums, plan.Rp);
    for (int64_t r = 0; r < rows.n; ++r)
      for (int64_t u = begin / L; u * L < end; ++u)
        use_one<C>(own.sums + r * plan.Rp + u * L, p.H, p.H - u * L, {r, u}, use);
  }

  bool backwards = false;  // which way the next step goes through the panels
};

template <class Cell, class S, class E, class W>
void walk(const ForwardPlan<S, E, W>& plan, RowRange rows, typename ForwardPlan<S, E, W>::Scratch scratch,
          Share share) {
  ForwardRows<Cell, S, E, W>(plan, rows, scratch, share).run();
}

template <class Cell, class S, class E, class W>
void run(const Layer& layer, void* workspace) {
  run_forward<S, E, W>(kSizes<Cell>, walk<Cell, S, E, W>, layer, workspace);
}

template <class Cell, class S, class E, class W>
size_t measure(const Layer& layer) {
  return measure_forward<S, E, W>(kSizes<Cell>, layer);
}

template <class Cell, class S, class E, class W>
size_t pack(const Layer& layer, void* to) {
  return pack_forward<S, E, W>(kSizes<Cell>, layer, to);
}

template <class Cell, class S, class E = Element<S>, class W = E>
constexpr ForwardKernels forward_in = {run<Cell, S, E, W>, measure<Cell, S, E, W>, pack<Cell, S, E, W>};

template <class Cell, int variant>
constexpr ForwardKernels forward_kernels_of() {
  if constexpr (variant == kFloat32) return forward_in<Cell, float>;
  if constexpr (variant == kFloat64) return forward_in<Cell, double>;
  if constexpr (variant == kBFloat16) return forward_in<Cell, BFloat16, Element<BFloat16>, BFloat16>;
  if constexpr (variant == kFloat16) return forward_in<Cell, Float16>;
  if constexpr (variant == kBFloat16Weights) return forward_in<Cell, float, float, BFloat16>;
  if constexpr (variant == kBFloat16Products) return forward_in<Cell, float, RoundedElement>;
  if constexpr (variant == kInt8Products) return forward_in<Cell, float, float, Int8Lane>;
}

}  // namespace

FASTRNN_DEFINE_LOOKUP(forward_kernels, ForwardKernels)

}  // namespace fastrnn::cpu::FASTRNN_ISA
