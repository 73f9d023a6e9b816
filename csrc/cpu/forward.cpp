// Forward pass of one layer. For a range of rows: project a chunk of steps (one GEMM), then walk through it; per step
// the recurrent product of L units of all gates goes straight into the cell, whose results are the next state.
#include "../cells/list.h"
#include "kernels.h"
#include "rows.h"
#include "workspace.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

constexpr int64_t kProjectionBytes = 384 << 10;  // of one chunk: it should stay in L2 until its steps have read it,
constexpr int64_t kProjectionRows = 128;         // but so many rows are worth reading all of w_ih for

// S is the storage type, W that of the packed weights.
template <class Cell, class S, class W>
struct ForwardPlan {
  using T = Accumulator<S>;
  using E = Element<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kFirstGates = Cell::kGates - Cell::kSecondGates;

  struct Packed {
    W *w_ih, *w_hh;             // plain panels of [I, G*H]; gate panels of the first product
    W* w_second;                // gate panels of the second product, if the cell has one
    W* w_hr;                    // plain panels of [H, P], if there is a projection
    T *b_ih, *b_hh, *b_second;  // [G*H]; in the order of the panels
  };

  struct Scratch {            // of one worker; rows are padded to whole vectors
    E* x;                     // [steps*n, Ip]
    T* gates;                 // [steps*n, Gp]
    T *h, *h_next, *c;        // [n, Pp], [n, Pp], [n, Hp]
    E *h_read, *h_read_next;  // [n, Pp] h as the products read it: the same memory, or a rounded copy
    T* hidden;                // [n, Hp] what the cell puts out: h_next, unless there is a projection
    T* sums;                  // [n, Gp] recurrent products of unpacked weights
    E* operand;               // [n, Hp] of a two-phase cell
    T* first;                 // [n, S, Hp] of a two-phase cell
  };

  ForwardPlan(const Layer& layer, void* base) : p(layer), tasks(layer, Cell::kGates), workspace(base) {
    Hp = pitch_of<T>(p.H), Pp = pitch_of<T>(p.P), Ip = pitch_of<T>(p.I), Gp = pitch_of<T>(Cell::kGates * p.H);
    const int64_t n = tasks.max_rows();
    const int64_t row_bytes = Cell::kGates * p.H * int64_t(sizeof(T));
    steps = larger(1, smaller(p.T, larger(kProjectionRows, kProjectionBytes / row_bytes) / larger(1, n)));
    if (p.packed) {
      Workspace given(const_cast<void*>(p.packed));
      take_packed(given);
    } else if (!unpacked()) {
      take_packed(workspace);
    }
    scratch_begin = workspace.used();
    take_scratch(workspace, n);
    scratch_bytes = workspace.used() - scratch_begin;
  }

  bool unpacked() const { return reads_weights_in_place(p); }

  size_t bytes() const { return scratch_begin + scratch_bytes * tasks.workers(); }

  Scratch scratch(void* base, int worker) const {
    Workspace own(static_cast<char*>(base) + scratch_begin + scratch_bytes * worker);
    return take_scratch(own, tasks.max_rows());
  }

  int64_t saved_vectors() const { return Cell::kSaved + p.projected; }

  void take_packed(Workspace& from) {
    for (int d = 0; d < p.D; ++d) packed[d] = take_direction(from);
  }

  const Layer& p;
  RowTasks tasks;
  Workspace workspace;
  int64_t Hp, Pp, Ip, Gp;  // pitches of rows in scratch: of units, outputs, inputs, gates
  int64_t steps;           // of a chunk
  Packed packed[2] = {};
  size_t scratch_begin, scratch_bytes;

 private:
  Packed take_direction(Workspace& from) const {
    Packed w = {};
    w.w_ih = from.take<W>(plain_size<W>(p.I, Cell::kGates * p.H, L));
    w.b_ih = from.take<T>(Cell::kGates * p.H);
    w.w_hh = from.take<W>(gates_size<W>(p.P, p.H, kFirstGates, L));
    w.b_hh = from.take<T>(kFirstGates * round_up(p.H, L));
    if (Cell::kSecondGates) {
      w.w_second = from.take<W>(gates_size<W>(p.H, p.H, Cell::kSecondGates, L));
      w.b_second = from.take<T>(Cell::kSecondGates * round_up(p.H, L));
    }
    if (p.projected) w.w_hr = from.take<W>(plain_size<W>(p.H, p.P, L));
    return w;
  }

