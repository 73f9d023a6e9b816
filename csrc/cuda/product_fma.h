// The product of a step with fused multiply-adds, exact in float and double: partial sums of weights [kRows, depth]
// times the rows of a tile, K split over the warps and over eight lanes of each.
#pragma once

#include "exchange.h"
#include "tile.h"

namespace fastrnn::cuda {

// As MmaProduct; all resident weights are in registers.
template <class S, int Rows, class Tile_, int Slices>
struct FmaProduct {
  using Number = S;
  using Sum = S;
  using Tile = Tile_;
  static_assert(!kUsesMma<S> && Rows % 4 == 0);
  static constexpr int kRows = Rows, kVector = 16 / int(sizeof(S));  // numbers of a 16-byte load
  static constexpr int kLanesOfK = 8, kSlice = kLanesOfK * kVector;  // numbers of a row that a warp takes in at once
  static constexpr int kSlices = Slices, kSplit = 1, kParts = kWarps;
  static constexpr bool kResident = Slices > 0, kWgmma = false, kCluster = false, kPolls = kResident;
  static constexpr int kLaneRows = Rows / (kWarpSize / kLanesOfK);
  static constexpr int kSharedBytes = 0;
  static constexpr int kStride = kSlice * (kResident ? kWarps * kSplit : 1);  // from a slice of a warp to its next
  // Of streamed weights, as many rows as their sums fit in 32 registers: weights are read again for each turn.
  static constexpr int kTurn = fma_turn(kLaneRows, kSlices, Tile::kBatch, int(sizeof(S)));
  static constexpr int kGroup = fma_group(kSlices);  // slices whose loads are in flight together
  static_assert(Tile::kBatch % kTurn == 0 && Slices * kTurn <= 32);
  static constexpr int kSumRegisters = kLaneRows * int(sizeof(S)) / 4;                        // of a row
  static constexpr int kBlocks = kResident || kSumRegisters > 3 || Tile::kBatch > 4 ? 1 : 2;  // as in MmaProduct
  static constexpr bool kRoomy = kResident && Tile::kItems == 1;                              // as in MmaProduct
  using Sums = PartialSums<Sum, kRows, Tile::kBatch, kParts>;

  struct alignas(16) Vector {
    S at[kVector];
  };

  // The weight at `index` of a block's packed ones, [slice][row of a lane][lane][kVector]: row of the block and k.
  struct At {
    int row, k;
  };
  static __device__ __forceinline__ At packed_at(int index) {
    const int j = index % kVector, lane = index / kVector % kWarpSize, r = index / kVector / kWarpSize % kLaneRows;
    const int slice = dealt_out<kSlices, kWarps, kSplit>(index / kVector / kWarpSize / kLaneRows);
    return {lane / kLanesOfK * kLaneRows + r, kSlice * slice + lane % kLanesOfK * kVector + j};
  }

  static constexpr int kRowStep = 1;
  static __device__ __forceinline__ int lane_row() { return 0; }
  static __device__ __forceinline__ int lane_k(int slices) {
    return kSlice * first_slice<kSlices, kWarps, kSplit>(threadIdx.x / kWarpSize, slices) +
           kVector * int(threadIdx.x % kLanesOfK);
  }

  static __device__ __forceinline__ S operand(S weight) { return weight; }

  class Weights {
   public:
    __device__ __forceinline__ Weights(const void* packed, int slices, int depth, void* /*shared*/) : slices_(slices) {
      const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
      from_ = static_cast<const Vector*>(packed) + size_t(warp) * slices * kLaneRows * kWarpSize + lane;
      if constexpr (kResident) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held_[i] = from_[i * kWarpSize];
        within_ = mask_of<kSlices * kTurn>(
            [&](int i) { return i % kTurn == 0 && lane_k(slices) + kStride * (i / kTurn) < depth; });
        hold(within_);
      }
    }

    __device__ __forceinline__ Vector row(int slice, int r) const {
      const int i = slice * kLaneRows + r;
      if constexpr (kResident) return held_[i];
      return from_[size_t(i) * kWarpSize];
    }
    __device__ __forceinline__ int slices() const { return kResident ? kSlices : slices_; }
    __device__ __forceinline__ uint32_t within() const { return within_; }  // as in MmaProduct, kTurn bits a slice

