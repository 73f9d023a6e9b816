// What a backward pass multiplies and does with the sums: gate gradients of one time after the other, last to first.
// One more pass than there are steps leaves the gradients of the initial states. A cell with one product per step needs
// kWhole alone; one with a second product runs kSecond and kFirst, one launch each, and a layer with a projection
// kOutputs and kUnits. Without recurrent products kWhole multiplies nothing.
#pragma once

#include "given.h"
#include "number.h"
#include "rows.h"
#include "tile.h"

namespace fastrnn::cuda {

// As in ForwardArgs; J = kGrads vectors of gate gradients.
template <class S>
struct BackwardArgs {
  using A = Accumulator<S>;
  Rows rows;
  int D, H, P, Hp, Pp;
  const void* weights;  // packed, by direction and block of units or outputs; or what pointwise.h reads
  const S* saved;       // [D, T, B, V*H] from forward
  const A* saved_c;     // [D, T, B, K, H] from forward, or null
  const S* y;           // [T, B, D*P] from forward
  const S* h0;          // [D, B, P] or null
  const S* c0;          // [D, B, K, H] or null
  const S* own[2];      // as in ForwardArgs, like the masks
  const S* masks;
  int64_t mask_direction, mask_time;
  const S* grad_y;  // [T, B, D*P] or null
  S* grads;         // [D, T, B, J, Hp] gate gradients as blocks exchange them; 16-byte aligned
  S* projected;     // [D, T, B, Pp] dL/dh_t in full, if there is a projection; 16-byte aligned
  A* carry;         // [D, B, P] dL/dh_{t-1} but for the product, from launch to launch
  A* dc;            // [D, B, K, H] dL/dc_{t-1} from launch to launch
  S* grad_h0;       // [D, B, P] or null
  S* grad_c0;       // [D, B, K, H] or null
};

enum class BackwardPhase { kWhole, kSecond, kFirst, kOutputs, kUnits };

template <class Cell, class S, BackwardPhase Phase, class Tile>
struct BackwardStep {
  using Args = BackwardArgs<S>;
  using A = Accumulator<S>;
  using V = Lane<S>;
  static constexpr bool kWhole = Phase == BackwardPhase::kWhole, kSecond = Phase == BackwardPhase::kSecond,
                        kFirst = Phase == BackwardPhase::kFirst, kOutputs = Phase == BackwardPhase::kOutputs,
                        kUnits = Phase == BackwardPhase::kUnits;
  static constexpr int kFirstGates = Cell::kFirstGates, kSecondGates = Cell::kSecondGates, kCarried = Cell::kCarried,
                       kOwn = Cell::kUnitWeights, kMasks = Cell::kMasks;
  static constexpr int kSavedVectors = Cell::kSaved + kUnits;  // with a projection the hidden vector before it
  static constexpr int kRowsPerUnit = !kWhole || kFirstGates > 0;
  // The first vector of the gate gradients that a product reads; the others follow.
  static constexpr int kFirstGrad = Cell::kRecurrentGrad[0],
                       kSecondGrad = Cell::kRecurrentGrad[kSecondGates ? kFirstGates : 0];
  static constexpr bool kLookAhead = kWhole || kSecond || kOutputs;  // it multiplies what the pass before left

  struct Input {
    Ahead<S> saved[kAtLeast1<Cell::kSaved>], masks[kAtLeast1<kMasks>];
    Ahead<S> h_prev, grad_y;
    Ahead<A> c[kAtLeast1<kCarried>];
    A c_prev[kAtLeast1<kCarried>];
  };
  struct Fixed {
    A own[kAtLeast1<kOwn>];
  };
  struct State {
    A carry, dc[kAtLeast1<kCarried>];
  };
  struct Sources {
    unsigned live, initial;
  };

