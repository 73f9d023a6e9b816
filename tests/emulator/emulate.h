// Runs CUDA kernels on the CPU. csrc/cuda/device.h forwards to this when its compiler is not nvcc.
//
// A CUDA thread is a fiber: there is one thread of the operating system, the order is the same every time for a seed,
// and dead-locks are found. ThreadSanitizer sees a thread in each. The blocks of a cooperative launch are alive
// together; those of any other run one after the other, so that a kernel that counts on more than that fails.
//
// What orders memory here is what orders it on the GPU, and no more: __syncthreads and relaxed accesses by themselves.
// Shuffles, votes and mma exchange registers through words that carry their own tag, so that ThreadSanitizer still sees
// a missing barrier between a write to shared memory and another lane's read.
//
// Not emulated: masks of part of a warp, static shared memory, asynchronous copies, and a GPU's memory order
// beyond what ThreadSanitizer tells. mma adds in the order of k, in float.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulate {

// ---- what a test may set and read

struct Chip {
  int compute = 90, multiprocessors = 132, shared = 227 << 10;
};
inline Chip& chip() {
  static Chip it;
  return it;
}

struct Settings {
  unsigned seed = 0;               // the order of fibers: 0 ascending, 1 descending, others shuffled again and again
  uint32_t wait_limit = 1u << 24;  // in polls
  int lost_block = -1;             // this block of a cooperative launch never starts
  bool refuses = false;            // launches whose blocks must be resident together
};
inline Settings& settings() {
  static Settings it;
  return it;
}

// How many clusters of so many blocks are resident at once: none reaches from one part of the chip into the next, and
// parts have some multiprocessors more than 16.
inline int resident_clusters(int blocks) {
  constexpr int kPart = 16;
  const int n = chip().multiprocessors;
  return blocks == 1 || n < kPart ? n / blocks : n / kPart * (kPart / blocks);
}

// How often each kernel was launched.
inline std::map<void*, int64_t>& launches() {
  static std::map<void*, int64_t> it;
  return it;
}

// ---- threads, warps, blocks

constexpr unsigned kWarpLanes = 32, kMaxWords = 6;  // an mma publishes 4 + 2 words of a lane

struct Barrier {
  unsigned expected = 0;
  std::atomic<unsigned> arrived{0}, phase{0};
};

struct Warp {
  std::atomic<uint64_t> words[2][kWarpLanes][kMaxWords] = {};  // tag << 32 | value; two sets: see Collective
  Barrier barrier;
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::unique_ptr<Barrier[]> warpgroups;
  std::unique_ptr<Warp[]> warps;
  std::unique_ptr<uint4[]> shared;
  Block* cluster = nullptr;  // its first block; they lie side by side
  Barrier cluster_barrier;   // the first one's counts for all
};

// Products of a warpgroup that a thread has begun: where their sums go at the end, and what they have read.
struct BegunProducts {
  float* to = nullptr;
  std::vector<float> sums;
  std::vector<std::pair<const unsigned char*, uint64_t>> read;  // 8 numbers, and what they were
};

struct Task {  // one CUDA thread
  dim3 index;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0, collectives = 0;
  uint32_t ticks = 0;  // of its clock
  const char* waiting = "running";
  bool done = false;
  BegunProducts begun;
  Fiber fiber;
  std::minstd_rand random;  // when it yields at an access to exchanged memory
};

inline dim3 grid_size, block_size;
inline unsigned cluster_size = 1;
inline std::atomic<bool> abandoned{false};
// What may let another thread go on. Warp collectives do not count while somebody polls, since polling loops vote.
inline std::atomic<uint64_t> progress{0};
inline void made_progress() { progress.fetch_add(1, std::memory_order_relaxed); }

inline Task* current;
inline Fiber scheduler;
inline bool preempt = false;
inline std::atomic<bool> polled{false};
inline std::atomic<uint64_t> collectives{0};
inline std::atomic<const char*> failure{nullptr};
inline void count_collective() { collectives.fetch_add(1, std::memory_order_relaxed); }
inline void yield() { current->fiber.switch_to(scheduler); }
inline void maybe_yield() {  // at accesses to exchanged memory
  if (preempt && current->random() % 8 == 0) yield();
}
[[noreturn]] inline void fail(const char* what) {  // the scheduler throws; this fiber never runs again
  failure.store(what, std::memory_order_relaxed);
  for (;;) yield();
}

// Waits until `phase` is no longer `old`.
inline void wait_for_change(const char* what, std::atomic<unsigned>& phase, unsigned old) {
  current->waiting = what;
  while (phase.load(std::memory_order_relaxed) == old) yield();
  current->waiting = "running";
}

