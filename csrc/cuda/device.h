// The operations below CUDA C++ that the kernels use, and how a kernel is launched. Under nvcc they are PTX and the
// CUDA runtime; any other compiler takes them from emulate.h, which runs kernels on the CPU (tests/emulator).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "emulate.h"
#endif

#include "../host_device.h"
#include "stream.h"

namespace fastrnn::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kSectorBytes = 32;  // what memory and L2 move at once

#ifdef __CUDACC__

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastrnn_shared[];
  return fastrnn_shared;
}

// d[16x8] += a[16x16] b[16x8] in float, of two bfloat16 or two float16 per word. With g = lane / 4 and c = lane % 4,
// and two neighbouring k in a word:
//   a[0..3]: (row g, k 2c) (row g+8, k 2c) (row g, k 2c+8) (row g+8, k 2c+8)
//   b[0..1]: (k 2c, column g) (k 2c+8, column g)
//   d[0..3]: (row g, column 2c) (row g, column 2c+1) (row g+8, column 2c) (row g+8, column 2c+1)
// All lanes of the warp must call it together.
__device__ __forceinline__ void mma_bfloat16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_float16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// d[16x8] += a[16x8] b[8x8] of TF32, which ignores the lower 13 bits of a float:
//   a[0..3]: (row g, k c) (row g+8, k c) (row g, k c+4) (row g+8, k c+4);  b[0..1]: (k c, column g) (k c+4, column g)
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The bits of a float rounded to TF32, to nearest.
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0,%1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// Accesses to memory that other blocks read or write during the launch. PTX takes a vector access for separate accesses
// of its elements in no particular order: each 32-bit word is atomic by itself, the vector is not.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}

// Numbers that are read or written once in a launch: they need not stay in the L2, where what blocks exchange shall.
// 16 bits come as a whole register: the compiler would wait for a half of one, to move it, long before it is used.
__device__ __forceinline__ uint32_t load_once(const uint16_t* p) {
  uint32_t v;
  asm volatile("ld.global.cs.u16 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_once(const uint32_t* p) { return __ldcs(p); }
__device__ __forceinline__ uint64_t load_once(const uint64_t* p) {
  return __ldcs(reinterpret_cast<const unsigned long long*>(p));
}
__device__ __forceinline__ void store_once(uint16_t* p, uint16_t v) { __stcs(p, v); }
__device__ __forceinline__ void store_once(uint32_t* p, uint32_t v) { __stcs(p, v); }
__device__ __forceinline__ void store_once(uint64_t* p, uint64_t v) {
  __stcs(reinterpret_cast<unsigned long long*>(p), v);
}
// The compiler keeps the number in a register instead of making it anew wherever it is used.
__device__ __forceinline__ void hold(int64_t& n) { asm("" : "+l"(n)); }
__device__ __forceinline__ void hold(uint32_t& n) { asm("" : "+r"(n)); }
// In a branch: the compiler computes nothing of what depends on the number before it.
__device__ __forceinline__ void only_here(int& n) { asm volatile("" : "+r"(n)); }
// Brings a sector into the L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- clusters, from compute capability 9.0 on: blocks that reach each other's shared memory

__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned n;
  asm("mov.u32 %0,%%cluster_nctarank;" : "=r"(n));
  return n;
}
// All threads of all blocks of the cluster meet; what each has written before, the others see after.
__device__ __forceinline__ void cluster_meet() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A barrier in shared memory that opens when one thread has arrived and all announced bytes have come.
__device__ __forceinline__ void inbox_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(shared_address(barrier)) : "memory");
}
// Before other blocks may use what inbox_init has made; cluster_meet must follow.
__device__ __forceinline__ void inbox_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and announces so many bytes.
__device__ __forceinline__ void inbox_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Whether the use of the given parity (0 for the first one, then in turns) is complete: first asked again and again,
// asleep in between for a while that the hardware chooses, then once such that what was sent is seen. (PTX ISA 8.0:
// try_wait.relaxed. To acquire in every poll empties the L1 in every poll.)
#define FASTRNN_INBOX(name, instruction)                                     \
  __device__ __forceinline__ bool name(uint64_t* barrier, unsigned parity) { \
    uint32_t complete;                                                       \
    asm volatile(                                                            \
        "{.reg .pred p;\n"                                                   \
        "mbarrier." instruction                                              \
        ".cluster.shared::cta.b64 p,[%1],%2;\n"                              \
        "selp.u32 %0,1,0,p;}"                                                \
        : "=r"(complete)                                                     \
        : "r"(shared_address(barrier)), "r"(parity)                          \
        : "memory");                                                         \
    return complete;                                                         \
  }
