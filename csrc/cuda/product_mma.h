// The product of a step on the tensor cores, for 16-bit types and TF32: partial sums of weights [kRows, depth] times
// the rows of a tile, K split over the warps, in float.
//
// The order of k is free as long as both operands agree, so it is chosen such that one 16-byte load of a lane, eight
// (of TF32: four) neighbouring numbers of a row, is its part of the B fragments of two mma: nothing is staged in shared
// memory.
#pragma once

#include "exchange.h"
#include "tile.h"

namespace fastrnn::cuda {

// Weights live in registers (the first RegisterSlices slices of a warp) and in shared memory (the others) for the whole
// launch; Slices = 0: they are read anew in every step, and any depth is possible.
// With Cluster, blocks exchange by cluster.h: what is multiplied has arrived before the product starts. With Split, the
// rows are those of so many neighbouring blocks, and each of these multiplies its part of K (sums.h).
template <class S, int Rows, class Tile_, int Slices, int RegisterSlices, bool Cluster = false, int Split = 1>
struct MmaProduct {
  using Number = S;
  using Sum = float;
  using Tile = Tile_;
  static_assert(kUsesMma<S> && Rows % 16 == 0 && Tile::kBatch % 8 == 0);
  static constexpr int kRows = Rows, kVector = 16 / int(sizeof(S));  // numbers of a 16-byte load
  static constexpr int kSlice = 4 * kVector;                         // numbers of a row that a warp takes in at once
  static constexpr int kSlices = Slices, kSplit = Split, kParts = kWarps;
  static constexpr bool kResident = Slices > 0, kWgmma = false, kCluster = Cluster, kPolls = kResident && !Cluster;
  static constexpr int kRowTiles = Rows / 16, kColumns = Tile::kBatch / 8, kSliceFragments = kRowTiles * 2;
  static constexpr int kStride = kSlice * (kResident ? kWarps * kSplit : 1);  // from a slice of a warp to its next
  static_assert(Slices * kColumns <= 32, "a slice and column has a bit in a word");
  // Of a multiprocessor. What a stepwise launch waits for are its loads, which a second block hides, if half of the
  // registers are enough.
  static constexpr int kBlocks = kResident || kRowTiles > 3 || kColumns > 1 ? 1 : 2;
  static constexpr int kSharedSlices = kResident ? Slices - RegisterSlices : 0;
  static constexpr int kSharedBytes = kWarps * kSharedSlices * kSliceFragments * kWarpSize * int(sizeof(uint4));
  // Whether a thread has registers left for what saves instructions.
  static constexpr bool kRoomy =
      kResident && Tile::kItems == 1 && 8 * kRowTiles * RegisterSlices + 4 * kRowTiles * kColumns <= 144;
  using Sums = PartialSums<Sum, kRows, Tile::kBatch, kParts>;

  // The weight at `index` of a block's packed ones, [slice][row tile][tile of the slice][lane][register][half], without
  // halves in TF32: row of the block and k.
  struct At {
    int row, k;
  };
  static __device__ __forceinline__ At packed_at(int index) {
    constexpr int kHalves = kVector / 4;
    const int half = index % kHalves, reg = index / kHalves % 4, lane = index / kHalves / 4 % kWarpSize;
    const int tile = index / kHalves / 4 / kWarpSize % 2, rest = index / kHalves / 8 / kWarpSize;
    const int row_tile = rest % kRowTiles, slice = dealt_out<kSlices, kWarps, kSplit>(rest / kRowTiles),
              quad = lane % 4;
    // A lane's 16 bytes are words 0 to 3; words 2e and 2e+1 are what mma e wants from it.
    const int word = 2 * tile + reg / 2;
    return {16 * row_tile + lane / 4 + 8 * (reg % 2), kSlice * slice + kVector * quad + kHalves * word + half};
  }

  // Of what a lane reads: its first row, from which it has every kRowStep-th, and its first number of each.
  static constexpr int kRowStep = 8;
  static __device__ __forceinline__ int lane_row() { return threadIdx.x % kWarpSize / 4; }
  static __device__ __forceinline__ int lane_k(int slices) {
    return kSlice * first_slice<kSlices, kWarps, kSplit>(threadIdx.x / kWarpSize, slices) + kVector * (threadIdx.x % 4);
  }

  // As a weight is packed.
  static __device__ __forceinline__ S operand(S weight) {
    if constexpr (std::is_same_v<S, TFloat32>) return {float_of(to_tf32(bits_of(weight.value)))};
    return weight;
  }

  class Weights {
   public:
    // `packed` of this block, `slices` of each warp (kSlices if resident), `depth` numbers of a row, `shared` memory of
    // kSharedBytes.
    __device__ __forceinline__ Weights(const void* packed, int slices, int depth, void* shared) : slices_(slices) {
      const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
      from_ = static_cast<const uint4*>(packed) + size_t(warp) * slices * kSliceFragments * kWarpSize + lane;
      shared_ = static_cast<uint4*>(shared) + warp * kSharedSlices * kSliceFragments * kWarpSize + lane;
      if constexpr (kResident) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held_[i] = from_[i * kWarpSize];
#pragma unroll
        for (int i = 0; i < kSharedSlices * kSliceFragments; ++i)  // read again by the same lane only
          shared_[i * kWarpSize] = from_[(kHeld + i) * kWarpSize];
        within_ = mask_of<kSlices * kColumns>(
            [&](int i) { return i % kColumns == 0 && lane_k(slices) + kStride * (i / kColumns) < depth; });
        hold(within_);
      }
    }