inline void nothing() {}

// `order` is what the barrier orders: acq_rel for __syncthreads, relaxed for what only exchanges registers. The last
// one to arrive calls `complete` before the others go on.
template <class Complete = void()>
void arrive_and_wait(Barrier& b, const char* what, std::memory_order order, const Complete& complete = nothing) {
  const bool orders = order == std::memory_order_acq_rel;
  const unsigned phase = b.phase.load(orders ? std::memory_order_acquire : order);
  if (b.arrived.fetch_add(1, order) + 1 == b.expected) {
    complete();
    b.arrived.store(0, std::memory_order_relaxed);
    b.phase.fetch_add(1, order);
  } else {
    wait_for_change(what, b.phase, phase);
    if (orders) b.phase.load(std::memory_order_acquire);
  }
}

// Publishes `count` words of this lane, waits until all lanes have done the same, and gives read(lane, word). Two sets
// are enough: a lane that publishes collective n+2 has seen every lane publish n+1, so all have finished reading n.
// The last lane calls complete(collective), which may write other words over those.
class Collective {
 public:
  Collective(uint8_t kind, const uint32_t* values, unsigned count)
      : Collective(kind, values, count, [](const Collective&) {}) {}
  template <class Complete>
  Collective(uint8_t kind, const uint32_t* values, unsigned count, const Complete& complete)
      : tag_(++current->collectives << 8 | kind), words_(current->warp->words[current->collectives & 1]) {
    for (unsigned i = 0; i < count; ++i) write(current->lane, i, values[i]);
    count_collective();
    arrive_and_wait(current->warp->barrier, "warp collective", std::memory_order_relaxed, [&] { complete(*this); });
  }

  void write(unsigned lane, unsigned word, uint32_t value) const {
    words_[lane][word].store(uint64_t(tag_) << 32 | value, std::memory_order_relaxed);
  }

  uint32_t read(unsigned lane, unsigned word) const {
    const uint64_t w = words_[lane][word].load(std::memory_order_relaxed);
    if (uint32_t(w >> 32) != tag_) fail("lanes of a warp run different collectives");
    return uint32_t(w);
  }

 private:
  uint32_t tag_;  // which collective of this warp, and of which kind
  std::atomic<uint64_t> (*words_)[kMaxWords];
};

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("only full-warp masks are emulated");
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  constexpr unsigned kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0 && kWords <= 2);
  check_mask(mask);
  uint32_t bits[kWords];
  std::memcpy(bits, &value, sizeof value);
  const Collective all(1, bits, kWords);
  for (unsigned i = 0; i < kWords; ++i) bits[i] = all.read(source < kWarpLanes ? source : current->lane, i);
  std::memcpy(&value, bits, sizeof value);
  return value;
}

inline uint32_t ballot(unsigned mask, bool predicate) {
  check_mask(mask);
  const uint32_t mine = predicate;
  const Collective all(2, &mine, 1);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) votes |= all.read(lane, 0) << lane;
  return votes;
}

// ---- numbers

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of_bfloat16(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

inline float float_of_half(uint16_t bits) {
  const uint32_t rest = bits & 0x7fff;
  // As float32 the same bits have an exponent that is too small by 127 - 15; subnormal ones, too.
  const float magnitude = rest < 0x7c00 ? float_of_bits(rest << 13) * 0x1p112f : rest == 0x7c00 ? INFINITY : NAN;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even; NaN becomes 0x7fff, as cvt.rn does.
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_of(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(double(x));
  if (magnitude >= 65520) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const auto steps = uint32_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // of 2^(exponent - 10)
  return sign | uint16_t(steps + (magnitude < 0x1p-14 ? 0 : uint32_t(exponent + 14) << 10));
}

// The two 16-bit numbers of a word.
template <float (*widen)(uint16_t)>
void widen_pair(float* to, uint32_t word) {
  to[0] = widen(uint16_t(word)), to[1] = widen(uint16_t(word >> 16));
}

// The register layout is described in csrc/cuda/device.h.
template <float (*widen)(uint16_t)>
void mma(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1, uint8_t kind) {
  const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  // One lane multiplies for all of them, since each number is widened once then.
  const Collective sums(kind, mine, 6, [](const Collective& all) {
    float rows[2][8][16], columns[8][16];
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      for (unsigned upper = 0; upper < 2; ++upper) {
        const unsigned k = upper * 8 + lane % 4 * 2;
        for (unsigned i = 0; i < 2; ++i) widen_pair<widen>(&rows[i][lane / 4][k], all.read(lane, 2 * upper + i));
        widen_pair<widen>(&columns[lane / 4][k], all.read(lane, 4 + upper));
      }
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        float sum = 0;
        for (unsigned k = 0; k < 16; ++k) sum += rows[i / 2][lane / 4][k] * columns[lane % 4 * 2 + i % 2][k];
        all.write(lane, i, bits_of(sum));
      }
    }
  });
  for (unsigned i = 0; i < 4; ++i) d[i] += float_of_bits(sums.read(current->lane, i));
}
inline void mma_bfloat16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) { mma<float_of_bfloat16>(d, a, b0, b1, 3); }
inline void mma_float16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) { mma<float_of_half>(d, a, b0, b1, 4); }