  // As in ForwardStep. Those of the time before, which the next pass reads, are a stride further.
  struct InputPlace {
    const S *saved, *masks, *grad_y, *y;
    const A* c;
  };
  struct OutputPlace {
    S* hidden;
  };
  struct Moves {
    int64_t saved, masks, y, c, hidden, left;
  };
  static __device__ __forceinline__ Moves row_moves(const Args& p, int64_t rows) {
    return {rows * saved_row(p),     rows * (kMasks * p.H), rows * y_row(p),
            rows * (kCarried * p.H), rows * output_row(p),  rows * left_row(p)};
  }
  static __device__ __forceinline__ Moves moves(const Args& p, int d) {
    Moves by = row_moves(p, d == 0 ? -p.rows.B : p.rows.B);
    by.masks = d == 0 ? -p.mask_time : p.mask_time;
    return by;
  }
  static __device__ __forceinline__ void hold_all(Moves& by) {
    hold(by.saved), hold(by.y), hold(by.c), hold(by.hidden), hold(by.left);
  }

  static FASTRNN_HD __forceinline__ int time(const Args& p, int d, int pass) {
    return d == 0 ? p.rows.T - 1 - pass : pass;
  }
  static FASTRNN_HD int units(const Args& p) { return kOutputs ? p.P : p.H; }
  static __device__ __forceinline__ int depth(const Args& p) {
    return kLookAhead ? kFirstGates * p.Hp : kUnits ? p.Pp : kSecondGates * p.Hp;
  }

  static __device__ __forceinline__ Sources sources(const Args&, const RowWatch& watch, int d, int t, unsigned active,
                                                    unsigned, unsigned restarted_before) {
    if (!kLookAhead) return {active, 0};
    return {watch.active(time_before(d, t)) & ~restarted_before, 0};
  }
  static FASTRNN_HD __forceinline__ const S* left_before(const Args& p, int d, int t, int b) {
    if (kUnits) return p.projected + row_of_direction(p, d, t, b) * left_row(p);
    const int vector = kFirst ? kSecondGrad : kFirstGrad;
    return p.grads + row_of_direction(p, d, kFirst ? t : time_before(d, t), b) * left_row(p) + vector * p.Hp;
  }
  static __device__ __forceinline__ int64_t left_move(const Moves& by) { return by.left; }
  static FASTRNN_HD __forceinline__ int64_t left_row(const Args& p) { return kUnits ? p.Pp : Cell::kGrads * p.Hp; }
  static __device__ __forceinline__ const S* initial_row(const Args&, int, int) { return nullptr; }  // there is none

  // The same of all rows, for a product of all rows at once.
  static RowMatrix<S> operand(const Args& p, int d, int pass) {
    if (kLookAhead ? pass == 0 : pass >= p.rows.T) return {nullptr, 0};
    return {left_before(p, d, time(p, d, pass), 0), left_row(p)};
  }

  static __device__ __forceinline__ State load_state(const Args& p, int d, const Item<Tile>& item) {
    State state = {};
    if (!kUnits) state.carry = p.carry[output_at(p, d, item)];
#pragma unroll
    for (int k = 0; k < kCarried; ++k)
      if (!kOutputs) state.dc[k] = p.dc[cell_at(p, d, item, k)];
    return state;
  }

  static __device__ __forceinline__ void store_state(const Args& p, int d, const Item<Tile>& item, const State& state) {
    if (!kUnits) {
      p.carry[output_at(p, d, item)] = state.carry;
      if (p.grad_h0) p.grad_h0[output_at(p, d, item)] = narrow<S>(state.carry);
    }
#pragma unroll
    for (int k = 0; k < kCarried; ++k) {
      if (kOutputs) break;
      p.dc[cell_at(p, d, item, k)] = state.dc[k];
      if (p.grad_c0) p.grad_c0[cell_at(p, d, item, k)] = narrow<S>(state.dc[k]);
    }
  }

  // What the cell's maths does not read is not loaded: the compiler sees that.
  static __device__ __forceinline__ InputPlace input_place(const Args& p, int d, int t, const Item<Tile>& item) {
    const int64_t row = int64_t(t) * p.rows.B + item.b, in_y = row * y_row(p) + (d == 0 ? 0 : p.P) + item.u;
    const int64_t of_direction = row_of_direction(p, d, t, item.b);
    return {p.saved + of_direction * saved_row(p) + item.u, masks_at<kMasks>(p, d, t, item), p.grad_y + in_y,
            p.y + in_y, p.saved_c + of_direction * (kCarried * p.H) + item.u};
  }
  static __device__ __forceinline__ void move(InputPlace& place, const Moves& by) {
    place.saved += by.saved, place.grad_y += by.y, place.y += by.y;
    if (kMasks) place.masks += by.masks;
    if (kCarried) place.c += by.c;
  }
  static __device__ __forceinline__ Input load_input(const Args& p, int d, const Item<Tile>& item, int t,
                                                     const InputPlace& place, const Moves& by) {
    Input in = {};
    if (!item.used || t < 0 || t >= item.length) return in;
    if (p.grad_y && (kWhole || kSecond || kOutputs)) in.grad_y = Ahead<S>(place.grad_y);
    if constexpr (!kOutputs) load_kept(in, p, d, item, t, place, by);
    return in;
  }