FASTRNN_INBOX(inbox_fills, "try_wait.parity.relaxed")
FASTRNN_INBOX(inbox_has_all, "test_wait.parity.acquire")
#undef FASTRNN_INBOX
// Writes to where `to` is in block `rank` of the cluster, and tells `barrier` there that 16 bytes have come.
__device__ __forceinline__ void send(uint4* to, uint64_t* barrier, unsigned rank, uint4 value) {
  asm volatile(
      "{.reg .b32 to, barrier;\n"
      "mapa.shared::cluster.u32 to,%0,%2;\n"
      "mapa.shared::cluster.u32 barrier,%1,%2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to],{%3,%4,%5,%6},[barrier];}" ::"r"(
          shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// ---- warpgroups, of compute capability 9.0 alone: four warps whose tensor cores work on one product

// Numbers of 16 bits in shared memory, [rows, 16]: vectors of 8 neighbouring numbers of a row, those of eight rows in
// one piece of 128 bytes ("core matrix"). `vector_bytes` from one vector of a row to its second, `rows_bytes` from
// eight rows to the next eight; all in steps of 16. PTX manual, "Shared memory matrix layout", K-major without
// swizzling.
using SharedMatrix = uint64_t;
__device__ __forceinline__ SharedMatrix shared_matrix(const void* at, int vector_bytes, int rows_bytes) {
  const auto field = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffff) >> 4); };
  return field(shared_address(at)) | field(uint32_t(vector_bytes)) << 16 | field(uint32_t(rows_bytes)) << 32;
}
// All threads of a warpgroup meet.
__device__ __forceinline__ void warpgroup_meet(int warpgroup) {
  asm volatile("bar.sync %0,128;" ::"r"(1 + warpgroup) : "memory");
}
// After a thread's stores to shared memory that wgmma is to read, before the threads meet.
__device__ __forceinline__ void shared_written_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Before the first wgmma after registers were written that it takes.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// After the last one that wgmma_wait is to wait for.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// d[64x32] = a[64x16] b[32x16]^T, plus d if `adds`, in float, begun: a, d, and b in memory may change after
// wgmma_wait. Of a and d, a warp has 16 rows, warp w of the four from 16w on, as in mma; d[4n..4n+3]: columns 8n to
// 8n+7.
#define FASTRNN_WGMMA(name, type)                                                                                     \
  __device__ __forceinline__ void name(float (&d)[16], uint4 a, SharedMatrix b, bool adds) {                          \
    asm volatile(                                                                                                     \
        "{.reg .pred adds;\n"                                                                                         \
        "setp.ne.b32 adds,%21,0;\n"                                                                                   \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                   \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,adds,1,1,0;}"                 \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                    \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(int(adds)));                                            \
  }
FASTRNN_WGMMA(wgmma_bfloat16, "bf16")
FASTRNN_WGMMA(wgmma_float16, "f16")
#undef FASTRNN_WGMMA

// Waits for all products that this thread has begun.
__device__ __forceinline__ void wgmma_wait(float (&d)[16]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                 "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
               :
               : "memory");
}

// Inside every polling loop: nothing to do but to poll again.
__device__ __forceinline__ void spin_hint() {}

