// The product of a step by warpgroups, four warps whose tensor cores work on one product (wgmma, compute capability 9.0
// alone), for 16-bit types and many rows: partial sums of weights [64, depth] times the rows of a tile.
//
// Weights are the operand in registers, the rows' numbers the one in shared memory, which whoever loads them puts
// there: a warpgroup needs each number once, where mma needs it in every warp that multiplies it. K is split over the
// warpgroups; each stages and multiplies its part by itself.
#pragma once

#include "exchange.h"
#include "tile.h"

namespace fastrnn::cuda {

// As MmaProduct; all weights are resident, in registers.
template <class S, class Tile_, int Slices, int Split>
struct WgmmaProduct {
  using Number = S;
  using Sum = float;
  using Tile = Tile_;
  static constexpr int kRows = 64, kVector = 8, kSlices = Slices, kSplit = Split, kParts = kWarps / kGroupWarps;
  static_assert(kIs16Bit<S> && Tile::kBatch % 8 == 0 && kParts > 0 && Slices > 0);
  static constexpr bool kResident = true, kWgmma = true, kCluster = false, kPolls = true;
  static constexpr int kBlocks = 1;
  static constexpr int kSlice = 32;                                // of K, of a warp; a warpgroup has four as one piece
  static constexpr int kPiece = kGroupWarps * kSlice;              // numbers of a row
  static constexpr int kSteps = kPiece / 16;                       // of wgmma, for a piece
  static constexpr int kVectorBytes = Tile::kBatch * kVector * 2;  // of all rows
  static constexpr int kStagedBytes = Slices * kPiece / kVector * kVectorBytes;  // of a warpgroup
  static constexpr int kSharedBytes = kParts * kStagedBytes;
  static constexpr bool kRoomy = false;  // as in MmaProduct
  using Sums = PartialSums<Sum, kRows, Tile::kBatch, kParts>;

  // The weight at `index` of the packed ones, [step][warp of a warpgroup][lane][register][half].
  struct At {
    int row, k;
  };
  static __device__ __forceinline__ At packed_at(int index) {
    const int half = index % 2, reg = index / 2 % 4, lane = index / 8 % kWarpSize;
    const int warp = index / 8 / kWarpSize % kGroupWarps, step = index / 8 / kWarpSize / kGroupWarps;
    const int piece = dealt_out<kSlices, kParts, kSplit>(step / kSteps);
    return {16 * warp + lane / 4 + 8 * (reg % 2),
            kPiece * piece + 16 * (step % kSteps) + 8 * (reg / 2) + 2 * (lane % 4) + half};
  }

  static constexpr int kRowStep = 8;
  static __device__ __forceinline__ int lane_row() { return threadIdx.x % 8; }
  static __device__ __forceinline__ int lane_k(int /*slices*/) {
    return kPiece * first_slice<kSlices, kParts, kSplit>(warpgroup(), kSlices) + lane_vector() * kVector;
  }

  static __device__ __forceinline__ S operand(S weight) { return weight; }

  class Weights {
   public:
    // `shared` memory of kSharedBytes is for the rows' numbers.
    __device__ __forceinline__ Weights(const void* packed, int /*slices*/, int /*depth*/, void* shared)
        : staged_(static_cast<unsigned char*>(shared) + warpgroup() * kStagedBytes) {
      const uint4* const from =
          static_cast<const uint4*>(packed) + warpgroup() * kHeld * kGroupThreads + threadIdx.x % kGroupThreads;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held_[i] = from[i * kGroupThreads];
    }

    __device__ __forceinline__ uint4 fragment(int step) const { return held_[step]; }
    __device__ __forceinline__ int slices() const { return kSlices; }
    // Of this warpgroup: [vector of 8 numbers][row], which wgmma takes as core matrices of 8 rows.
    __device__ __forceinline__ unsigned char* staged() const { return staged_; }

   private:
    static constexpr int kHeld = Slices * kSteps;
    uint4 held_[kHeld];
    unsigned char* staged_;
  };

  template <class From, class LoadInputs>
  static __device__ __forceinline__ void multiply(const Weights& weights, From from, unsigned live, int depth, Sum* set,
                                                  SpinGuard& guard, LoadInputs load_inputs) {
    float sum[Tile::kBatch / 2];
    stage(weights, from, live, depth, guard);
    shared_written_for_wgmma();
    warpgroup_meet(warpgroup());
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < Slices * kSteps; ++step) {
      const SharedMatrix b = shared_matrix(weights.staged() + 2 * step * kVectorBytes, kVectorBytes, 8 * 16);
      wgmma(sum, weights.fragment(step), b, step > 0);
    }
    wgmma_commit();
    load_inputs();
    wgmma_wait(sum);
    guard.start_over();
    const int warp = threadIdx.x / kWarpSize % kGroupWarps, g = threadIdx.x % kWarpSize / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < Tile::kBatch / 8; ++n) {
      float* const even = Sums::at(set, warpgroup(), 8 * n + 2 * c) + 16 * warp + g;
      float* const odd = Sums::at(set, warpgroup(), 8 * n + 2 * c + 1) + 16 * warp + g;
      even[0] = sum[4 * n], odd[0] = sum[4 * n + 1], even[8] = sum[4 * n + 2], odd[8] = sum[4 * n + 3];
    }
  }

 private:
  static constexpr int kGroupThreads = kGroupWarps * kWarpSize, kRowGroups = Tile::kBatch / 8;
  static constexpr int kStride = kPiece * kParts * kSplit;  // from a piece of a warpgroup to its next
  static constexpr int kLoads = Slices * kRowGroups;        // of 16 bytes, in flight together
  static_assert(kLoads <= 8);

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / kGroupThreads; }
  // Of a piece, the one that a lane reads.
  static __device__ __forceinline__ int lane_vector() {
    return threadIdx.x / kWarpSize % kGroupWarps * 4 + threadIdx.x % kWarpSize / 8;
  }
  static __device__ __forceinline__ void wgmma(float (&sum)[Tile::kBatch / 2], uint4 a, SharedMatrix b, bool adds) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      wgmma_bfloat16(sum, a, b, adds);
    } else {
      wgmma_float16(sum, a, b, adds);
    }
  }

  // Puts all slices where wgmma reads them, 0 for rows that are not live. Eight lanes have eight rows of
  // the same vector: they read four times 16 neighbouring bytes of each, and write 128 neighbouring ones.
  template <class From>
  static __device__ __forceinline__ void stage(const Weights& weights, From from, unsigned live, int depth,
                                               SpinGuard& guard) {
    const int k = lane_k(kSlices);
    uint4 numbers[kLoads];  // slice p, rows 8 * n to 8 * n + 7: p * kRowGroups + n
    const auto row = [&](int i) { return lane_row() + kRowStep * (i % kRowGroups); };
    const unsigned wanted =
        mask_of<kLoads>([&](int i) { return has_row(live, row(i)) && k + kStride * (i / kRowGroups) < depth; });
    const S* rows[kRowGroups];
#pragma unroll
    for (int n = 0; n < kRowGroups; ++n) rows[n] = from(n);
    const auto at = [&](int i) { return rows[i % kRowGroups] + kStride * (i / kRowGroups); };
    load_all<false, true>(numbers, wanted, at, guard);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      *reinterpret_cast<uint4*>(weights.staged() + (i / kRowGroups * kPiece / kVector + lane_vector()) * kVectorBytes +
                                row(i) * 16) = numbers[i];
  }
};

}  // namespace fastrnn::cuda
