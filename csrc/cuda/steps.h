// The kernel that runs time steps: one launch does passes [begin, end) of a direction's time loop. A persistent launch
// does all of them with the weights on the chip; a stepwise one does a single pass and reads its weights from memory.
//
// One pass of a block: every warp multiplies its slices of K, with the rows' numbers straight from global memory to
// registers (but see product_wgmma.h), and leaves partial sums in shared memory; after a barrier, the only one of most
// kernels, each thread finishes its (unit, row) pairs and publishes them. What a pass reads besides is loaded when the
// rows' numbers have arrived, and comes while they are multiplied: a load in flight at the head of a pass would be
// waited for there, with the polls, since a warp has six scoreboards for all of its loads.
//
// A Step says what is multiplied and what becomes of it (forward.h, backward.h):
//   Args; kRowsPerUnit, product rows of a unit; kLookAhead, whether the time after the last active one has work, too
//   time(args, d, pass)              the time that a pass reads
//   operand(args, d, pass)           on the host, for pointwise.h: the rows of all groups, as a matrix
//   units(args), depth(args)         of the product: units and numbers of a row (a multiple of 8)
//   sources(args, watch, d, t, reset) -> Sources: rows that take part in the product, and of these the initial ones,
//                                    whose numbers were there before the launch (initial_row)
//   left_before, left_row, left_move where the numbers of the others are, from row to row and from pass to pass
//   State, load_state, store_state   what a (unit, row) carries from pass to pass
//   Fixed, load_fixed                what a unit needs in every pass; 0 if the first row is not used
//   Input, load_input                what it needs of a pass besides the product; nothing may wait for it
//   InputPlace, OutputPlace          where that is, and where it publishes; move() from pass to pass, by Moves
//   prefetch_input, prefetch_output  bring into the L2 what is there so many passes later
//   finish                           what it does with the sums; all lanes of a warp together
#pragma once

#include "cluster.h"
#include "exchange.h"
#include "rows.h"
#include "sums.h"
#include "tile.h"

namespace fastrnn::cuda {

struct Passes {
  int begin, end;
  int slices;            // of a warp; read if weights are not resident
  int64_t weight_bytes;  // of a block's packed weights
  uint32_t* status;      // 0; 1: a wait gave up
  uint32_t wait_limit;   // of one wait, in ticks
};

template <class Step, class Product>
struct Walk {
  using Tile = typename Product::Tile;
  using Sum = typename Product::Sum;
  using Args = typename Step::Args;
  using Sums = SumsOf<Product, Step::kRowsPerUnit>;

