// What a forward pass multiplies and does with the sums. A cell with one product per step needs kWhole alone; one with
// a second product runs kFirst and kSecond, one launch each, and a layer with a projection kWhole and kProject. Without
// recurrent products kWhole multiplies nothing.
#pragma once

#include "given.h"
#include "number.h"
#include "rows.h"
#include "tile.h"

namespace fastrnn::cuda {

// As in layer.h, and V saved vectors; Pp and Hp: rounded up to a multiple of 8.
template <class S>
struct ForwardArgs {
  using A = Accumulator<S>;
  Rows rows;
  int D, H, P, Hp, Pp;
  bool projected;
  const void* weights;  // packed, by direction and block of units; or what pointwise.h reads
  const S* projection;  // [D, T, B, .] W_ih x, G*H numbers of a row; its strides:
  int64_t projection_direction;
  uint32_t projection_row;
  const A* biases;  // [D, (G+R)*H] b_ih, b_hh
  const S* own[2];  // [U, H] unit weights, by direction
  const S* masks;   // [D, T, B, M, H], or with mask_time = 0 [D, B, M, H]; its strides but for those of M and H:
  int64_t mask_direction, mask_time;
  const S* h_init;  // [D, B, Pp] h0 or zeros, without sentinels; 16-byte aligned
  S* hidden;        // [D, T, B, .] h as blocks exchange it; its strides (it may be y). 16-byte aligned rows
  int64_t hidden_direction;
  uint32_t hidden_row;
  S* y;  // [T, B, D*P], if hidden is another array
  bool separate_y;
  S* saved;  // [D, T, B, V*H], or a single step of it; or null
  int64_t saved_direction;
  uint32_t saved_row;
  bool keeps_saved;  // for backward: of all steps, and then 0 where a row is not active
  A* saved_c;        // [D, T, B, K, H] or null
  S* operand;        // [D, B, Hp] what the second product of a step reads
  S* h_n;            // [D, B, P] h from launch to launch
  A* c;              // [D, B, K, H] c from launch to launch, or null: K = 0
  S* c_n;            // [D, B, K, H], or null
};

enum class ForwardPhase { kWhole, kFirst, kSecond, kProject };

template <class Cell, class S, ForwardPhase Phase, class Tile>
struct ForwardStep {
  using Args = ForwardArgs<S>;
  using A = Accumulator<S>;
  using V = Lane<S>;
  static constexpr bool kProject = Phase == ForwardPhase::kProject, kFirst = Phase == ForwardPhase::kFirst,
                        kSecond = Phase == ForwardPhase::kSecond, kWhole = Phase == ForwardPhase::kWhole;
  static constexpr int kGates = Cell::kGates, kCarried = Cell::kCarried, kOwn = Cell::kUnitWeights,
                       kMasks = Cell::kMasks, kRecurrent = Cell::kFirstGates + Cell::kSecondGates;
  static constexpr int kGate = kSecond ? Cell::kFirstGates : 0;  // of the product's first row, among those of w_hh
  static constexpr int kRowsPerUnit = kProject ? 1 : kSecond ? Cell::kSecondGates : Cell::kFirstGates;
  static constexpr bool kReadsOperand = kSecond || kProject, kToOperand = kFirst, kTwoPhases = kFirst || kSecond;
  static constexpr bool kLookAhead = false;

  // What the cell's maths does not read of these is not loaded: the compiler sees that.
  struct Input {
    Ahead<S> x[kGates], masks[kAtLeast1<kMasks>];
  };
  struct Fixed {
    A x_bias[kGates], h_bias[kAtLeast1<kRowsPerUnit>], own[kAtLeast1<kOwn>];
  };
  struct State {
    V c[kAtLeast1<kCarried>], h;
  };
  struct Sources {
    unsigned live, initial;
  };

  // Where an item's numbers of a time are that load_input reads, and those that finish writes. A pass moves them: a new
  // address costs many more instructions than the next one, and everything waits for the next pass.
  struct InputPlace {
    const S *x, *masks;
  };
  struct OutputPlace {
    S *hidden, *saved;  // hidden: where it publishes
    A* saved_c;
  };