   private:
    static constexpr int kHeld = kSlices * kLaneRows;
    Vector held_[kHeld > 0 ? kHeld : 1];
    const Vector* from_;
    int slices_;
    uint32_t within_ = 0;
  };

  template <class From, class LoadInputs>
  static __device__ __forceinline__ void multiply(const Weights& weights, From from, unsigned live, int depth, Sum* set,
                                                  SpinGuard& guard, LoadInputs load_inputs) {
    if (!kResident) load_inputs();
    // Rows are taken in turns of kTurn, whose numbers are loaded together.
#pragma unroll
    for (int row = 0; row < Tile::kBatch; row += kTurn) {
      S sum[kTurn][kLaneRows] = {};
      if (part_of<kTurn>(live, row) == 0) {  // for the whole warp: nothing to add
      } else if constexpr (kResident) {
#pragma unroll
        for (int first = 0; first < kSlices; first += kGroup)
          add_group(weights, from, live, depth, row, first, guard, sum);
      } else {
        for (int first = 0; first < weights.slices(); first += kGroup)
          add_group(weights, from, live, depth, row, first, guard, sum);
      }
      if (kResident && row + kTurn == Tile::kBatch) load_inputs();
#pragma unroll
      for (int n = 0; n < kTurn; ++n)
        reduce<kLaneRows, kLanesOfK / 2>(
            sum[n], Sums::at(set, threadIdx.x / kWarpSize, row + n) + threadIdx.x % kWarpSize / kLanesOfK * kLaneRows,
            true);
    }
    guard.start_over();
  }

 private:
  template <class From>
  static __device__ __forceinline__ void add_group(const Weights& weights, From from, unsigned live, int depth, int row,
                                                   int first, SpinGuard& guard, S (&sum)[kTurn][kLaneRows]) {
    uint4 x[kGroup * kTurn];  // slice p, row n of the turn: p * kTurn + n
    const unsigned rows_wanted = part_of<kTurn>(live, row);
    unsigned wanted;
    if constexpr (kResident) {
      wanted = part_of<kGroup * kTurn>(weights.within(), first * kTurn) * rows_wanted;
    } else {
      const int k = lane_k(weights.slices()) + kStride * first;
      wanted = mask_of<kGroup * kTurn>(
          [&](int i) { return has_row(rows_wanted, i % kTurn) && k + kStride * (i / kTurn) < depth; });
    }
    const S* rows[kTurn];
#pragma unroll
    for (int n = 0; n < kTurn; ++n) rows[n] = from(row + n);
    const auto at = [&](int i) { return rows[i % kTurn] + kStride * (first + i / kTurn); };
    load_all<false, kResident>(x, wanted, at, guard);
#pragma unroll
    for (int p = 0; p < kGroup; ++p)
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const Vector w = weights.row(first + p, r);
#pragma unroll
        for (int n = 0; n < kTurn; ++n) {
          S numbers[kVector];
          memcpy(numbers, &x[p * kTurn + n], sizeof numbers);
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum[n][r] = fma(w.at[j], numbers[j], sum[n][r]);
        }
      }
  }

  // Adds up N sums over the lanes of K and stores them from `to` on. While N is even, a lane keeps half of the sums and
  // sends the other half away; then all lanes keep all, and one of them stores.
  template <int N, int Step>
  static __device__ __forceinline__ void reduce(S (&sum)[N], Sum* to, bool stores) {
    const bool upper = threadIdx.x & Step;
    if constexpr (Step == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (stores) to[i] = sum[i];
    } else if constexpr (N % 2 == 0) {
      S half[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const S sent = upper ? sum[i] : sum[i + N / 2], kept = upper ? sum[i + N / 2] : sum[i];
        half[i] = kept + __shfl_xor_sync(kFullWarp, sent, Step);
      }
      reduce<N / 2, Step / 2>(half, upper ? to + N / 2 : to, stores);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], Step);
      reduce<N, Step / 2>(sum, to, stores && !upper);
    }
  }
};

}  // namespace fastrnn::cuda
