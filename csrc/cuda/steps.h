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
//   sources(args, watch, d, t, rows) -> Sources: rows that take part in the product, and of these the initial ones,
//                                    whose numbers were there before the launch (initial_row). Given are the rows that
//                                    are active and that restart, now and in the pass before
//   left_before, left_row, left_move where the numbers of the others are, from row to row and from pass to pass
//   State, load_state, store_state   what a (unit, row) carries from pass to pass
//   Fixed, load_fixed                what a unit needs in every pass; 0 if the first row is not used
//   Input, load_input                what it needs of a pass besides the product; nothing may wait for it
//   InputPlace, OutputPlace          where that is, and where it publishes; move() by Moves
//   moves, row_moves, hold_all       Moves from pass to pass, or to another row; keeps them in registers
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

// A block's way through its groups of rows.
template <class Step, class Product, class Exchange>
class Walk {
 public:
  using Args = typename Step::Args;
  using Tile = typename Product::Tile;
  using Sum = typename Product::Sum;
  using Sums = SumsOf<Product, Step::kRowsPerUnit>;
  using Weights = typename Product::Weights;

  __device__ __forceinline__ Walk(const Args& args, const Passes& passes, const Weights& weights, Sum* shared,
                                  Sums& sums, Exchange& exchange)
      : args_(args),
        passes_(passes),
        weights_(weights),
        shared_(shared),
        sums_(sums),
        exchange_(exchange),
        d_(blockIdx.z),
        lane_row_(Product::lane_row()),
        lane_k_(Product::lane_k(weights.slices())),
        left_row_(int(Step::left_row(args))),
        moves_(Step::moves(args, d_)) {
    if constexpr (Product::kRoomy) Step::hold_all(moves_);
  }

  // All passes of Tile::kTurns groups, from group `first` on. They take turns: what one has published travels while
  // another is multiplied.
  __device__ __forceinline__ void all_passes(int first) {
    Group groups[Tile::kTurns];
#pragma unroll
    for (int i = 0; i < Tile::kTurns; ++i) groups[i] = begin(first + i);
    const Item<Tile>& item = groups[0].items[0];
    const int first_time = Step::time(args_, d_, passes_.begin);
    left_ = Step::left_before(args_, d_, first_time, first * Tile::kBatch) + int64_t(lane_row_) * left_row_ + lane_k_;
    input_ = Step::input_place(args_, d_, first_time, item), output_ = Step::output_place(args_, d_, first_time, item);
    fixed_ = Step::load_fixed(args_, d_, item);  // all items of a thread are of one unit
#pragma unroll 1
    for (int pass = passes_.begin; pass < passes_.end; ++pass) {
#pragma unroll
      for (int i = 0; i < Tile::kTurns; ++i) take_turn(groups[i], i, pass);
      Step::move(output_, moves_), Step::move(input_, moves_);
      left_ += Step::left_move(moves_);
      if constexpr (Product::kResident) prefetch(groups, pass);
    }
#pragma unroll
    for (const Group& group : groups) end(group);
    if constexpr (Tile::kTurns == 1) __syncthreads();  // the next group starts with whichever set of sums
  }

 private:
  // Passes before it is written, memory that others will poll is brought into the L2, out of which the arrays of a long
  // sequence may have pushed it; passes before they are read, the inputs.
  static constexpr int kAhead = 3;

  // What a block has of a group of rows from pass to pass.
  struct Group {
    int index;
    RowWatch watch;
    int longest;
    unsigned restarted_before, restarted;
    bool has_before;  // whether there is a pass before, in this launch, with a product
    Item<Tile> items[Tile::kItems];
    typename Step::State states[Tile::kItems];
  };