  // From place to place, in numbers: to a row of the same time that is so many further, or from pass to pass.
  struct Moves {
    int64_t projection, masks, hidden, saved, saved_c;
  };
  static __device__ __forceinline__ Moves row_moves(const Args& p, int64_t rows) {
    return {rows * p.projection_row, rows * (kMasks * p.H), rows * (publishes_operand(p) ? p.Hp : p.hidden_row),
            rows * p.saved_row, rows * (kCarried * p.H)};
  }
  static __device__ __forceinline__ Moves moves(const Args& p, int d) {
    Moves by = row_moves(p, d == 0 ? p.rows.B : -p.rows.B);  // a launch of several passes keeps all steps, or none
    by.masks = d == 0 ? p.mask_time : -p.mask_time;
    if (publishes_operand(p)) by.hidden = 0;
    return by;
  }
  static __device__ __forceinline__ void hold_all(Moves& by) {
    hold(by.projection), hold(by.hidden), hold(by.saved), hold(by.saved_c);
  }

  static __device__ __forceinline__ int time(const Args& p, int d, int pass) {
    return d == 0 ? pass : p.rows.T - 1 - pass;
  }
  static FASTRNN_HD int units(const Args& p) { return kProject ? p.P : p.H; }
  static __device__ __forceinline__ int depth(const Args& p) { return kReadsOperand ? p.Hp : p.Pp; }

  static __device__ __forceinline__ Sources sources(const Args&, const RowWatch& watch, int, int t, unsigned active,
                                                    unsigned restarted, unsigned) {
    if (kReadsOperand) return {active, 0};
    return {active & ~restarted, watch.initial(t)};
  }
  // Of the rows from b on, where those numbers are that they left in the pass before that of time t.
  static __device__ __forceinline__ const S* left_before(const Args& p, int d, int t, int b) {
    if (kReadsOperand) return p.operand + (size_t(d) * p.rows.B + b) * p.Hp;
    const int64_t before = d == 0 ? t - 1 : t + 1;
    return p.hidden + of_direction(d, p.hidden_direction) + (before * p.rows.B + b) * p.hidden_row;
  }
  static __device__ __forceinline__ int64_t left_move(const Moves& by) { return kReadsOperand ? 0 : by.hidden; }
  static __device__ __forceinline__ int64_t left_row(const Args& p) { return kReadsOperand ? p.Hp : p.hidden_row; }
  static __device__ __forceinline__ const S* initial_row(const Args& p, int d, int b) {
    return p.h_init + (size_t(d) * p.rows.B + b) * p.Pp;
  }

  // The same of all rows, for a product of all rows at once.
  static RowMatrix<S> operand(const Args& p, int d, int /*pass*/) {
    if (kReadsOperand) return {p.operand + size_t(d) * p.rows.B * p.Hp, p.Hp};
    return {p.h_n + size_t(d) * p.rows.B * p.P, p.P};
  }

  static __device__ __forceinline__ State load_state(const Args& p, int d, const Item<Tile>& item) {
    State state = zeros();
#pragma unroll
    for (int k = 0; k < kCarried; ++k)
      if (!kProject) state.c[k] = V(p.c[cell_at(p, d, item, k)]);
    if (!(kWhole && p.projected)) state.h = V(widen(p.h_n[output_at(p, d, item)]));  // no cell of such a layer reads it
    return state;
  }

  static __device__ __forceinline__ void store_state(const Args& p, int d, const Item<Tile>& item, const State& state) {
#pragma unroll
    for (int k = 0; k < kCarried; ++k) {
      if (!kWhole && !kSecond) break;
      p.c[cell_at(p, d, item, k)] = A(state.c[k]);
      p.c_n[cell_at(p, d, item, k)] = narrow<S>(A(state.c[k]));
    }
    if (kFirst || (kWhole && p.projected)) return;  // the other launch of the step does
    p.h_n[output_at(p, d, item)] = narrow<S>(A(state.h));
  }