  Scratch take_scratch(Workspace& from, int64_t n) const {
    Scratch s = {};
    s.x = from.take<E>(steps * n * Ip);
    s.gates = from.take<T>(steps * n * Gp + L);  // + L: whole vectors are read at the end of a row
    s.h = from.take<T>(n * Pp), s.h_next = from.take<T>(n * Pp), s.c = from.take<T>(n * Hp);
    if constexpr (kInPairs<E>) {
      s.h_read = from.take<E>(n * Pp), s.h_read_next = from.take<E>(n * Pp);
    } else {
      s.h_read = s.h, s.h_read_next = s.h_next;
    }
    if (unpacked()) s.sums = from.take<T>(n * Gp + L);
    if (p.projected) s.hidden = from.take<T>(n * Hp);
    if (Cell::kSecondGates) {
      s.operand = from.take<E>(n * Hp);
      s.first = from.take<T>(n * Cell::kSaved * Hp);
    }
    return s;
  }
};

template <class Cell, class S>
void pack_bias(Accumulator<S>* packed, const S* bias, int64_t H, int64_t gates) {
  constexpr int64_t L = kLanes<Accumulator<S>>;
  for (int64_t u = 0; u < H; u += L)
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t lane = 0; lane < L; ++lane)
        *packed++ = bias && u + lane < H ? widen(bias[g * H + u + lane]) : Accumulator<S>(0);
}

// Task 2d packs what reads x, task 2d+1 what reads the state.
template <class Cell, class S, class W>
void pack_weights(const ForwardPlan<Cell, S, W>& plan, int task) {
  using T = Accumulator<S>;
  constexpr int64_t kFirst = ForwardPlan<Cell, S, W>::kFirstGates;
  const Layer& p = plan.p;
  const Weights& w = p.weights[task / 2];
  const auto& to = plan.packed[task / 2];
  const int64_t gates = Cell::kGates * p.H;
  if (task % 2 == 0) {
    pack<T>(to.w_ih, Matrix<S>{as<S>(w.w_ih), p.I}, p.I, gates);
    for (int64_t j = 0; j < gates; ++j) to.b_ih[j] = w.b_ih ? widen(as<S>(w.b_ih)[j]) : T(0);
    return;
  }
  pack_gates<T>(to.w_hh, Matrix<S>{as<S>(w.w_hh), p.P}, p.P, p.H, kFirst);
  pack_bias<Cell, S>(to.b_hh, as<S>(w.b_hh), p.H, kFirst);
  if constexpr (Cell::kSecondGates > 0) {
    const S* bias = as<S>(w.b_hh);
    pack_gates<T>(to.w_second, Matrix<S>{as<S>(w.w_hh) + kFirst * p.H * p.P, p.P}, p.H, p.H, Cell::kSecondGates);
    pack_bias<Cell, S>(to.b_second, bias ? bias + kFirst * p.H : nullptr, p.H, Cell::kSecondGates);
  }
  if (w.w_hr) pack<T>(to.w_hr, Matrix<S>{as<S>(w.w_hr), p.H}, p.H, p.P);
}

// One direction of a range of rows, from the first step to the last.
template <class Cell, class S, class W>
class ForwardRows {
 public:
  using Plan = ForwardPlan<Cell, S, W>;
  using T = Accumulator<S>;
  using E = Element<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kFirst = Plan::kFirstGates;

