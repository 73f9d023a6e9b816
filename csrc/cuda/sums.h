// How the partial sums that a product leaves become those of a (unit, row), always in the same order: the same bits
// every time. Either the block has all of K, or the blocks of a cluster have a part each and hand out what they have
// added up.
#pragma once

#include "cluster.h"
#include "tile.h"

namespace fastrnn::cuda {

// Adds up what the helpers of an item have; all lanes of a warp together.
template <class Tile, class Sum, int N>
__device__ __forceinline__ void add_helpers(Sum (&sums)[N]) {
#pragma unroll
  for (int other = Tile::kUnits; other < Tile::kLanes; other *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], other);
}

// kRowsPerUnit product rows of a unit.
template <class Product, int kRowsPerUnit>
class BlockSums {
 public:
  using Sum = typename Product::Sum;
  using Tile = typename Product::Tile;
  static constexpr int kSharedBytes = 0, kParts = Product::kParts / Tile::kHelpers;
  static_assert(Product::kParts % Tile::kHelpers == 0);

  __device__ __forceinline__ BlockSums(SpinGuard&, void* /*shared*/) {}

  // After the barrier that follows the product; all threads of the block.
  __device__ __forceinline__ void gather(const Sum* set) { set_ = set; }

  // `sums` are zeros before, and stay so where the row is not live; all lanes of a warp.
  __device__ __forceinline__ void add_up(const Item<Tile>& item, bool live, Sum (&sums)[kRowsPerUnit]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (!live) break;
      const Sum* const from = Product::Sums::at(set_, item.helper * kParts + i, item.row) + kRowsPerUnit * item.unit;
#pragma unroll
      for (int g = 0; g < kRowsPerUnit; ++g) sums[g] += from[g];
    }
    add_helpers<Tile>(sums);
  }

 private:
  const Sum* set_ = nullptr;
};

// K is split over the kSplit blocks of a cluster, each of which has partial sums for the units of all. Every block adds
// up its own and sends each other block those of that block's units: of K numbers of a row, a block reads one part.
//
// Two slots of mail are used in turns, as in cluster.h: who sends for product n+2 of a launch has received from all
// blocks what they sent for product n+1 after its barrier, when they had read all of product n.
template <class Product, int kRowsPerUnit>
class SplitSums {
 public:
  using Sum = float;
  using Tile = typename Product::Tile;
  static constexpr int kSplit = Product::kSplit, kBatch = Tile::kBatch, kOwnRows = Tile::kUnits * kRowsPerUnit;
  static_assert(Product::kRows == kSplit * kOwnRows && kOwnRows % 4 == 0);
  static constexpr int kSlot = kSplit * kBatch * kOwnRows;  // [block that sends][row][kOwnRows]
  static constexpr int kSharedBytes = 2 * int(sizeof(uint64_t)) + 2 * kSlot * int(sizeof(float));

  // `shared`: kSharedBytes, at the same place in every block.
  __device__ __forceinline__ SplitSums(SpinGuard& guard, void* shared)
      : guard_(guard), barriers_(static_cast<uint64_t*>(shared)), slots_(reinterpret_cast<float*>(barriers_ + 2)) {
    if (threadIdx.x == 0) inbox_init(barriers_), inbox_init(barriers_ + 1), inbox_publish();
    cluster_meet();
  }

  __device__ __forceinline__ void gather(const float* set) {
    constexpr int kFours = Product::kRows / 4, kBytes = kSplit * kBatch * kOwnRows * int(sizeof(float));
    const unsigned use = uses_++, slot = use & 1, rank = blockIdx.x % kSplit;
    if (guard_.expired()) return;  // an inbox that was given up is not in order
    if (threadIdx.x == 0) inbox_expect(barriers_ + slot, kBytes);
    float* const mine = slots_ + (slot * kSplit + rank) * kBatch * kOwnRows;  // in every block
    for (int i = threadIdx.x; i < kFours * kBatch; i += kThreads) {
      const int first = i % kFours * 4, row = i / kFours;
      uint4* const to = reinterpret_cast<uint4*>(mine + row * kOwnRows + first % kOwnRows);
      send(to, barriers_ + slot, unsigned(first / kOwnRows), own_sums(set, row, first));
    }
    wait_for(barriers_ + slot, use >> 1 & 1, guard_);
  }

  __device__ __forceinline__ void add_up(const Item<Tile>& item, bool live, float (&sums)[kRowsPerUnit]) const {
    constexpr int kRanks = kSplit / Tile::kHelpers;
    static_assert(kSplit % Tile::kHelpers == 0);
    const float* const slot = slots_ + ((uses_ - 1) & 1) * kSlot;
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      if (!live) break;
      const int rank = item.helper * kRanks + i;
      const float* const from = slot + (rank * kBatch + item.row) * kOwnRows + kRowsPerUnit * item.unit;
#pragma unroll
      for (int g = 0; g < kRowsPerUnit; ++g) sums[g] += from[g];
    }
    add_helpers<Tile>(sums);
  }

 private:
  // Of this block's part of K, for four neighbouring product rows.
  static __device__ __forceinline__ uint4 own_sums(const float* set, int row, int first) {
    float sum[4] = {};
#pragma unroll
    for (int part = 0; part < Product::kParts; ++part) {
      const uint4 four = *reinterpret_cast<const uint4*>(Product::Sums::at(set, part, row) + first);
      sum[0] += float_of(four.x), sum[1] += float_of(four.y), sum[2] += float_of(four.z), sum[3] += float_of(four.w);
    }
    return {bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])};
  }

  SpinGuard& guard_;
  uint64_t* barriers_;
  float* slots_;
  unsigned uses_ = 0;  // of slots, in turns
};

template <class Product, int kRowsPerUnit>
using SumsOf =
    std::conditional_t<(Product::kSplit > 1), SplitSums<Product, kRowsPerUnit>, BlockSums<Product, kRowsPerUnit>>;

}  // namespace fastrnn::cuda