    // The A fragment of a row tile for tile e of a slice. `slice` is a constant where weights are resident.
    __device__ __forceinline__ uint4 fragment(int slice, int row_tile, int e) const {
      const int i = (slice * kRowTiles + row_tile) * 2 + e;
      if constexpr (!kResident) return from_[size_t(i) * kWarpSize];
      return i < kHeld ? held_[i < kHeld ? i : 0] : shared_[(i - kHeld) * kWarpSize];
    }
    __device__ __forceinline__ int slices() const { return kResident ? kSlices : slices_; }
    // Bit kColumns * i of it: whether this lane's part of resident slice i lies within the depth.
    __device__ __forceinline__ uint32_t within() const { return within_; }

   private:
    static constexpr int kHeld = kResident ? RegisterSlices * kSliceFragments : 0;
    uint4 held_[kHeld > 0 ? kHeld : 1];
    const uint4* from_;
    uint4* shared_;
    int slices_;
    uint32_t within_ = 0;
  };

  // set[warp][row][r] = the warp's part of weights[r] . row, 0 for rows that are not live: these are neither read nor
  // waited for. from(n): where this lane's first number of its n-th row is, 16-byte aligned; depth is a multiple of 8.
  // load_inputs() is called once: behind all polls, while the tensor cores still work, or first of all without polls.
  template <class From, class LoadInputs>
  static __device__ __forceinline__ void multiply(const Weights& weights, From from, unsigned live, int depth, Sum* set,
                                                  SpinGuard& guard, LoadInputs load_inputs) {
    float sum[kColumns][kRowTiles][4] = {};
    if constexpr (kResident) {
#pragma unroll
      for (int first = 0; first < kSlices; first += kGroup) add_group(weights, from, live, depth, first, guard, sum);
      guard.start_over();
      load_inputs();
    } else {
      load_inputs();
      for (int first = 0; first < weights.slices(); first += kGroup)
        add_group(weights, from, live, depth, first, guard, sum);
    }
    const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        float* const even = Sums::at(set, warp, 8 * n + 2 * c) + 16 * m + g;
        float* const odd = Sums::at(set, warp, 8 * n + 2 * c + 1) + 16 * m + g;
        even[0] = sum[n][m][0], odd[0] = sum[n][m][1], even[8] = sum[n][m][2], odd[8] = sum[n][m][3];
      }
  }

 private:
  // Slices whose loads are in flight together: as many equal groups as are needed.
  static constexpr int kLoads = mma_loads(kRowTiles, RegisterSlices, kColumns);
  static constexpr int kGroups = kResident ? (kSlices * kColumns + kLoads - 1) / kLoads : 1;
  static constexpr int kGroup = kResident ? (kSlices + kGroups - 1) / kGroups : kRowTiles * kColumns > 2 ? 1 : 2;

  static __device__ __forceinline__ void mma(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      mma_bfloat16(d, a, b0, b1);
    } else if constexpr (std::is_same_v<S, Float16>) {
      mma_float16(d, a, b0, b1);
    } else {
      mma_tf32(d, a, to_tf32(b0), to_tf32(b1));
    }
  }

  // What to load of a group: bit p * kColumns + n for slice p, row n of the lane.
  static __device__ __forceinline__ unsigned wanted(const Weights& weights, unsigned live, int depth, int first) {
    constexpr int kCount = kGroup * kColumns;
    if constexpr (kResident) {
      const unsigned rows = mask_of<kColumns>([&](int n) { return has_row(live, lane_row() + kRowStep * n); });
      return part_of<kCount>(weights.within(), first * kColumns) * rows;
    } else {
      const int last = weights.slices() - first, k = lane_k(weights.slices()) + kStride * first;
      return mask_of<kCount>([&](int i) {
        const int p = i / kColumns, n = i % kColumns;
        return p < last && has_row(live, lane_row() + kRowStep * n) && k + kStride * p < depth;
      });
    }
  }

  template <class From>
  static __device__ __forceinline__ void add_group(const Weights& weights, From from, unsigned live, int depth,
                                                   int first, SpinGuard& guard, float (&sum)[kColumns][kRowTiles][4]) {
    const int last = weights.slices() - first;  // streamed weights may cut the group short
    uint4 b[kGroup * kColumns];                 // slice p, rows 8 * n to 8 * n + 7: p * kColumns + n
    const S* rows[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) rows[n] = from(n);
    const auto at = [&](int i) { return rows[i % kColumns] + kStride * (first + i / kColumns); };
    load_all<kCluster, kPolls>(b, wanted(weights, live, depth, first), at, guard);
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      // Resident weights beyond the depth are zeros, and so are the numbers: cheaper than a branch between products.
      if (!kResident && p >= last) break;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint4 a0 = weights.fragment(first + p, m, 0), a1 = weights.fragment(first + p, m, 1);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const uint4 numbers = b[p * kColumns + n];
          mma(sum[n][m], a0, numbers.x, numbers.y);
          mma(sum[n][m], a1, numbers.z, numbers.w);
        }
      }
    }
  }
};

}  // namespace fastrnn::cuda
