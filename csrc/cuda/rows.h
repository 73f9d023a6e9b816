// Which rows of a tile take part in a step, as words with a bit per row. Lane r of every warp watches row r.
#pragma once

#include "../layer.h"
#include "device.h"

namespace fastrnn::cuda {

struct Rows {
  int T, B;
  const int64_t* lengths;  // [B] or null: all T. Clamped to 0..T, since the host cannot check them without waiting
  const uint8_t* resets;   // [T, B] or null: none

  __device__ __forceinline__ int length(int b) const {
    if (b >= B) return 0;
    const int64_t n = lengths ? lengths[b] : T;
    return n < 0 ? 0 : n > T ? T : int(n);
  }
};

class RowWatch {
 public:
  RowWatch() = default;
  __device__ __forceinline__ RowWatch(const Rows& rows, int d, int group, int batch) : rows_(&rows), d_(d) {
    const int lane = threadIdx.x % kWarpSize;
    b_ = group * batch + lane;
    length_ = lane < batch ? rows.length(b_) : 0;
    any_ = __ballot_sync(kFullWarp, length_ > 0);
  }

  // What the row's restart at time t depends on, as loaded: a test right here would wait for it, and this is called a
  // pass ahead of its use.
  __device__ __forceinline__ uint8_t load_reset(int t) const {
    if (!rows_->resets || t < 0 || t >= length_) return 0;
    const int from = restart_time(d_, t, length_);
    return from < 0 ? uint8_t(0) : rows_->resets[size_t(from) * rows_->B + b_];
  }

  // Where all rows are as long as the sequence, no lane has to be asked.
  __device__ __forceinline__ unsigned active(int t) const {
    if (!rows_->lengths) return 0 <= t && t < rows_->T ? any_ : 0;
    return __ballot_sync(kFullWarp, 0 <= t && t < length_);
  }
  // Rows whose state at time t, if nothing restarts them, is the one they were given.
  __device__ __forceinline__ unsigned initial(int t) const {
    if (!rows_->lengths) return carried_time(d_, t, rows_->T) == kInitialState ? any_ : 0;
    return __ballot_sync(kFullWarp, carried_time(d_, t, length_) == kInitialState);
  }
  __device__ __forceinline__ unsigned restarted(uint8_t reset) const {
    return rows_->resets ? __ballot_sync(kFullWarp, reset != 0) : 0;
  }

  // The length of the longest row of the tile.
  __device__ __forceinline__ int longest() const {
    int most = length_;
    for (int other = kWarpSize / 2; other > 0; other /= 2) {
      const int theirs = __shfl_xor_sync(kFullWarp, most, other);
      most = theirs > most ? theirs : most;
    }
    return most;
  }

 private:
  const Rows* rows_;
  int d_, b_, length_;
  unsigned any_;  // rows of at least one step
};

__device__ __forceinline__ bool has_row(unsigned rows, int row) { return rows >> row & 1; }

}  // namespace fastrnn::cuda
