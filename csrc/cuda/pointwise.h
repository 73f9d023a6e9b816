// Steps whose products are not of a kernel here, every (unit, row) by itself: what follows a product that a matrix
// library has made of all rows at once, and all steps of a cell that has no recurrent product.
#pragma once

#include "exchange.h"
#include "rows.h"
#include "tile.h"

namespace fastrnn::cuda {

// As run_steps (steps.h) after its product. Step::Args::weights are here the sums, [D, B, kRowsPerUnit, units] of A;
// those of rows that are not live may be anything.
template <class Step, class A, class Tile>
__global__ void __launch_bounds__(kThreads) finish_step(const typename Step::Args args, int pass) {
  static_assert(Tile::kItems == 1 && Tile::kUnits * Tile::kBatch == kThreads);
  const int d = blockIdx.z, t = Step::time(args, d, pass), units = Step::units(args);
  SpinGuard guard(nullptr, 0);  // nobody waits
  GlobalExchange exchange(guard);
  for (int group = blockIdx.y; group * Tile::kBatch < args.rows.B; group += gridDim.y) {
    const RowWatch watch(args.rows, d, group, Tile::kBatch);
    Item<Tile> item(0, group, args.rows.B, units);
    item.length = item.used ? args.rows.length(item.b) : 0;
    const typename Step::Input in =
        Step::load_input(args, d, item, t, Step::input_place(args, d, t, item), Step::moves(args, d));
    const typename Step::Fixed fixed = Step::load_fixed(args, d, item);
    typename Step::State state = {};
    if (item.used) state = Step::load_state(args, d, item);
    const unsigned active = watch.active(t), restarted = watch.restarted(watch.load_reset(t));
    const unsigned restarted_before = watch.restarted(watch.load_reset(Step::time(args, d, pass - 1)));
    const auto sources = Step::sources(args, watch, d, t, active, restarted, restarted_before);
    A sums[Step::kRowsPerUnit];
    const A* const from =
        static_cast<const A*>(args.weights) + (size_t(d) * args.rows.B + item.b) * Step::kRowsPerUnit * units + item.u;
#pragma unroll
    for (int g = 0; g < Step::kRowsPerUnit; ++g)
      sums[g] = item.used && has_row(sources.live, item.row) ? from[size_t(g) * units] : A(0);
    Step::finish(args, d, t, item, has_row(active, item.row), has_row(restarted, item.row), sums, in, fixed,
                 Step::output_place(args, d, t, item), state, exchange);
    if (item.used) Step::store_state(args, d, item, state);
  }
}

// Passes [0, passes), with no product before any. Inputs are loaded for several at once: there is nothing else to do
// while one waits for them.
template <class Step, class Tile>
__global__ void __launch_bounds__(kThreads) scan_steps(const typename Step::Args args, int passes) {
  static_assert(Step::kRowsPerUnit == 0 && Tile::kItems == 1 && Tile::kUnits * Tile::kBatch == kThreads);
  constexpr int kAtOnce = 4;
  const int d = blockIdx.z;
  SpinGuard guard(nullptr, 0);  // nobody waits
  GlobalExchange exchange(guard);
  for (int group = blockIdx.y; group * Tile::kBatch < args.rows.B; group += gridDim.y) {
    const RowWatch watch(args.rows, d, group, Tile::kBatch);
    Item<Tile> item(0, group, args.rows.B, Step::units(args));
    item.length = item.used ? args.rows.length(item.b) : 0;
    const typename Step::Fixed fixed = Step::load_fixed(args, d, item);
    typename Step::State state = {};
    if (item.used) state = Step::load_state(args, d, item);
    const int first_time = Step::time(args, d, 0);
    const typename Step::Moves moves = Step::moves(args, d);
    typename Step::InputPlace input = Step::input_place(args, d, first_time, item);
    typename Step::OutputPlace output = Step::output_place(args, d, first_time, item);
    for (int begin = 0; begin < passes; begin += kAtOnce) {
      typename Step::Input in[kAtOnce];
      uint8_t resets[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int t = Step::time(args, d, begin + i);
        in[i] = Step::load_input(args, d, item, t, input, moves), resets[i] = watch.load_reset(t);
        Step::move(input, moves);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i >= passes) continue;  // with break, the branches of four rounds spill a register
        const int t = Step::time(args, d, begin + i);
        Step::finish(args, d, t, item, has_row(watch.active(t), item.row),
                     has_row(watch.restarted(resets[i]), item.row), nullptr, in[i], fixed, output, state, exchange);
        Step::move(output, moves);
      }
    }
    if (item.used) Step::store_state(args, d, item, state);
  }
}

}  // namespace fastrnn::cuda