  static __device__ __forceinline__ void prefetch_input(const Args& p, int passes, const Item<Tile>& item,
                                                        const InputPlace& place, const Moves& by) {
    prefetch_vectors<Cell::kSaved>(place.saved + passes * by.saved, p.H, item);
    if constexpr (kMasks > 0) prefetch_vectors<kMasks>(place.masks + passes * by.masks, p.H, item);
    if (p.grad_y) prefetch_vectors<1>(place.grad_y + passes * by.y, p.H, item);
    if constexpr (Cell::kReadsH) prefetch_vectors<1>(place.y + passes * by.y, p.H, item);
    if constexpr (kCarried > 0) prefetch_vectors<kCarried>(place.c + passes * by.c, p.H, item);
  }

  static __device__ __forceinline__ Fixed load_fixed(const Args& p, int d, const Item<Tile>& item) {
    Fixed fixed = {};
    if (!kOutputs && item.used) load_own<kOwn>(fixed.own, p, d, item);
    return fixed;
  }

  static __device__ __forceinline__ OutputPlace output_place(const Args& p, int d, int t, const Item<Tile>& item) {
    return {(kOutputs ? p.projected : p.grads) + row_of_direction(p, d, t, item.b) * output_row(p) + item.u};
  }
  static __device__ __forceinline__ void move(OutputPlace& place, const Moves& by) { place.hidden += by.hidden; }

  static __device__ __forceinline__ void prefetch_output(const Args& p, int passes, const Item<Tile>& item,
                                                         const OutputPlace& place, const Moves& by) {
    if (!item.in_exchange || item.unit % (kSectorBytes / int(sizeof(S))) != 0) return;
    const S* const at = place.hidden + passes * by.hidden;
#pragma unroll
    for (int j = 0; j < Cell::kGrads; ++j)
      if (is_recurrent(j)) prefetch(at + j * p.Hp);
  }

  template <class Exchange>
  static __device__ __forceinline__ void finish(const Args& p, int d, int t, const Item<Tile>& item, bool active,
                                                bool restarted, const A* sums, const Input& in, const Fixed& fixed,
                                                const OutputPlace& place, State& state, Exchange& exchange) {
    if constexpr (kLookAhead && kRowsPerUnit > 0) state.carry += sums[0];
    V grads[Cell::kGrads];
#pragma unroll
    for (int j = 0; j < Cell::kGrads; ++j) grads[j] = V(A(0));
    A outputs = A(0);
    if (item.used && active) {
      if constexpr (kOutputs) {
        outputs = state.carry + widen(in.grad_y.get());
        state.carry = A(0);
      } else {
        compute(p, place, restarted, kRowsPerUnit > 0 ? sums[0] : A(0), in, fixed, state, grads);
      }
      if (restarted && !kSecond) state = {};
    }
    if (t < 0 || t >= p.rows.T) return;
    if constexpr (kOutputs) {
      exchange.publish(place.hidden, narrow<S>(outputs), item.in_exchange, item.row, item.u);
    } else {
#pragma unroll
      for (int j = 0; j < Cell::kGrads; ++j)
        exchange.publish(place.hidden + j * p.Hp, narrow<S>(A(grads[j])), item.in_exchange, item.row,
                         is_recurrent(j) ? (j - kFirstGrad) * p.Hp + item.u : -1);
    }
  }

