// How blocks hand numbers to each other in the middle of a launch: through the numbers themselves. The exchanged array
// is filled with 0xff bytes before the launch, each of its 32-bit words is written once, and a reader polls a word
// until it is no longer the sentinel. Nothing else needs to be ordered, since a reader uses only the word that it has
// checked:
//   1. a word has two values in its life, the sentinel (ordered before the kernel by the stream) and one store;
//   2. stores and loads of it are relaxed, of gpu scope, of the same 32 bits: no data race, no tearing, and coherence
//      says that what was seen once stays;
//   3. no number looks like the sentinel, a NaN that `without_sentinel` gives another bit pattern;
//   4. every step has an array of its own: nothing is overwritten, however far a block runs ahead.
// All blocks that meet must be resident at the same time: the launch is cooperative.
#pragma once

#include "number.h"

namespace fastrnn::cuda {

constexpr uint32_t kSentinel = 0xffffffffu;

__device__ __forceinline__ bool has_sentinel(uint4 v) {
  return v.x == kSentinel || v.y == kSentinel || v.z == kSentinel || v.w == kSentinel;
}
__device__ __forceinline__ uint32_t without_sentinel(uint32_t word) { return word == kSentinel ? 0x7fff7fffu : word; }
template <class S>
__device__ __forceinline__ S number_without_sentinel(S x) {
  if constexpr (kIs16Bit<S>) {
    return S{x.bits == 0xffff ? uint16_t(0x7fff) : x.bits};
  } else if constexpr (sizeof(S) == sizeof(uint32_t)) {
    return S{float_of(without_sentinel(bits_of(widen(x))))};
  } else {
    return x;
  }
}

// 16 bytes of numbers: of another block's, polled or at least never cached; or of this block's shared memory or of what
// was there before the launch.
template <bool Cluster, class S>
__device__ __forceinline__ uint4 load(const S* from) {
  if constexpr (Cluster) return *reinterpret_cast<const uint4*>(from);
  return load_relaxed(reinterpret_cast<const uint4*>(from));
}

// No wait without a way out. After `limit` ticks of the clock, or once another block has given up, waits end at once,
// the kernel runs to its end, and the launch fails.
class SpinGuard {
 public:
  __device__ __forceinline__ SpinGuard(uint32_t* status, uint32_t limit) : status_(status), limit_(limit) {}

  // Every so many polls it looks at the clock, and whether another block has given up.
  template <unsigned kSpinsPerLook>
  __device__ __forceinline__ bool may_wait() {
    if (expired_) return false;
    spin_hint();
    if (++spins_ % kSpinsPerLook == 0 && is_over(spins_ == kSpinsPerLook)) {
      store_relaxed(status_, 1u);
      expired_ = true;
    }
    return !expired_;
  }
  __device__ __forceinline__ void start_over() { spins_ = 0; }
  __device__ __forceinline__ bool expired() const { return expired_; }

 private:
  // A wait is timed from its first look. The clock may be set back.
  __device__ __forceinline__ bool is_over(bool is_first_look) {
    const uint32_t now = clock_ticks();
    if (is_first_look) begin_ = now;
    return int32_t(now - begin_) >= int32_t(limit_) || load_relaxed(status_) != 0;
  }

  uint32_t* status_;  // 0 before the launch
  uint32_t limit_, begin_ = 0, spins_ = 0;
  bool expired_ = false;
};

// A word with bit i for wanted(i).
template <int N, class Wanted>
__device__ __forceinline__ unsigned mask_of(Wanted wanted) {
  static_assert(N <= 32);
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (wanted(i)) mask |= 1u << i;
  return mask;
}

// `count` bits of a word from `first` on.
template <int count>
__device__ __forceinline__ unsigned part_of(uint32_t word, int first) {
  static_assert(0 < count && count <= 32);
  return word >> first & ~0u >> (32 - count);
}

// numbers[i] = the 16 bytes at(i) if bit i of `pending` is set, otherwise 0. All loads are in flight together; with
// Polls, those that found the sentinel are repeated. For whole warps: the vote keeps their lanes together, as products
// want them.
template <bool Cluster, bool Polls, int N, class At>
__device__ __forceinline__ void load_all(uint4 (&numbers)[N], unsigned pending, At at, SpinGuard& guard) {
  static_assert(N <= 32);
#pragma unroll
  for (int i = 0; i < N; ++i) numbers[i] = uint4{0, 0, 0, 0};
  do {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (pending >> i & 1) numbers[i] = load<Cluster>(at(i));
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!Polls || !has_sentinel(numbers[i])) pending &= ~(1u << i);
  } while (__any_sync(kFullWarp, pending && guard.may_wait<kPollsPerLook>()));
}

// The exchange described above. `publish` writes one unit's number where other blocks read it. All lanes of a warp call
// it together, neighbouring lanes with neighbouring units, an even lane with an even unit; `writes` is the same for
// both. 16-bit numbers are paired, since readers load words. A double is never polled for: kernels of double run one
// step a launch.
class GlobalExchange {
 public:
  __device__ __forceinline__ explicit GlobalExchange(SpinGuard& guard) : guard_(guard) {}

  template <class S>
  __device__ __forceinline__ void publish(S* to, S value, bool writes, int /*row*/, int /*k*/) {
    if constexpr (kIs16Bit<S>) {
      const uint32_t next = __shfl_down_sync(kFullWarp, uint32_t(value.bits), 1);
      if (writes && threadIdx.x % 2 == 0)
        store_relaxed(reinterpret_cast<uint32_t*>(to), without_sentinel(value.bits | next << 16));
    } else if constexpr (sizeof(S) == sizeof(uint32_t)) {
      if (writes) store_relaxed(reinterpret_cast<uint32_t*>(to), without_sentinel(bits_of(widen(value))));
    } else {
      if (writes) *to = value;
    }
  }

  __device__ __forceinline__ SpinGuard& guard() { return guard_; }
  // Around a pass: nothing but the numbers themselves.
  __device__ __forceinline__ void receive(bool /*from_others*/) {}
  __device__ __forceinline__ void expect(bool /*from_others*/, int /*rows*/) {}
  template <class S>
  __device__ __forceinline__ const S* received(const S* at, int /*row*/, int /*k*/) const {
    return at;
  }

 private:
  SpinGuard& guard_;
};

}  // namespace fastrnn::cuda