  static __device__ __forceinline__ InputPlace input_place(const Args& p, int d, int t, const Item<Tile>& item) {
    return {p.projection + of_direction(d, p.projection_direction) + row_at(p, t, item) * p.projection_row + item.u,
            masks_at<kMasks>(p, d, t, item)};
  }
  static __device__ __forceinline__ void move(InputPlace& place, const Moves& by) {
    place.x += by.projection;
    if (kMasks) place.masks += by.masks;
  }
  static __device__ __forceinline__ Input load_input(const Args& p, int, const Item<Tile>& item, int t,
                                                     const InputPlace& place, const Moves&) {
    Input in = {};
    if constexpr (!kProject) {
      if (!item.used || t < 0 || t >= p.rows.T) return in;
#pragma unroll
      for (int g = 0; g < kGates; ++g) in.x[g] = Ahead<S>(place.x + g * size_t(p.H));
      load_masks<kMasks>(in.masks, p.H, place.masks);
    }
    return in;
  }

  static __device__ __forceinline__ void prefetch_input(const Args& p, int passes, const Item<Tile>& item,
                                                        const InputPlace& place, const Moves& by) {
    prefetch_vectors<kGates>(place.x + passes * by.projection, p.H, item);
    if constexpr (kMasks > 0) prefetch_vectors<kMasks>(place.masks + passes * by.masks, p.H, item);
  }

  static __device__ __forceinline__ Fixed load_fixed(const Args& p, int d, const Item<Tile>& item) {
    Fixed fixed = {};
    if (kProject || !item.used) return fixed;
    const A* const biases = p.biases + size_t(d) * (kGates + kRecurrent) * p.H + item.u;
#pragma unroll
    for (int g = 0; g < kGates; ++g) fixed.x_bias[g] = biases[g * p.H];
#pragma unroll
    for (int r = 0; r < kRowsPerUnit; ++r) fixed.h_bias[r] = biases[(kGates + kGate + r) * p.H];
    load_own<kOwn>(fixed.own, p, d, item);
    return fixed;
  }

  static __device__ __forceinline__ OutputPlace output_place(const Args& p, int d, int t, const Item<Tile>& item) {
    const uint64_t row = row_at(p, t, item), saved_row = p.keeps_saved ? row : item.b;
    const uint64_t row_c = of_direction(d, int64_t(p.rows.T) * p.rows.B) + row;
    S* const operand = p.operand + (size_t(d) * p.rows.B + item.b) * p.Hp + item.u;
    return {
        publishes_operand(p) ? operand : p.hidden + of_direction(d, p.hidden_direction) + row * p.hidden_row + item.u,
        p.saved + of_direction(d, p.saved_direction) + saved_row * p.saved_row + item.u,
        p.saved_c + row_c * uint32_t(kCarried * p.H) + item.u};
  }
  static __device__ __forceinline__ void move(OutputPlace& place, const Moves& by) {
    place.hidden += by.hidden, place.saved += by.saved;
    if (kCarried) place.saved_c += by.saved_c;
  }

  static __device__ __forceinline__ void prefetch_output(const Args&, int passes, const Item<Tile>& item,
                                                         const OutputPlace& place, const Moves& by) {
    if (item.in_exchange && item.unit % (kSectorBytes / int(sizeof(S))) == 0)
      prefetch(place.hidden + passes * by.hidden);
  }

