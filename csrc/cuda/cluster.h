// How the blocks of a cluster hand numbers to each other: each sends them to all others' shared memory, where a barrier
// counts the bytes (compute capability 9.0 and newer). For layers whose weights fit into one cluster.
//
// There are two slots, used in turns: a block that sends for pass p+2 has received everything of pass p+1, which was
// sent after the barrier of pass p+1, when all reads of the slot of pass p had happened. The next group of rows goes on
// with the slots: who sends in its first pass has received what was sent last for the group before. Every row of the
// tile that exists is sent in every pass, so that the count of bytes is always the same.
#pragma once

#include "exchange.h"

namespace fastrnn::cuda {

// The rows of a slot are pitched so that 8 rows of 64 bytes lie in different banks, if a row is a multiple of 128
// bytes.
FASTRNN_HD constexpr int slot_pitch(int depth, int number_bytes) { return depth * number_bytes + 64; }
FASTRNN_HD constexpr int mail_bytes(int batch, int depth, int number_bytes) {
  return 2 * int(sizeof(uint64_t)) + 2 * batch * slot_pitch(depth, number_bytes);
}

// Waits until the use of an inbox with this parity is complete.
__device__ __forceinline__ void wait_for(uint64_t* inbox, unsigned parity, SpinGuard& guard) {
  if (guard.expired()) return;
  while (!inbox_fills(inbox, parity))
    if (!guard.may_wait<kNapsPerLook>()) return;
  inbox_has_all(inbox, parity);
  guard.start_over();
}

class ClusterExchange {
 public:
  // `mail`: mail_bytes() of shared memory, at the same place in every block.
  __device__ __forceinline__ ClusterExchange(SpinGuard& guard, unsigned char* mail, int batch, int depth,
                                             int number_bytes)
      : guard_(guard),
        barriers_(reinterpret_cast<uint64_t*>(mail)),
        slots_(mail + 2 * sizeof(uint64_t)),
        pitch_(slot_pitch(depth, number_bytes)),
        slot_bytes_(batch * pitch_),
        row_bytes_(depth * number_bytes) {
    if (threadIdx.x == 0) inbox_init(barriers_), inbox_init(barriers_ + 1), inbox_publish();
    cluster_meet();
  }

  // Before a pass: waits for what was sent in the pass before, if anything was.
  __device__ __forceinline__ void receive(bool from_others) {
    if (!from_others) return;
    const unsigned slot = uses_ & 1, parity = uses_ >> 1 & 1;
    wait_for(barriers_ + slot, parity, guard_);
    current_ = slot;
    ++uses_;
  }

  // Before a pass publishes: whether the next pass will receive, and how many rows.
  __device__ __forceinline__ void expect(bool from_others, int rows) {
    sends_ = from_others && !guard_.expired();  // an inbox that was given up is not in order
    if (sends_ && threadIdx.x == 0) inbox_expect(barriers_ + (uses_ & 1), unsigned(rows * row_bytes_));
  }

  // Where a row's numbers from k on are that were received before this pass.
  template <class S>
  __device__ __forceinline__ const S* received(const S*, int row, int k) const {
    return reinterpret_cast<const S*>(slots_ + current_ * slot_bytes_ + row * pitch_) + k;
  }

  // As GlobalExchange::publish; besides, sends it to all blocks as number k of the row, unless k is below 0. 16 bytes
  // of neighbouring numbers travel together, each of the lanes that hold them serving some of the blocks.
  template <class S>
  __device__ __forceinline__ void publish(S* to, S value, bool writes, int row, int k) {
    constexpr int kLanes = 16 / int(sizeof(S));
    if (writes) *to = value;
    const int lane = threadIdx.x % kWarpSize, first = lane / kLanes * kLanes, mine = lane % kLanes;
    uint32_t words[4];
    if constexpr (kIs16Bit<S>) {
      const uint32_t pair = value.bits | __shfl_down_sync(kFullWarp, uint32_t(value.bits), 1) << 16;
      for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(kFullWarp, pair, first + 2 * i);
    } else {
      for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(kFullWarp, bits_of(widen(value)), first + i);
    }
    if (!writes || k < 0 || !sends_) return;
    unsigned char* const slot = slots_ + (uses_ & 1) * slot_bytes_ + row * pitch_;
    uint4* const at = reinterpret_cast<uint4*>(slot + (k - mine) * int(sizeof(S)));
    for (unsigned rank = unsigned(mine); rank < cluster_blocks(); rank += kLanes)
      send(at, barriers_ + (uses_ & 1), rank, uint4{words[0], words[1], words[2], words[3]});
  }

  __device__ __forceinline__ SpinGuard& guard() { return guard_; }

 private:
  SpinGuard& guard_;
  uint64_t* barriers_;
  unsigned char* slots_;
  int pitch_, slot_bytes_, row_bytes_;
  unsigned uses_ = 0;     // of slots so far, received; the next one received is that of uses_ & 1
  unsigned current_ = 0;  // the slot of this pass
  bool sends_ = false;
};

}  // namespace fastrnn::cuda