// To nearest, ties away from 0.
inline uint32_t to_tf32(uint32_t bits) {
  return std::isnan(float_of_bits(bits)) ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
}

inline void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  const Collective lanes(5, mine, 6);
  const auto cut = [](uint32_t bits) { return float_of_bits(bits & ~0x1fffu); };
  const unsigned g = current->lane / 4, c = current->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    float sum = 0;
    for (unsigned k = 0; k < 8; ++k)
      sum +=
          cut(lanes.read(g * 4 + k % 4, 2 * (k / 4) + i / 2)) * cut(lanes.read((2 * c + i % 2) * 4 + k % 4, 4 + k / 4));
    d[i] += sum;
  }
}

// ---- warpgroups

struct SharedMatrix {  // described in csrc/cuda/device.h
  const unsigned char* at;
  int vector_bytes, rows_bytes;

  const unsigned char* vector(unsigned row, unsigned i) const {
    return at + row / 8 * unsigned(rows_bytes) + row % 8 * 16 + i * unsigned(vector_bytes);
  }
};

inline void warpgroup_meet(int warpgroup) {
  made_progress();
  arrive_and_wait(current->block->warpgroups[unsigned(warpgroup)], "warpgroup_meet", std::memory_order_acq_rel);
}

inline uint64_t hash(const unsigned char* vector) {
  uint64_t words[2];
  std::memcpy(words, vector, sizeof words);
  return (words[0] * 0x9e3779b97f4a7c15u) ^ words[1];
}

// What a warp computes of the product, now; but its sums arrive when wgmma_wait is called, are NaN until then, and what
// it has read must not change until then.
template <float (*widen)(uint16_t), size_t N>
void wgmma(float (&d)[N], uint4 a, SharedMatrix b, bool adds, uint8_t kind) {
  BegunProducts& begun = current->begun;
  if (begun.to && begun.to != d) fail("sums of a product that were not waited for");
  if (!begun.to) begun.to = d, begun.sums.assign(d, d + N);
  std::fill(d, d + N, NAN);
  const uint32_t mine[4] = {a.x, a.y, a.z, a.w};
  const Collective lanes(kind, mine, 4);
  const unsigned g = current->lane / 4, c = current->lane % 4;
  float rows[2][16];
  for (unsigned k = 0; k < 16; k += 2)
    for (unsigned j = 0; j < 2; ++j) widen_pair<widen>(&rows[j][k], lanes.read(g * 4 + k % 8 / 2, 2 * (k / 8) + j));
  for (unsigned i = 0; i < N; ++i) {
    const unsigned column = i / 4 * 8 + 2 * c + i % 2;
    float sum = 0;
    for (unsigned vector = 0; vector < 2; ++vector) {
      uint16_t numbers[8];
      std::memcpy(numbers, b.vector(column, vector), sizeof numbers);
      begun.read.emplace_back(b.vector(column, vector), hash(b.vector(column, vector)));
      for (unsigned k = 0; k < 8; ++k) sum += rows[i % 4 / 2][8 * vector + k] * widen(numbers[k]);
    }
    begun.sums[i] = adds ? begun.sums[i] + sum : sum;
  }
}

inline void wgmma_wait(float* d) {
  BegunProducts& begun = current->begun;
  if (begun.to != d) fail("a wait for sums that no product makes");
  for (const auto& [vector, before] : begun.read)
    if (hash(vector) != before) fail("shared memory changed while a product read it");
  std::copy(begun.sums.begin(), begun.sums.end(), d);
  begun = {};
}

// ---- memory that blocks exchange

inline uint32_t load_relaxed(const uint32_t* p) {
  maybe_yield();
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(p)).load(std::memory_order_relaxed);
}
inline uint4 load_relaxed(const uint4* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(uint4)) fail("a 16-byte load from an address that is not aligned");
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p);
  return {load_relaxed(w), load_relaxed(w + 1), load_relaxed(w + 2), load_relaxed(w + 3)};
}
inline void store_relaxed(uint32_t* p, uint32_t v) {
  maybe_yield();
  std::atomic_ref<uint32_t>(*p).store(v, std::memory_order_relaxed);
  made_progress();
}