// About a millisecond each, 2^20 ns. Who polls memory looks at the clock now and then, who waits for mail, asleep
// between two questions, more often.
constexpr unsigned kPollsPerLook = 1024, kNapsPerLook = 16;
__device__ __forceinline__ uint32_t clock_ticks() {
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(nanoseconds));
  return uint32_t(nanoseconds >> 20);
}

// Ends the launch with an error that the next synchronizing call reports, and with it this process's use of the device.
__device__ __forceinline__ void abandon() { __trap(); }

#else

inline unsigned char* shared_memory() { return emulate::shared_memory(); }
inline void mma_bfloat16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) { emulate::mma_bfloat16(d, a, b0, b1); }
inline void mma_float16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) { emulate::mma_float16(d, a, b0, b1); }
inline void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) { emulate::mma_tf32(d, a, b0, b1); }
inline uint32_t to_tf32(uint32_t bits) { return emulate::to_tf32(bits); }
inline uint32_t load_relaxed(const uint32_t* p) { return emulate::load_relaxed(p); }
inline uint4 load_relaxed(const uint4* p) { return emulate::load_relaxed(p); }
inline void store_relaxed(uint32_t* p, uint32_t v) { emulate::store_relaxed(p, v); }
inline uint32_t load_once(const uint16_t* p) { return *p; }
inline uint32_t load_once(const uint32_t* p) { return *p; }
inline uint64_t load_once(const uint64_t* p) { return *p; }
template <class Word>
inline void store_once(Word* p, Word v) {
  *p = v;
}
inline void hold(int64_t&) {}
inline void hold(uint32_t&) {}
inline void only_here(int&) {}
inline void prefetch(const void*) {}
inline unsigned cluster_blocks() { return emulate::cluster_blocks(); }
inline void cluster_meet() { emulate::cluster_meet(); }
inline void inbox_init(uint64_t* barrier) { emulate::inbox_init(barrier); }
inline void inbox_publish() {}
inline void inbox_expect(uint64_t* barrier, unsigned bytes) { emulate::inbox_expect(barrier, bytes); }
inline bool inbox_fills(uint64_t* barrier, unsigned parity) { return emulate::inbox_has_all(barrier, parity); }
inline bool inbox_has_all(uint64_t* barrier, unsigned parity) { return emulate::inbox_has_all(barrier, parity); }
inline void send(uint4* to, uint64_t* barrier, unsigned rank, uint4 value) { emulate::send(to, barrier, rank, value); }
using SharedMatrix = emulate::SharedMatrix;
inline SharedMatrix shared_matrix(const void* at, int vector_bytes, int rows_bytes) {
  return {static_cast<const unsigned char*>(at), vector_bytes, rows_bytes};
}
inline void warpgroup_meet(int warpgroup) { emulate::warpgroup_meet(warpgroup); }
inline void shared_written_for_wgmma() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
inline void wgmma_bfloat16(float (&d)[16], uint4 a, SharedMatrix b, bool adds) {
  emulate::wgmma<emulate::float_of_bfloat16>(d, a, b, adds, 6);
}
inline void wgmma_float16(float (&d)[16], uint4 a, SharedMatrix b, bool adds) {
  emulate::wgmma<emulate::float_of_half>(d, a, b, adds, 7);
}
inline void wgmma_wait(float (&d)[16]) { emulate::wgmma_wait(d); }
inline void spin_hint() { emulate::spin_hint(); }
constexpr unsigned kPollsPerLook = 1, kNapsPerLook = 1;
inline uint32_t clock_ticks() { return emulate::clock_ticks(); }
inline void abandon() { emulate::abandon(); }

#endif

// tanh to about 2^-11, a quarter of the rounding error of bfloat16 (PTX manual, tanh.approx.f32).
FASTRNN_HD static inline float tanh_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("tanh.approx.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::tanhf(x);
#endif
}

}  // namespace fastrnn::cuda
