// The kernel that runs time steps: one launch does passes [begin, end) of a direction's time loop. A persistent launch
// does all of them with the weights on the chip; a stepwise one does a single pass and reads its weights from memory.
//
// One pass of a block: every warp multiplies its slice of K, with the rows' numbers straight from global memory to
// registers, and leaves partial sums in shared memory; after the only barrier of the pass each thread finishes its
// (unit, row) pairs and publishes them. What the next pass reads besides is loaded before the wait.
//
// A Step says what is multiplied and what becomes of it (forward.h, backward.h):
//   Args; kRowsPerUnit, product rows of a unit; kLookAhead, whether the time after the last active one has work, too
//   time(args, d, pass)              the time that a pass reads
//   units(args), depth(args)         of the product: units and numbers of a row (a multiple of 8)
//   sources(args, watch, d, t, reset) -> Sources, and from(sources, args, d, t, row, b), which rows take part in the
//                                    product and where their numbers are
//   State, load_state, store_state   what a (unit, row) carries from pass to pass
//   Input, load_input                what it needs of a pass besides the product; nothing may wait for it
//   finish                           what it does with the sums; all lanes of a warp together
#pragma once

#include "exchange.h"
#include "rows.h"
#include "tile.h"

namespace fastrnn::cuda {

struct Passes {
  int begin, end;
  int slices;            // of a warp; read if weights are not resident
  int64_t weight_bytes;  // of a block's packed weights
  uint32_t* status;      // 0; 1: a wait gave up
  unsigned spin_limit;
};

template <class Step, class Product>
struct Walk {
  using Tile = typename Product::Tile;
  using Sum = typename Product::Sum;
  using Args = typename Step::Args;

  // All passes of one group of rows.
  static __device__ __forceinline__ void group(const Args& args, const Passes& passes, int group,
                                               const typename Product::Weights& weights, Sum* shared,
                                               SpinGuard& guard) {
    const int d = blockIdx.z;
    const RowWatch watch(args.rows, d, group, Tile::kBatch);
    const int longest = watch.longest();
    Item<Tile> items[Tile::kItems];
    typename Step::State states[Tile::kItems];
    typename Step::Input next[Tile::kItems];
    const int first_time = Step::time(args, d, passes.begin);
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      items[i] = Item<Tile>(i, group, args.rows.B, Step::units(args));
      items[i].length = items[i].used ? args.rows.length(items[i].b) : 0;
      if (items[i].used) states[i] = Step::load_state(args, d, items[i]);
      next[i] = Step::load_input(args, d, items[i], first_time);
    }
    uint8_t reset_before = watch.load_reset(Step::time(args, d, passes.begin - 1)),
            reset = watch.load_reset(first_time);
    for (int pass = passes.begin; pass < passes.end; ++pass) {
      const int t = Step::time(args, d, pass), next_time = Step::time(args, d, pass + 1);
      const uint8_t next_reset = watch.load_reset(next_time);
      typename Step::Input now[Tile::kItems];
#pragma unroll
      for (int i = 0; i < Tile::kItems; ++i) {
        now[i] = next[i];
        if (pass + 1 < passes.end) next[i] = Step::load_input(args, d, items[i], next_time);
      }
      const unsigned active = watch.active(t), restarted = watch.restarted(reset);
      const auto sources = Step::sources(args, watch, d, t, active, restarted, watch.restarted(reset_before));
      Sum* const set = shared + (pass & 1) * Product::Sums::kSet;
      // Times past the group's longest row: all threads of the block skip the product and its barrier.
      const bool has_product = t < longest || (Step::kLookAhead && t == longest && d == 1);
      if (has_product) {
        const auto from = [&](int row) { return Step::from(sources, args, d, t, row, group * Tile::kBatch + row); };
        Product::multiply(weights, from, sources.live, Step::depth(args), set, guard);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < Tile::kItems; ++i) {
        const Item<Tile>& item = items[i];
        if (!item.in_tile) continue;
        Sum sums[Step::kRowsPerUnit];
#pragma unroll
        for (int g = 0; g < Step::kRowsPerUnit; ++g) sums[g] = Sum(0);
        if (has_product) add_up(set, item, sums);
        Step::finish(args, d, t, item, has_row(active, item.row), has_row(restarted, item.row), sums, now[i],
                     states[i]);
      }
      reset_before = reset, reset = next_reset;
    }
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i)
      if (items[i].used) Step::store_state(args, d, items[i], states[i]);
  }

 private:
  // Over the warps, in a fixed order: the same bits every time.
  static __device__ __forceinline__ void add_up(Sum* set, const Item<Tile>& item, Sum (&sums)[Step::kRowsPerUnit]) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Sum* const part = Product::Sums::at(set, w, item.row) + Step::kRowsPerUnit * item.unit;
#pragma unroll
      for (int g = 0; g < Step::kRowsPerUnit; ++g) sums[g] += part[g];
    }
  }
};

template <class Step, class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    run_steps(const typename Step::Args args, const Passes passes) {
  using Tile = typename Product::Tile;
  using Sum = typename Product::Sum;
  static_assert(Product::kRows >= Tile::kUnits * Step::kRowsPerUnit);
  unsigned char* const shared = shared_memory();
  const size_t block = size_t(blockIdx.z) * gridDim.x + blockIdx.x;
  const typename Product::Weights weights(static_cast<const char*>(args.weights) + block * passes.weight_bytes,
                                          passes.slices, shared + Product::Sums::kBytes);
  SpinGuard guard(passes.status, passes.spin_limit);
  for (int group = blockIdx.y; group * Tile::kBatch < args.rows.B; group += gridDim.y) {
    Walk<Step, Product>::group(args, passes, group, weights, reinterpret_cast<Sum*>(shared), guard);
    __syncthreads();  // the next group starts with whichever set of sums
  }
  if (guard.expired()) abandon();
}

}  // namespace fastrnn::cuda
