// Forward pass of one layer. For a range of rows: project a chunk of steps (one GEMM), then walk through it; per step
// the recurrent product of L units of all gates goes straight into the cell, whose results are the next state.
#include "../cells/lookup.h"
#include "forward_plan.h"
#include "kernels.h"
#include "pointwise.h"
#include "unpacked.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

constexpr int64_t kSumRows = 48;  // of recurrent products that are finished before the cell has them: they stay in L1

// One direction of a range of rows, from the first step to the last.
template <class Cell, class S, class E, class W>
class ForwardRows {
 public:
  using Plan = ForwardPlan<Cell, S, E, W>;
  using T = Accumulator<S>;
  using Now = Pointwise<Cell, S, E>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kFirst = Cell::kFirstGates, K = Cell::kCarried;

  ForwardRows(const Plan& plan, RowRange rows, typename Plan::Scratch scratch, Share share)
      : p(plan.p),
        plan(plan),
        rows(rows),
        w(plan.packed[rows.d]),
        given(p.weights[rows.d]),
        share(share),
        own(scratch) {
    share.part(p.H, kPlain * L, &begin, &end);
  }

  void run() {
    if (share.worker == 0) load_states();
    for (int64_t s = 0; s < p.T; s += plan.steps) {
      const int64_t count = smaller(plan.steps, p.T - s);
      project_inputs(s, count);
      share.wait();
      if constexpr (kNormalizesProducts<Cell>) normalize_inputs(s, count);
      for (int64_t i = 0; i < count; ++i) step(time_of_step(p, rows.d, s + i), own.gates + i * rows.n * plan.Gp);
    }
    if (share.worker == 0) store_states();
  }

 private:
  int64_t state_row(int64_t r) const { return rows.d * p.B + rows.b0 + r; }
  bool active(int64_t t, int64_t r) const { return row_is_active(p, t, rows.b0 + r); }

  void load_states() {
    zero(own.h, rows.n * plan.Pp);
    zero(own.c, rows.n * K * plan.Hp);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (p.h0) convert(own.h + r * plan.Pp, as<S>(p.h0) + state_row(r) * p.P, p.P);
      if (kInPairs<E>) convert(own.h_read + r * plan.Pp, own.h + r * plan.Pp, p.P);
      for (int k = 0; p.c0 && k < K; ++k)
        convert(own.c + (r * K + k) * plan.Hp, as<S>(p.c0) + (state_row(r) * K + k) * p.H, p.H);
    }
  }

  void store_states() {
    for (int64_t r = 0; r < rows.n; ++r) {
      convert(as<S>(p.h_n) + state_row(r) * p.P, own.h + r * plan.Pp, p.P);
      for (int k = 0; p.c_n && k < K; ++k)
        convert(as<S>(p.c_n) + (state_row(r) * K + k) * p.H, own.c + (r * K + k) * plan.Hp, p.H);
    }
  }

  // gates = x W_ih^T + b_ih for `count` steps from step s on, in the order of the steps. A team shares the steps, or if
  // there are fewer than threads the columns.
  void project_inputs(int64_t s, int64_t count) {
    if (plan.unpacked()) return project_unpacked(s, count);
    int64_t from = 0, to = count, left = 0, right = Cell::kGates * p.H;
    if (count >= share.count) {
      share.part(count, 1, &from, &to);
      gather_inputs(s, from, to);
    } else {
      if (share.worker == 0) gather_inputs(s, from, to);
      share.wait();
      share.part(right, kPlain * L, &left, &right);
    }
    const int64_t row = from * rows.n;
    multiply((to - from) * rows.n, right - left, p.I, own.x + row * plan.Ip, plan.Ip,
             w.w_ih + left * panel_depth<W>(p.I), w.b_ih + left, own.gates + row * plan.Gp + left, plan.Gp);
  }

  // out [M, N] = bias + a W, for a W [K, N] in plain panels.
  template <class A>
  void multiply(int64_t M, int64_t N, int64_t K, const A* a, int64_t lda, const W* packed, const T* bias, T* out,
                int64_t ldo) {
    const int64_t block = kIsInt8<W> ? kBlockM : larger(1, M);
    for (int64_t m = 0; m < M; m += block) {
      const int64_t count = smaller(block, M - m);
      gemm(count, N, K, operand(a + m * lda, lda, count, K), packed, Init<T>{bias, 0}, out + m * ldo, ldo);
    }
  }

  // What a product reads of `count` rows of a.
  template <class A>
  auto operand(const A* a, int64_t lda, int64_t count, int64_t K) const {
    if constexpr (kIsInt8<W>) {
      const int64_t rows_before = share.worker * larger(rows.n, kBlockM);
      int8_t* const quantized = own.quantized + rows_before * plan.Qp;
      quantize_rows(a, lda, count, K, quantized, plan.Qp, own.quanta + rows_before);
      return Operand<int8_t>{{quantized, plan.Qp, own.quanta + rows_before}};
    } else {
      return rows_of(a, lda);
    }
  }

  void gather_inputs(int64_t s, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const S* x = as<S>(p.x) + (time_of_step(p, rows.d, s + i) * p.B + rows.b0) * p.I;
      for (int64_t r = 0; r < rows.n; ++r) convert(own.x + (i * rows.n + r) * plan.Ip, x + r * p.I, p.I);
    }
  }

  // There may be a single step: a team shares the units.
  void project_unpacked(int64_t s, int64_t count) {
    if (share.worker == 0) gather_inputs(s, 0, count);
    share.wait();
    multiply_gates<0, Cell::kGates>(count * rows.n, own.x, plan.Ip, p.I, as<S>(given.w_ih), as<S>(given.b_ih),
                                    own.gates, plan.Gp);
  }

  void step(int64_t t, const T* gates) {
    restart_rows(t);
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
    if (p.projected) project_outputs();
    emit(t, now);
    share.wait();
  }

  // h_next = hidden W_hr^T, this thread's part of it.
  void project_outputs() {
    share.wait();
    int64_t from, to;
    share.part(p.P, kPlain * L, &from, &to);
    multiply(rows.n, to - from, p.H, own.hidden, plan.Hp, w.w_hr + from * panel_depth<W>(p.H), nullptr,
             own.h_next + from, plan.Pp);
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

  S* saved_row(int64_t t, int64_t r) const {
    return as<S>(p.saved) + ((rows.d * p.T + t) * p.B + rows.b0 + r) * (Cell::kSaved + p.projected) * p.H;
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

  void restart_rows(int64_t t) {
    if (!p.resets) return;
    for (int64_t r = 0; share.worker == 0 && r < rows.n; ++r) {
      if (!active(t, r) || !row_restarts(p, rows.d, t, rows.b0 + r)) continue;
      zero(own.h + r * plan.Pp, plan.Pp);
      zero(own.h_read + r * plan.Pp, plan.Pp);
      zero(own.c + r * K * plan.Hp, K * plan.Hp);
    }
    share.wait();
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
    const auto left = operand(a, lda, rows.n, K);
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

  // out [n, C*H] = bias + A W^T for this thread's units of the C gates from kGate on, W [G*H, K] unpacked.
  template <int kGate, int C>
  void multiply_gates(int64_t n, const E* a, int64_t lda, int64_t K, const S* weight, const S* bias, T* out,
                      int64_t ldo) {
    for (int g = 0; g < C; ++g) {
      const int64_t row = (kGate + g) * p.H + begin;
      multiply_unpacked(n, end - begin, K, a, lda, weight + row * K, bias ? bias + row : nullptr, out + g * p.H + begin,
                        ldo);
    }
  }

  template <int kGate, int C, class Use>
  FASTRNN_INLINE void product_unpacked(const E* a, int64_t lda, int64_t K, Use use) {
    multiply_gates<kGate, C>(rows.n, a, lda, K, as<S>(given.w_hh), as<S>(given.b_hh), own.sums, plan.Rp);
    for (int64_t r = 0; r < rows.n; ++r)
      for (int64_t u = begin / L; u * L < end; ++u)
        use_one<C>(own.sums + r * plan.Rp + u * L, p.H, p.H - u * L, {r, u}, use);
  }

  // Writes this thread's part of y_t and makes h_next the state.
  void emit(int64_t t, const Now& now) {
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
        if (share.worker == 0) now.save_nothing(r);
      }
      if (kInPairs<E>) convert(own.h_read_next + r * plan.Pp + from, h_next + from, to - from);
    }
    swap(own.h, own.h_next);
    swap(own.h_read, own.h_read_next);
  }

  template <class N>
  static void swap(N*& a, N*& b) {
    N* const old = a;
    a = b, b = old;
  }

  template <class N>
  static void zero(N* to, int64_t count) {
    memset(to, 0, size_t(count) * sizeof(N));
  }

  const Layer& p;
  const Plan& plan;
  const RowRange rows;
  const typename Plan::Packed& w;
  const Weights& given;
  const Share share;
  int64_t begin, end;          // this thread's units
  bool backwards = false;      // which way the next step goes through the panels
  typename Plan::Scratch own;  // of this thread, or of the team
};