  // All passes of one group of rows.
  template <class Exchange>
  static __device__ __forceinline__ void group(const Args& args, const Passes& passes, int group,
                                               const typename Product::Weights& weights, Sum* shared, Sums& sums,
                                               Exchange& exchange) {
    const int d = blockIdx.z;
    const RowWatch watch(args.rows, d, group, Tile::kBatch);
    const int longest = watch.longest();
    Item<Tile> items[Tile::kItems];
    typename Step::State states[Tile::kItems];
    typename Step::InputPlace inputs[Tile::kItems];
    typename Step::OutputPlace outputs[Tile::kItems];
    const int first_time = Step::time(args, d, passes.begin);
    typename Step::Moves moves = Step::moves(args, d);
    if constexpr (Product::kRoomy) Step::hold_all(moves);
    // Of the numbers that this lane multiplies, the first.
    const int lane_row = Product::lane_row(), lane_k = Product::lane_k(weights.slices());
    const int64_t left_row = Step::left_row(args);
    const auto* left = Step::left_before(args, d, first_time, group * Tile::kBatch) + lane_row * left_row + lane_k;
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      items[i] = Item<Tile>(i, group, args.rows.B, Step::units(args));
      items[i].length = items[i].used ? args.rows.length(items[i].b) : 0;
      if (items[i].used) states[i] = Step::load_state(args, d, items[i]);
      inputs[i] = Step::input_place(args, d, first_time, items[i]);
      outputs[i] = Step::output_place(args, d, first_time, items[i]);
    }
    const typename Step::Fixed fixed = Step::load_fixed(args, d, items[0]);  // all items of a thread are of one unit
    unsigned restarted_before = watch.restarted(watch.load_reset(Step::time(args, d, passes.begin - 1))),
             restarted = watch.restarted(watch.load_reset(first_time));
    bool has_before = false;  // whether there is a pass before, in this launch, with a product
    for (int pass = passes.begin; pass < passes.end; ++pass) {
      const int t = Step::time(args, d, pass), next_time = Step::time(args, d, pass + 1);
      const unsigned active = watch.active(t);
      const auto sources = Step::sources(args, watch, d, t, active, restarted, restarted_before);
      Sum* const set = shared + (pass & 1) * Product::Sums::kSet;
      const bool has_product = passes_have_product(d, t, longest);
      const bool next_has = pass + 1 < passes.end && passes_have_product(d, next_time, longest);
      typename Step::Input in[Tile::kItems] = {};
      const auto load_inputs = [&] {
#pragma unroll
        for (int i = 0; i < Tile::kItems; ++i) in[i] = Step::load_input(args, d, items[i], t, inputs[i], moves);
      };
      if (has_product) {
        const auto from = [&](int n) {
          const int row = lane_row + n * Product::kRowStep;
          const auto* at = exchange.received(left + n * (Product::kRowStep * left_row), row, lane_k);
          if (sources.initial != 0) {
            int b = group * Tile::kBatch + row;
            only_here(b);
            if (has_row(sources.initial, row)) at = Step::initial_row(args, d, b) + lane_k;
          }
          return at;
        };
        exchange.receive(has_before);
        exchange.expect(next_has, smaller(Tile::kBatch, args.rows.B - group * Tile::kBatch));
        Product::multiply(weights, from, sources.live, Step::depth(args), set, exchange.guard(), load_inputs);
        __syncthreads();
        sums.gather(set);
      }
      const uint8_t next_reset = watch.load_reset(next_time);
#pragma unroll
      for (int i = 0; i < Tile::kItems; ++i) {
        const Item<Tile>& item = items[i];
        if (!item.in_tile) continue;
        Sum sum[Step::kRowsPerUnit];
#pragma unroll
        for (int g = 0; g < Step::kRowsPerUnit; ++g) sum[g] = Sum(0);
        if (has_product) sums.add_up(item, has_row(sources.live, item.row), sum);
        Step::finish(args, d, t, item, has_row(active, item.row), has_row(restarted, item.row), sum, in[i], fixed,
                     outputs[i], states[i], exchange);
        Step::move(outputs[i], moves), Step::move(inputs[i], moves);
        if (Product::kResident && pass + kAhead + 1 < passes.end) {
          Step::prefetch_input(args, kAhead - 1, item, inputs[i], moves);
          if (Product::kPolls) Step::prefetch_output(args, kAhead - 1, item, outputs[i], moves);
        }
      }
      left += Step::left_move(moves);
      has_before = has_product;
      restarted_before = restarted, restarted = watch.restarted(next_reset);
    }
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i)
      if (items[i].used) Step::store_state(args, d, items[i], states[i]);
  }

 private:
  // Passes before it is written, memory that others will poll is brought into the L2, out of which the arrays of a long
  // sequence may have pushed it; passes before they are read, the inputs.
  static constexpr int kAhead = 3;

  // At times past the group's longest row all threads of the block skip the product and its barrier.
  static __device__ __forceinline__ bool passes_have_product(int d, int t, int longest) {
    return t < longest || (Step::kLookAhead && t == longest && d == 1);
  }
  static __device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
};

template <class Product>
constexpr bool kUsesClusters = Product::kCluster || (Product::kSplit > 1);

template <class Step, class Product>
__device__ __forceinline__ void run_groups(const typename Step::Args& args, const Passes& passes) {
  using Tile = typename Product::Tile;
  using Sum = typename Product::Sum;
  static_assert(Product::kRows >= Tile::kUnits * Product::kSplit * Step::kRowsPerUnit);
  unsigned char* const shared = shared_memory();
  unsigned char* const after_sums = shared + Product::Sums::kBytes;
  const size_t block = size_t(blockIdx.z) * gridDim.x + blockIdx.x;
  const typename Product::Weights weights(static_cast<const char*>(args.weights) + block * passes.weight_bytes,
                                          passes.slices, Step::depth(args), after_sums);
  SpinGuard guard(passes.status, passes.wait_limit);
  typename Walk<Step, Product>::Sums sums(guard, after_sums + Product::kSharedBytes);
  const auto run_all = [&](auto& exchange) {
    for (int group = blockIdx.y; group * Tile::kBatch < args.rows.B; group += gridDim.y) {
      Walk<Step, Product>::group(args, passes, group, weights, reinterpret_cast<Sum*>(shared), sums, exchange);
      __syncthreads();  // the next group starts with whichever set of sums
    }
  };
  if constexpr (Product::kCluster) {
    ClusterExchange exchange(guard, after_sums + Product::kSharedBytes, Tile::kBatch, Step::depth(args),
                             sizeof(typename Product::Number));
    run_all(exchange);
  } else {
    GlobalExchange exchange(guard);
    run_all(exchange);
  }
  if constexpr (kUsesClusters<Product>) cluster_meet();  // a block's shared memory stays until nobody sends to it
  if (guard.expired()) abandon();
}

// What this compilation is for: all chips from compute capability 9.0 on have clusters, 9.0 alone has wgmma.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif
template <class Product>
constexpr bool kIsThere = (kHasClusters || !kUsesClusters<Product>) && (kHasWgmma || !Product::kWgmma);

template <class Step, class Product>
__global__ void __launch_bounds__(kThreads, Product::kBlocks)
    run_steps(const typename Step::Args args, const Passes passes) {
  if constexpr (kIsThere<Product>) {
    run_groups<Step, Product>(args, passes);
  } else {
    abandon();  // chosen by the environment alone, for a chip that the library was not compiled for
  }
}

}  // namespace fastrnn::cuda