// ---- clusters: neighbouring blocks in x

inline unsigned cluster_blocks() { return cluster_size; }
inline void cluster_meet() {
  made_progress();
  arrive_and_wait(current->block->cluster->cluster_barrier, "cluster_meet", std::memory_order_acq_rel);
}

// A barrier that counts bytes: bits 0 to 31 the bytes that are still to come (fewer than 0: they came before they were
// announced), bit 32 whether somebody has arrived, bit 33 the phase.
constexpr uint64_t kArrived = uint64_t(1) << 32, kPhase = uint64_t(1) << 33;

inline void inbox_change(uint64_t* barrier, bool arrives, int bytes) {
  std::atomic_ref<uint64_t> word(*barrier);
  uint64_t old = word.load(std::memory_order_relaxed), next;
  do {
    if (arrives && (old & kArrived)) fail("a barrier of an inbox is announced twice");
    const uint32_t pending = uint32_t(old) + uint32_t(bytes);
    next = (old & ~uint64_t(0xffffffff)) | pending | (arrives ? kArrived : 0);
    if ((next & kArrived) && pending == 0) next = (next ^ kPhase) & ~kArrived;
  } while (!word.compare_exchange_weak(old, next, std::memory_order_acq_rel));
  made_progress();
}
inline void inbox_init(uint64_t* barrier) { *barrier = 0; }
inline void inbox_expect(uint64_t* barrier, unsigned bytes) { inbox_change(barrier, true, int(bytes)); }
inline bool inbox_has_all(uint64_t* barrier, unsigned parity) {
  maybe_yield();
  return (std::atomic_ref<uint64_t>(*barrier).load(std::memory_order_acquire) & kPhase ? 1u : 0u) != parity;
}
inline void send(uint4* to, uint64_t* barrier, unsigned rank, uint4 value) {
  const auto there = [&](void* here) {
    return reinterpret_cast<char*>(current->block->cluster[rank].shared.get()) +
           (static_cast<char*>(here) - reinterpret_cast<char*>(current->block->shared.get()));
  };
  if (rank >= cluster_blocks()) fail("a message to a block outside of the cluster");
  if (cluster_blocks() < 2) fail("a message in a cluster of one block");  // undefined on a GPU
  auto* const words = reinterpret_cast<uint32_t*>(there(to));
  if (reinterpret_cast<uintptr_t>(words) % sizeof(uint4)) fail("a message to an address that is not aligned");
  store_relaxed(words, value.x), store_relaxed(words + 1, value.y);
  store_relaxed(words + 2, value.z), store_relaxed(words + 3, value.w);
  inbox_change(reinterpret_cast<uint64_t*>(there(barrier)), false, -int(sizeof(uint4)));
}

// In a polling loop: lets the others run.
inline void spin_hint() {
  current->waiting = "polling global memory";
  polled.store(true, std::memory_order_relaxed);
  yield();
  current->waiting = "running";
}

// A thread's clock is how often it has looked at it: a wait is as long as its polls, however fast this machine is.
inline uint32_t clock_ticks() { return ++current->ticks; }

inline void abandon() { abandoned.store(true, std::memory_order_relaxed); }

// ---- running

inline const std::function<void()>* entry;
// They order what was before a launch, its threads, and what comes after it: two, or a thread that ends would be before
// one that has not begun.
inline std::atomic<bool> launched{false};
inline std::atomic<size_t> alive{0};

// What a fiber runs. It is never resumed after its last switch.
inline void run_task() {
  launched.load(std::memory_order_acquire);
  (*entry)();
  current->done = true;
  made_progress();
  alive.fetch_sub(1, std::memory_order_release);
  yield();
}

// Goes around the tasks until all are done.
EMULATE_UNWATCHED inline void schedule(std::vector<Task>& tasks, std::vector<unsigned>& order, std::mt19937& random) {
  for (int idle = 0; alive.load(std::memory_order_relaxed);) {
    const uint64_t before = progress.load(), collectives_before = collectives;
    polled = false;
    if (preempt) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      if (tasks[i].done) continue;
      current = &tasks[i];
      scheduler.switch_to(current->fiber);
      if (const char* what = failure) throw std::runtime_error(std::string("emulate: ") + what);
    }
    idle = progress.load() == before && (polled || collectives == collectives_before) ? idle + 1 : 0;
    if (idle > 200000) throw std::runtime_error("emulate: no thread makes progress: dead-lock");
  }
}