 private:
  // What forward has kept.
  static __device__ __forceinline__ void load_kept(Input& in, const Args& p, int d, const Item<Tile>& item, int t,
                                                   const InputPlace& place, const Moves& by) {
#pragma unroll
    for (int j = 0; j < Cell::kSaved; ++j) in.saved[j] = Ahead<S>(place.saved + j * size_t(p.H));
    const int before = carried_time(d, t, item.length);
    if (!kUnits) {
      if (before >= 0) {
        in.h_prev = Ahead<S>(place.y + by.y);
      } else if (p.h0) {
        in.h_prev = Ahead<S>(p.h0 + output_at(p, d, item));
      }
    }
    load_masks<kMasks>(in.masks, p.H, place.masks);
#pragma unroll
    for (int k = 0; k < kCarried; ++k) {
      in.c[k] = Ahead<A>(place.c + k * size_t(p.H));
      if (before >= 0) {
        in.c_prev[k] = place.c[by.c + k * size_t(p.H)];
      } else if (p.c0) {
        in.c_prev[k] = widen(p.c0[cell_at(p, d, item, k)]);
      }
    }
  }

  // Whether gradient vector j is an operand of the product of a step.
  static __device__ __forceinline__ bool is_recurrent(int j) { return j >= kFirstGrad && j < kFirstGrad + kFirstGates; }

  // The time of the pass before that of time t.
  static FASTRNN_HD __forceinline__ int time_before(int d, int t) { return d == 0 ? t + 1 : t - 1; }

  // Of [D, T, B].
  static FASTRNN_HD __forceinline__ int64_t row_of_direction(const Args& p, int d, int t, int b) {
    return int64_t(t + (d == 0 ? 0 : p.rows.T)) * p.rows.B + b;
  }
  // From a row to the next, of saved, y and what is published.
  static __device__ __forceinline__ int64_t saved_row(const Args& p) { return kSavedVectors * p.H; }
  static __device__ __forceinline__ int64_t y_row(const Args& p) { return p.D * p.P; }
  static __device__ __forceinline__ int64_t output_row(const Args& p) { return kOutputs ? p.Pp : Cell::kGrads * p.Hp; }
  static __device__ __forceinline__ size_t cell_at(const Args& p, int d, const Item<Tile>& item, int k) {
    return ((size_t(d) * p.rows.B + item.b) * kCarried + k) * p.H + item.u;
  }
  static __device__ __forceinline__ size_t output_at(const Args& p, int d, const Item<Tile>& item) {
    return (size_t(d) * p.rows.B + item.b) * p.P + item.u;
  }

  static __device__ __forceinline__ void compute(const Args& p, const OutputPlace& place, bool restarted, A sum,
                                                 const Input& in, const Fixed& fixed, State& state, V* grads) {
    V saved[kAtLeast1<Cell::kSaved>], given[kAtLeast1<kOwn + kMasks>];
    V c[kAtLeast1<kCarried>], c_prev[kAtLeast1<kCarried>], dc[kAtLeast1<kCarried>];
    put_given<kOwn, kMasks>(given, fixed.own, in.masks);
#pragma unroll
    for (int k = 0; k < kCarried; ++k)
      c[k] = V(in.c[k].get()), c_prev[k] = V(restarted ? A(0) : in.c_prev[k]), dc[k] = V(state.dc[k]);
#pragma unroll
    for (int j = 0; j < Cell::kSaved; ++j) saved[j] = V(widen(in.saved[j].get()));
    const V h_prev = V(restarted || kUnits ? A(0) : A(widen(in.h_prev.get())));
    if constexpr (kFirst) {
#pragma unroll
      for (int j = 0; j < Cell::kGrads; ++j) grads[j] = V(widen(place.hidden[j * p.Hp]));
      V carry = V(state.carry);
      Cell::backward_first(saved, h_prev, given, c_prev, c, V(sum), dc, grads, carry);
      state.carry = A(carry);
    } else {
      const A dh = kUnits ? sum : state.carry + A(widen(in.grad_y.get()));
      V dh_prev;
      Cell::backward(saved, h_prev, given, c_prev, c, V(dh), dc, grads, dh_prev);
      state.carry = A(dh_prev);
    }
#pragma unroll
    for (int k = 0; k < kCarried; ++k) state.dc[k] = A(dc[k]);
  }
};

}  // namespace fastrnn::cuda