  template <class Exchange>
  static __device__ __forceinline__ void finish(const Args& p, int d, int t, const Item<Tile>& item, bool active,
                                                bool restarted, const A* sums, const Input& in, const Fixed& fixed,
                                                const OutputPlace& place, State& state, Exchange& exchange) {
    S out = {};
    V saved[kAtLeast1<Cell::kSaved>];
    if (item.used && active) {
      if (restarted) state = zeros();
      out = compute(p, place, sums, in, fixed, state, saved);
    }
    // Others wait for this, and nobody for the rest.
    exchange.publish(place.hidden, out, item.in_exchange, item.row, item.u);
    if (!item.used) return;
    if (active) {
      keep(p, place, out, saved, state);
    } else if (p.keeps_saved && !kProject) {
      clear_saved(p, place);
    }
    if (p.separate_y && !publishes_operand(p))
      p.y[row_at(p, t, item) * uint32_t(p.D * p.P) + (d == 0 ? 0 : p.P) + item.u] = out;
  }

 private:
  static __device__ __forceinline__ bool publishes_operand(const Args& p) {
    return kToOperand || (kWhole && p.projected);
  }
  static __device__ __forceinline__ State zeros() {
    State state;
#pragma unroll
    for (V& c : state.c) c = V(A(0));
    state.h = V(A(0));
    return state;
  }
  // d * stride: a direction is 0 or 1.
  static __device__ __forceinline__ int64_t of_direction(int d, int64_t stride) { return d == 0 ? 0 : stride; }
  static __device__ __forceinline__ uint64_t row_at(const Args& p, int t, const Item<Tile>& item) {
    return uint64_t(t) * uint32_t(p.rows.B) + item.b;
  }
  static __device__ __forceinline__ size_t cell_at(const Args& p, int d, const Item<Tile>& item, int k) {
    return ((size_t(d) * p.rows.B + item.b) * kCarried + k) * p.H + item.u;
  }
  static __device__ __forceinline__ size_t output_at(const Args& p, int d, const Item<Tile>& item) {
    return (size_t(d) * p.rows.B + item.b) * p.P + item.u;
  }

  static __device__ __forceinline__ S compute(const Args& p, const OutputPlace& place, const A* sums, const Input& in,
                                              const Fixed& fixed, State& state, V* saved) {
    S out = {};
    if constexpr (kProject) {
      out = narrow<S>(sums[0]);
    } else {
      V x[kGates], h[kAtLeast1<kRecurrent>], given[kAtLeast1<kOwn + kMasks>];
#pragma unroll
      for (int g = 0; g < kGates; ++g) x[g] = V(widen(in.x[g].get()) + fixed.x_bias[g]);
#pragma unroll
      for (int r = 0; r < kRowsPerUnit; ++r) h[kGate + r] = V(sums[r] + fixed.h_bias[r]);
      put_given<kOwn, kMasks>(given, fixed.own, in.masks);
#pragma unroll
      for (int j = 0; j < Cell::kSaved; ++j)
        if (kTwoPhases) saved[j] = kSecond ? V(widen(place.saved[j * size_t(p.H)])) : V(A(0));
      if constexpr (kFirst) {
        return narrow<S>(A(Cell::first(x, h, state.h, given, state.c, saved)));
      } else {
        out = narrow<S>(A(Cell::forward(x, h, state.h, given, state.c, saved)));
      }
    }
    state.h = V(widen(out));
    return out;
  }

  // What backward, or the second phase, needs of an active row.
  static __device__ __forceinline__ void keep(const Args& p, const OutputPlace& place, S out, const V* saved,
                                              const State& state) {
    if (kProject) return;
    if (p.saved) {
#pragma unroll
      for (int j = 0; j < Cell::kSaved; ++j) write_once(place.saved + j * size_t(p.H), narrow<S>(A(saved[j])));
      if (p.projected) write_once(place.saved + Cell::kSaved * size_t(p.H), out);
    }
    if (!p.saved_c || kFirst) return;
#pragma unroll
    for (int k = 0; k < kCarried; ++k) write_once(place.saved_c + k * size_t(p.H), A(state.c[k]));
  }

  static __device__ __forceinline__ void clear_saved(const Args& p, const OutputPlace& place) {
#pragma unroll 1
    for (int j = 0; j < Cell::kSaved + p.projected; ++j) place.saved[j * size_t(p.H)] = S{};
  }
};

}  // namespace fastrnn::cuda