  struct Place {
    int64_t r, u;  // row, vector of units
  };

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
      for (int64_t i = 0; i < count; ++i) step(time_of_step(p, rows.d, s + i), own.gates + i * rows.n * plan.Gp);
    }
    if (share.worker == 0) store_states();
  }

 private:
  int64_t state_row(int64_t r) const { return rows.d * p.B + rows.b0 + r; }
  bool active(int64_t t, int64_t r) const { return row_is_active(p, t, rows.b0 + r); }

  void load_states() {
    zero(own.h, rows.n * plan.Pp);
    zero(own.c, rows.n * plan.Hp);
    for (int64_t r = 0; r < rows.n; ++r) {
      if (p.h0) convert(own.h + r * plan.Pp, as<S>(p.h0) + state_row(r) * p.P, p.P);
      if (kInPairs<E>) convert(own.h_read + r * plan.Pp, own.h + r * plan.Pp, p.P);
      if (p.c0) convert(own.c + r * plan.Hp, as<S>(p.c0) + state_row(r) * p.H, p.H);
    }
  }

  void store_states() {
    for (int64_t r = 0; r < rows.n; ++r) {
      convert(as<S>(p.h_n) + state_row(r) * p.P, own.h + r * plan.Pp, p.P);
      if (p.c_n) convert(as<S>(p.c_n) + state_row(r) * p.H, own.c + r * plan.Hp, p.H);
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
    gemm((to - from) * rows.n, right - left, p.I, Operand<E>{own.x + row * plan.Ip, plan.Ip, 1},
         w.w_ih + left * round_up(p.I, kGroup<W>), Init<T>{w.b_ih + left, 0}, own.gates + row * plan.Gp + left,
         plan.Gp);
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
                                    own.gates);
  }

  void step(int64_t t, const T* gates) {
    restart_rows(t);
    T* hidden = p.projected ? own.hidden : own.h_next;
    const auto expect_save = [&](int64_t r, int64_t u) { prefetch_saved(t, r, u); };
    if constexpr (Cell::kSecondGates > 0) {
      product<0, kFirst>(
          own.h_read, plan.Pp, p.P, w.w_hh, w.b_hh, [](int64_t, int64_t) {},
          [&](const auto& at, const auto* h) { first(at, gates, h); });
      share.wait();
      product<kFirst, Cell::kSecondGates>(own.operand, plan.Hp, p.H, w.w_second, w.b_second, expect_save,
                                          [&](const auto& at, const auto* h) { second(t, at, gates, h, hidden); });
    } else {
      product<0, kFirst>(own.h_read, plan.Pp, p.P, w.w_hh, w.b_hh, expect_save,
                         [&](const auto& at, const auto* h) { finish(t, at, gates, h, hidden); });
    }
    backwards = !backwards;
    if (hidden == own.hidden)
      gemm(rows.n, p.P, p.H, Operand<T>{hidden, plan.Hp, 1}, w.w_hr, Init<T>{nullptr, 0}, own.h_next, plan.Pp);
    emit(t);
    share.wait();
  }

  void restart_rows(int64_t t) {
    if (!p.resets) return;
    for (int64_t r = 0; share.worker == 0 && r < rows.n; ++r) {
      if (!active(t, r) || !row_restarts(p, rows.d, t, rows.b0 + r)) continue;
      zero(own.h + r * plan.Pp, plan.Pp);
      zero(own.h_read + r * plan.Pp, plan.Pp);
      zero(own.c + r * plan.Hp, plan.Hp);
    }
    share.wait();
  }

  // For every row r and vector u of this thread's units: before(r, u), then, for one or two such places together,
  // use(places, bias + A W for the C gates from kGate on). Every other step goes through the panels backwards: it
  // begins with those that are still in the cache.
  template <int kGate, int C, class Before, class Use>
  FASTRNN_INLINE void product(const E* a, int64_t lda, int64_t K, const W* packed, const T* bias, Before before,
                              Use use) {
    if (plan.unpacked()) return product_unpacked<kGate, C>(a, lda, K, use);
    using Shape = Tiling<C>;
    T sums[(FASTRNN_REGISTERS + C) * L];
    const int64_t depth = round_up(K, kGroup<W>);
    const int64_t first = begin / L, vectors = (end + L - 1) / L - first, together = Shape::panels(rows.n);
    const int64_t groups = (vectors + together - 1) / together;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t group = backwards ? groups - 1 - i : i, u = first + group * together;
      const int panels = int(smaller(together, vectors - group * together));
      for (int64_t r = 0; r < rows.n; r += Shape::kMaxRows) {
        const int count = int(smaller(Shape::kMaxRows, rows.n - r));
        for (int64_t j = 0; j < count * panels; ++j) before(r + j / panels, u + j % panels);
        choose_tile<T, E, W, C>(count, panels)(Operand<E>{a + r * lda, lda, 1}, packed + u * depth * C * L,
                                               depth * C * L, K, bias + u * C * L, 0, sums, panels * C * L);
        for (int j = 0; j < count * panels; j += 2) {
          if (j + 1 < count * panels) {
            use_sums<2, C>(sums, j, panels, r, u, use);
          } else {
            use_sums<1, C>(sums, j, panels, r, u, use);
          }
        }
      }
    }
  }

  // use() for N vectors of sums from the j-th on, `panels` to a row, of a tile that begins at (r, u).
  template <int N, int C, class Use>
  FASTRNN_INLINE static void use_sums(const T* sums, int j, int panels, int64_t r, int64_t u, Use use) {
    Place at[N];
    Group<T, N> h[C];
    for (int i = 0; i < N; ++i) {
      at[i] = {r + (j + i) / panels, u + (j + i) % panels};
      for (int g = 0; g < C; ++g) h[g].v[i] = load(sums + ((j + i) * C + g) * L);
    }
    use(at, h);
  }

  // out [n, C*H] = bias + A W^T for this thread's units of the C gates from kGate on, W [G*H, K] unpacked.
  template <int kGate, int C>
  void multiply_gates(int64_t n, const E* a, int64_t lda, int64_t K, const S* weight, const S* bias, T* out) {
    for (int g = 0; g < C; ++g) {
      const int64_t row = (kGate + g) * p.H + begin;
      multiply_unpacked(n, end - begin, K, a, lda, weight + row * K, bias ? bias + row : nullptr, out + g * p.H + begin,
                        plan.Gp);
    }
  }

  template <int kGate, int C, class Use>
  FASTRNN_INLINE void product_unpacked(const E* a, int64_t lda, int64_t K, Use use) {
    multiply_gates<kGate, C>(rows.n, a, lda, K, as<S>(given.w_hh), as<S>(given.b_hh), own.sums);
    for (int64_t r = 0; r < rows.n; ++r) {
      for (int64_t u = begin / L; u * L < end; ++u) {
        const Place at[1] = {{r, u}};
        Group<T, 1> h[C];
        for (int g = 0; g < C; ++g) h[g].v[0] = load(own.sums + r * plan.Gp + g * p.H + u * L, p.H - u * L);
        use(at, h);
      }
    }
  }

  template <int N>
  FASTRNN_INLINE void load_gates(const T* gates, const Place (&at)[N], Group<T, N>* x) const {
    for (int g = 0; g < Cell::kGates; ++g)
      for (int i = 0; i < N; ++i) x[g].v[i] = load(gates + at[i].r * plan.Gp + g * p.H + at[i].u * L);
  }

  // The vectors at the given places of a scratch matrix.
  template <int N>
  FASTRNN_INLINE static Group<T, N> gather(const T* matrix, int64_t pitch, const Place (&at)[N]) {
    return Group<T, N>::each([&](int i) { return load(matrix + at[i].r * pitch + at[i].u * L); });
  }

  template <int N>
  FASTRNN_INLINE void first(const Place (&at)[N], const T* gates, const Group<T, N>* h) {
    Group<T, N> x[Cell::kGates], saved[Cell::kSaved];
    for (auto& v : saved) v = Group<T, N>(0);
    load_gates(gates, at, x);
    const Group<T, N> operand = Cell::first(x, h, gather(own.h, plan.Pp, at), saved);
    for (int i = 0; i < N; ++i) {
      store(own.operand + at[i].r * plan.Hp + at[i].u * L, operand.v[i]);
      for (int j = 0; j < Cell::kSaved; ++j)
        store(own.first + (at[i].r * Cell::kSaved + j) * plan.Hp + at[i].u * L, saved[j].v[i]);
    }
  }

  template <int N>
  FASTRNN_INLINE void second(int64_t t, const Place (&at)[N], const T* gates, const Group<T, N>* h, T* hidden) {
    Group<T, N> all[Cell::kGates];
    for (int g = 0; g < Cell::kSecondGates; ++g) all[kFirst + g] = h[g];
    finish(t, at, gates, all, hidden);
  }

  template <int N>
  FASTRNN_INLINE void finish(int64_t t, const Place (&at)[N], const T* gates, const Group<T, N>* h, T* hidden) {
    using G = Group<T, N>;
    G x[Cell::kGates], saved[Cell::kSaved];
    load_gates(gates, at, x);
    if constexpr (Cell::kSecondGates > 0)
      for (int j = 0; j < Cell::kSaved; ++j)
        saved[j] =
            G::each([&](int i) { return load(own.first + (at[i].r * Cell::kSaved + j) * plan.Hp + at[i].u * L); });
    // With a projection h_{t-1} has other dimensions than the units; no such cell reads it here.
    const G h_prev = hidden == own.hidden ? G(0) : gather(own.h, plan.Pp, at);
    G c = gather(own.c, plan.Hp, at);
    const G out = Cell::forward(x, h, h_prev, c, saved);
    for (int i = 0; i < N; ++i) {
      const auto [r, u] = at[i];
      if (!active(t, r)) continue;  // the row keeps its state: emit copies h
      store(hidden + r * plan.Hp + u * L, out.v[i]);
      if (Cell::kHasCell) store(own.c + r * plan.Hp + u * L, c.v[i]);
      if (p.saved) {
        S* const to = saved_row(t, r) + u * L;
        for (int j = 0; j < Cell::kSaved; ++j) store(to + j * p.H, saved[j].v[i], p.H - u * L);
        if (p.projected) store(to + Cell::kSaved * p.H, out.v[i], p.H - u * L);
      }
      if (Cell::kHasCell && p.saved_c) store(saved_c_row(t, r) + u * L, c.v[i], p.H - u * L);
    }
  }

  int64_t time_row(int64_t t, int64_t r) const { return (rows.d * p.T + t) * p.B + rows.b0 + r; }
  S* saved_row(int64_t t, int64_t r) const { return as<S>(p.saved) + time_row(t, r) * plan.saved_vectors() * p.H; }
  T* saved_c_row(int64_t t, int64_t r) const { return as<T>(p.saved_c) + time_row(t, r) * p.H; }

  // The lines that save will write lie far apart: each would be a miss of its own.
  FASTRNN_INLINE void prefetch_saved(int64_t t, int64_t r, int64_t u) const {
    for (int64_t j = 0; p.saved && j < plan.saved_vectors(); ++j)
      __builtin_prefetch(saved_row(t, r) + j * p.H + u * L, 1);
    if (Cell::kHasCell && p.saved_c) __builtin_prefetch(saved_c_row(t, r) + u * L, 1);
  }

  // Backward never reads a finished row, but the same call should leave the same bits.
  void save_nothing(int64_t t, int64_t r) const {
    if (p.saved) memset(saved_row(t, r), 0, size_t(plan.saved_vectors() * p.H) * sizeof(S));
    if (Cell::kHasCell && p.saved_c) zero(saved_c_row(t, r), p.H);
  }

  // Writes this thread's part of y_t and makes h_next the state.
  void emit(int64_t t) {
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

template <class Cell, class S, class W>
struct Forward {
  using Plan = ForwardPlan<Cell, S, W>;

  static void run(const Layer& layer, void* workspace) {
    const Plan plan(layer, workspace);
    if (!plan.unpacked() && !layer.packed) pack_all(plan);
    walk_rows(plan.tasks, [&](RowRange rows, int worker, Share share) {
      ForwardRows<Cell, S, W>(plan, rows, plan.scratch(workspace, worker), share).run();
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
    parallel_for(plan.tasks.threads(), 2 * plan.p.D, [&](int task, int) { pack_weights(plan, task); });
  }
};

struct Functions {
  void (*run)(const Layer&, void*);
  size_t (*workspace)(const Layer&);
  size_t (*pack)(const Layer&, void*);
};

template <class F>
constexpr Functions functions_of = {F::run, F::workspace, F::pack};

// By cell, then by dtype; the last ones are of float32 with weights rounded to bfloat16.
#define FASTRNN_FORWARD(name, Cell)                                                              \
  {functions_of<Forward<Cell, float, float>>, functions_of<Forward<Cell, double, double>>,       \
   functions_of<Forward<Cell, BFloat16, BFloat16>>, functions_of<Forward<Cell, Float16, float>>, \
   functions_of<Forward<Cell, float, BFloat16>>},

const Functions& functions(const Layer& layer) {
  static constexpr Functions kByCell[][5] = {FASTRNN_CELLS(FASTRNN_FORWARD)};
  return kByCell[layer.cell][layer.narrow_weights ? 4 : int(layer.dtype)];
}

}  // namespace

size_t packed_size(const Layer& layer) { return functions(layer).pack(layer, nullptr); }
void pack(const Layer& layer, void* packed) { functions(layer).pack(layer, packed); }
size_t forward_workspace(const Layer& layer) { return functions(layer).workspace(layer); }
void forward(const Layer& layer, void* workspace) { functions(layer).run(layer, workspace); }

}  // namespace fastrnn::cpu::FASTRNN_ISA
