// How a launch shares its work. A block owns kUnits units of one direction and walks kTurns groups of kBatch rows at a
// time: blockIdx.x counts units, blockIdx.y so many groups (a block goes through every gridDim.y-th of them),
// blockIdx.z directions.
#pragma once

#include "device.h"
#include "tile_shapes.h"

namespace fastrnn::cuda {

constexpr int kThreads = kWarps * kWarpSize;

template <int Units, int Batch, int Turns = 1>
struct Tile {
  static constexpr int kUnits = Units, kBatch = Batch, kTurns = Turns;
  // Lanes of a warp that add up a part each of the sums of a (unit, row), where there are more threads than these.
  static constexpr int kSpare = kThreads / (Units * Batch), kMostHelpers = kWarpSize / Units;
  static constexpr int kHelpers = kSpare < 2 ? 1 : kSpare < kMostHelpers ? kSpare : kMostHelpers;
  static constexpr int kLanes = Units * kHelpers;                            // of a row
  static constexpr int kItems = (kLanes * Batch + kThreads - 1) / kThreads;  // (unit, row) pairs that a thread finishes
  static_assert(Units % 8 == 0, "rows of 8 units are exchanged whole");
  static_assert(kThreads % kLanes == 0, "all items of a thread are of one unit; their rows ascend");
  static_assert(kLanes * Batch % kWarpSize == 0, "the lanes of a warp are all inside the tile or all outside");
  static_assert(Batch <= kWarpSize, "a row has a bit in a word, and a lane that watches it");
};

// The rows of a direction as a matrix: row b is at + b * pitch.
template <class S>
struct RowMatrix {
  const S* at;  // null: there is nothing to multiply
  int64_t pitch;
};

// The n-th (unit, row) of a thread. Units run fastest: neighbouring lanes write neighbouring units; then its helpers,
// of which the first finishes it.
template <class Tile>
struct Item {
  int row, unit;  // inside the block
  int helper;
  int b, u, length;  // in the layer; the row's length
  bool in_tile;      // of a warp, all or none
  bool in_exchange;  // u is below the number of units rounded up to 8, and b below B: somebody reads what it publishes
  bool used;         // u and b are inside the layer

  Item() = default;
  __device__ __forceinline__ Item(int n, int group, int B, int units) {
    const int lane = int(threadIdx.x) % Tile::kLanes;
    row = int(threadIdx.x) / Tile::kLanes + n * (kThreads / Tile::kLanes);
    unit = lane % Tile::kUnits, helper = lane / Tile::kUnits;
    b = group * Tile::kBatch + row, u = blockIdx.x * Tile::kUnits + unit;
    in_tile = row < Tile::kBatch;
    const bool finishes = in_tile && helper == 0 && b < B;
    in_exchange = finishes && u < (units + 7) / 8 * 8;
    used = finishes && u < units;
  }
};

// Brings into the L2 what lies side by side with a unit's numbers at `at`, of a row of `count` vectors of H numbers,
// one for each unit. Each lane takes a sector.
template <int count, class Tile, class N>
__device__ __forceinline__ void prefetch_vectors(const N* at, int H, const Item<Tile>& item) {
  constexpr int kNumbers = kSectorBytes / int(sizeof(N)), kSectors = (Tile::kUnits + kNumbers - 1) / kNumbers;
  if (!item.used) return;
#pragma unroll
  for (int first = 0; first < count * kSectors; first += Tile::kUnits) {
    const int i = first + item.unit, sector = i % kSectors * kNumbers;
    if (i < count * kSectors && (kSectors == 1 || item.u - item.unit + sector < H))
      prefetch(at - item.unit + i / kSectors * size_t(H) + sector);
  }
}

// The partial sums of a product, in shared memory: two sets, for even and odd products, of [part][row][kRows]. Who
// writes the set of product n+2, be it of another group of rows in turns, has passed the barrier of n+1, after which
// nobody reads the set of product n any more. The pitch keeps the stores of mma fragments free of bank conflicts.
template <class Sum, int kRows, int kBatch, int kParts>
struct PartialSums {
  static constexpr int kPitch = kRows + 4, kSet = kParts * kBatch * kPitch;
  static constexpr int kBytes = 2 * kSet * int(sizeof(Sum));

  template <class MaybeConst>
  static __device__ __forceinline__ MaybeConst* at(MaybeConst* set, int part, int row) {
    return set + (part * kBatch + row) * kPitch;
  }
};

// Which part of K who multiplies. K is cut into slices; if they are resident, kSlices for each of kSharers (warps or
// warpgroups) of kSplit blocks, they are dealt out in turns, so that nobody has more than one slice more than others,
// however short K is. If they are streamed (kSlices = 0), everybody has neighbouring ones.

// The first slice of a sharer of this block, who has `slices`. Resident ones follow at distances of kSharers * kSplit.
template <int kSlices, int kSharers, int kSplit>
__device__ __forceinline__ int first_slice(int sharer, int slices) {
  return kSlices > 0 ? sharer * kSplit + int(blockIdx.x % kSplit) : sharer * slices;
}

// The slice that is the i-th in the order of packed weights, [block of kSplit][sharer][slice of a sharer].
template <int kSlices, int kSharers, int kSplit>
__device__ __forceinline__ int dealt_out(int i) {
  if constexpr (kSlices == 0) return i;
  const int slice = i % (kSlices ? kSlices : 1), sharer = i / (kSlices ? kSlices : 1);
  return slice * kSharers * kSplit + sharer % kSharers * kSplit + sharer / kSharers;
}

}  // namespace fastrnn::cuda