inline void run(std::vector<Task>& tasks, const std::function<void()>& kernel) {
  const unsigned seed = settings().seed;
  entry = &kernel;
  preempt = seed > 1;
  failure = nullptr;
  std::vector<unsigned> order(tasks.size());
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 1) std::reverse(order.begin(), order.end());
  scheduler.adopt();
  size_t count = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    tasks[i].random.seed(unsigned(seed + i));
    tasks[i].fiber.start(i, run_task);
    count += !tasks[i].done;
  }
  alive.store(count, std::memory_order_relaxed);
  launched.store(true, std::memory_order_release);
  std::mt19937 random(seed);
  schedule(tasks, order, random);
  alive.load(std::memory_order_acquire);
}

// Shared memory that nobody has written reads as NaN.
inline void make_block(Block& block, dim3 grid, unsigned index, unsigned threads, size_t shared, Task* tasks) {
  block.index = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
  block.barrier.expected = threads;
  block.warpgroups.reset(new Barrier[threads / 128]);
  for (unsigned i = 0; i < threads / 128; ++i) block.warpgroups[i].expected = 128;
  block.warps.reset(new Warp[threads / kWarpLanes]);
  for (unsigned i = 0; i < threads / kWarpLanes; ++i) block.warps[i].barrier.expected = kWarpLanes;
  block.shared.reset(new uint4[(shared + 15) / 16]);
  std::memset(static_cast<void*>(block.shared.get()), 0xff, (shared + 15) / 16 * 16);
  for (unsigned i = 0; i < threads; ++i) {
    Task& t = tasks[i];
    t.index = dim3(i);
    t.block = &block;
    t.warp = &block.warps[i / kWarpLanes];
    t.lane = i % kWarpLanes;
  }
}

// `name`: the kernel's address; `together`: all blocks are resident at once; `cluster`: neighbours in x are.
inline void launch(void* name, dim3 grid, unsigned threads, size_t shared, bool together, unsigned cluster,
                   const std::function<void()>& kernel) {
  if (grid.x * grid.y * grid.z == 0) throw std::runtime_error("emulate: a launch without blocks");
  if (grid.x % cluster != 0) throw std::runtime_error("emulate: a cluster without all of its blocks");
  if (shared > size_t(chip().shared)) throw std::runtime_error("emulate: more shared memory than a block may have");
  const unsigned blocks = grid.x * grid.y * grid.z;
  if (together && (int(blocks) > chip().multiprocessors || int(blocks / cluster) > resident_clusters(int(cluster))))
    throw std::runtime_error("emulate: more blocks than can be resident");
  ++launches()[name];
  grid_size = grid;
  block_size = dim3(threads);
  abandoned = false;
  cluster_size = cluster;
  const unsigned at_once = together ? blocks : cluster;
  for (unsigned first = 0; first < blocks; first += at_once) {
    std::vector<Block> all(at_once);
    std::vector<Task> tasks(size_t(at_once) * threads);
    for (unsigned i = 0; i < at_once; ++i) {
      make_block(all[i], grid, first + i, threads, shared, &tasks[size_t(i) * threads]);
      all[i].cluster = &all[i - all[i].index.x % cluster];
      all[i].cluster_barrier.expected = threads * cluster;
      if (together && int(first + i) == settings().lost_block)
        for (unsigned j = 0; j < threads; ++j) tasks[size_t(i) * threads + j].done = true;
    }
    run(tasks, kernel);
  }
  if (abandoned) throw std::runtime_error("emulate: the kernel gave up waiting");
}

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(current->block->shared.get()); }

}  // namespace emulate

#define threadIdx (emulate::current->index)
#define blockIdx (emulate::current->block->index)
#define blockDim (emulate::block_size)
#define gridDim (emulate::grid_size)

inline void __syncthreads() {
  emulate::made_progress();
  emulate::arrive_and_wait(emulate::current->block->barrier, "__syncthreads", std::memory_order_acq_rel);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, unsigned x) {
  return emulate::shuffle(mask, v, emulate::current->lane ^ x);
}
template <class T>
T __shfl_sync(unsigned mask, T v, unsigned lane) {
  return emulate::shuffle(mask, v, lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned n) {
  return emulate::shuffle(mask, v, emulate::current->lane + n);
}
inline unsigned __ballot_sync(unsigned mask, bool p) { return emulate::ballot(mask, p); }
inline int __any_sync(unsigned mask, bool p) { return emulate::ballot(mask, p) != 0; }