  __device__ __forceinline__ Group begin(int index) const {
    Group group = {index, RowWatch(args_.rows, d_, index, Tile::kBatch)};
    const RowWatch& watch = group.watch;
    const int first_time = Step::time(args_, d_, passes_.begin);
    group.longest = watch.longest();
    group.restarted_before = watch.restarted(watch.load_reset(Step::time(args_, d_, passes_.begin - 1)));
    group.restarted = watch.restarted(watch.load_reset(first_time));
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      Item<Tile>& item = group.items[i] = Item<Tile>(i, index, args_.rows.B, Step::units(args_));
      item.length = item.used ? args_.rows.length(item.b) : 0;
      if (item.used) group.states[i] = Step::load_state(args_, d_, item);
    }
    return group;
  }

  __device__ __forceinline__ void end(const Group& group) const {
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i)
      if (group.items[i].used) Step::store_state(args_, d_, group.items[i], group.states[i]);
  }

  // `turn`: which of the groups it is.
  __device__ __forceinline__ void take_turn(Group& group, int turn, int pass) {
    const RowWatch& watch = group.watch;
    const int t = Step::time(args_, d_, pass), next_time = Step::time(args_, d_, pass + 1);
    const unsigned active = watch.active(t);
    const auto sources = Step::sources(args_, watch, d_, t, active, group.restarted, group.restarted_before);
    const bool has_product = passes_have_product(t, group.longest);
    typename Step::Input in[Tile::kItems] = {};
    const auto load_inputs = [&] {
#pragma unroll
      for (int i = 0; i < Tile::kItems; ++i)
        in[i] = Step::load_input(args_, d_, group.items[i], t, of_item(input_, turn, i), moves_);
    };
    if (has_product) {
      exchange_.receive(group.has_before);
      exchange_.expect(pass + 1 < passes_.end && passes_have_product(next_time, group.longest),
                       smaller(Tile::kBatch, args_.rows.B - group.index * Tile::kBatch));
      const auto from = [&](int n) { return left_by_others(group, turn, sources.initial, n); };
      Sum* const set = shared_ + next_set(pass) * Product::Sums::kSet;
      Product::multiply(weights_, from, sources.live, Step::depth(args_), set, exchange_.guard(), load_inputs);
      __syncthreads();
      sums_.gather(set);
    }
    const uint8_t next_reset = watch.load_reset(next_time);
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      const Item<Tile>& item = group.items[i];
      if (!item.in_tile) continue;
      Sum sum[Step::kRowsPerUnit];
#pragma unroll
      for (int g = 0; g < Step::kRowsPerUnit; ++g) sum[g] = Sum(0);
      if (has_product) sums_.add_up(item, has_row(sources.live, item.row), sum);
      Step::finish(args_, d_, t, item, has_row(active, item.row), has_row(group.restarted, item.row), sum, in[i],
                   fixed_, of_item(output_, turn, i), group.states[i], exchange_);
    }
    group.has_before = has_product;
    group.restarted_before = group.restarted, group.restarted = watch.restarted(next_reset);
  }

  // For kAhead passes after the one that is over.
  __device__ __forceinline__ void prefetch(const Group (&groups)[Tile::kTurns], int pass) const {
    if (pass + kAhead + 1 >= passes_.end) return;
#pragma unroll
    for (int n = 0; n < Tile::kTurns * Tile::kItems; ++n) {
      const int turn = n / Tile::kItems, i = n % Tile::kItems;
      const Item<Tile>& item = groups[turn].items[i];
      if (!item.in_tile) continue;
      Step::prefetch_input(args_, kAhead - 1, item, of_item(input_, turn, i), moves_);
      if (Product::kPolls) Step::prefetch_output(args_, kAhead - 1, item, of_item(output_, turn, i), moves_);
    }
  }

  // Sets of sums alternate: with the passes, or where groups take turns, of which one may have no product, with these.
  // A count takes a register, of which the others may have none left.
  __device__ __forceinline__ unsigned next_set(int pass) {
    if constexpr (Tile::kTurns > 1) return products_++ & 1;
    return pass & 1;
  }

  // From the place of this thread's first item to that of its n-th, of group `turn` of those that take turns.
  template <class Place>
  __device__ __forceinline__ Place of_item(Place first, int turn, int n) const {
    const int rows = turn * Tile::kBatch + n * (kThreads / Tile::kLanes);
    if (rows > 0) Step::move(first, Step::row_moves(args_, rows));
    return first;
  }

  // Of this lane's n-th row, the first number that it multiplies.
  __device__ __forceinline__ const typename Product::Number* left_by_others(const Group& group, int turn,
                                                                            unsigned initial, int n) const {
    const int row = lane_row_ + n * Product::kRowStep;
    const auto* at =
        exchange_.received(left_ + int64_t(turn * Tile::kBatch + n * Product::kRowStep) * left_row_, row, lane_k_);
    if (initial != 0) {
      int b = group.index * Tile::kBatch + row;
      only_here(b);
      if (has_row(initial, row)) at = Step::initial_row(args_, d_, b) + lane_k_;
    }
    return at;
  }

  // At times past the group's longest row all threads of the block skip the product and its barrier.
  __device__ __forceinline__ bool passes_have_product(int t, int longest) const {
    return t < longest || (Step::kLookAhead && t == longest && d_ == 1);
  }
  static __device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

  const Args& args_;
  const Passes& passes_;
  const Weights& weights_;
  Sum* const shared_;
  Sums& sums_;
  Exchange& exchange_;
  const int d_, lane_row_, lane_k_;  // of what this lane multiplies, the first row and number
  const int left_row_;
  typename Step::Moves moves_;
  // Where this thread's first item of the first group is, and the first number that this lane multiplies.
  typename Step::InputPlace input_;
  typename Step::OutputPlace output_;
  const typename Product::Number* left_;
  typename Step::Fixed fixed_;
  unsigned products_ = 0;  // so far, of groups that take turns
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
  const unsigned block = blockIdx.z * gridDim.x + blockIdx.x;
  const typename Product::Weights weights(static_cast<const char*>(args.weights) + block * passes.weight_bytes,
                                          passes.slices, Step::depth(args), after_sums);
  SpinGuard guard(passes.status, passes.wait_limit);
  SumsOf<Product, Step::kRowsPerUnit> sums(guard, after_sums + Product::kSharedBytes);
  static_assert(Tile::kTurns == 1 || !Product::kCluster, "mail is for one group of rows after another");
  const auto run_all = [&](auto exchange) {
    Walk<Step, Product, decltype(exchange)> walk(args, passes, weights, reinterpret_cast<Sum*>(shared), sums, exchange);
    for (int i = blockIdx.y; i * Tile::kTurns * Tile::kBatch < args.rows.B; i += gridDim.y)
      walk.all_passes(i * Tile::kTurns);
  };
  if constexpr (Product::kCluster) {
    run_all(ClusterExchange(guard, after_sums + Product::kSharedBytes, Tile::kBatch, Step::depth(args),
                            sizeof(typename Product::Number)));
  } else {
    run_all(GlobalExchange(guard));
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