template <class Cell, class S, class E = Element<S>, class W = E>
struct Forward {
  using Plan = ForwardPlan<Cell, S, E, W>;

  static void run(const Layer& layer, void* workspace) {
    const Plan plan(layer, workspace);
    if (!plan.unpacked() && !layer.packed) pack_all(plan);
    walk_rows(plan.tasks, [&](RowRange rows, int place, Share share) {
      const MatrixUnit<E> unit;
      ForwardRows<Cell, S, E, W>(plan, rows, plan.scratch(workspace, place), share).run();
    });
  }

  static size_t workspace(const Layer& layer) { return Plan(layer, nullptr).bytes(); }

  // Into `to`, or over null only the bytes that it takes.
  static size_t pack(const Layer& layer, void* to) {
    Plan plan(layer, nullptr);
    Workspace packed(to);
    plan.take_packed(packed);
    if (to) pack_all(plan);
    return packed.used();
  }

 private:
  static void pack_all(const Plan& plan) {
    pack_in_parts(plan.tasks, 2 * plan.p.D, [&](int task, Share share) {
      if (share.worker == 0) pack_vectors(plan, task);
      pack_matrices(plan, task, share);
    });
  }
};

template <class F>
constexpr ForwardKernels kernels_of = {F::run, F::workspace, F::pack};

template <class Cell, int variant>
constexpr ForwardKernels kernels_for() {
  if constexpr (variant == kFloat32) return kernels_of<Forward<Cell, float>>;
  if constexpr (variant == kFloat64) return kernels_of<Forward<Cell, double>>;
  if constexpr (variant == kBFloat16) return kernels_of<Forward<Cell, BFloat16, Element<BFloat16>, BFloat16>>;
  if constexpr (variant == kFloat16) return kernels_of<Forward<Cell, Float16>>;
  if constexpr (variant == kBFloat16Weights) return kernels_of<Forward<Cell, float, float, BFloat16>>;
  if constexpr (variant == kBFloat16Products) return kernels_of<Forward<Cell, float, RoundedElement>>;
  if constexpr (variant == kInt8Products) return kernels_of<Forward<Cell, float, float, Int8Lane>>;
}

}  // namespace

FASTRNN_DEFINE_LOOKUP(forward_kernels, ForwardKernels)

}  // namespace fastrnn::cpu::FASTRNN_ISA
