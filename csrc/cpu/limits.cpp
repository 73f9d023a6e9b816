// What this machine's multiply-add units can do at most: the ceiling that benchmarks print figures against.
#include <time.h>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace fastrnn::cpu::FASTRNN_ISA {
namespace {

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Independent chains of fused multiply-adds, as many as the GEMM keeps in registers.
template <class T>
__attribute__((noinline)) void multiply_adds(int64_t iterations, T* out) {
  constexpr int kChains = FASTRNN_REGISTERS * 3 / 4;
  using V = Vec<T>;
  V sum[kChains], a(T(0.999999)), b(T(1e-6));
#pragma GCC unroll 32
  for (int j = 0; j < kChains; ++j) sum[j] = V(T(j));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kChains; ++j) sum[j] = fma(sum[j], a, b);
  }
  for (int j = 0; j < kChains; ++j) store(out, j == 0 ? sum[0] : sum[j] + load(out));
}

template <class T>
double rate(int threads) {
  constexpr int64_t kIterations = 400000;
  constexpr double kFlops = 2.0 * kIterations * (FASTRNN_REGISTERS * 3 / 4) * Vec<T>::kLanes;
  double best = 0;
  for (int repeat = 0; repeat < 12; ++repeat) {
    const double start = seconds();
    parallel_for(threads, threads, [](int, int) {
      T out[Vec<T>::kLanes];
      multiply_adds<T>(kIterations, out);
      asm volatile("" : : "r"(out) : "memory");  // the sums are used, as far as the compiler knows
    });
    const double flops = kFlops * threads / (seconds() - start);
    if (flops > best) best = flops;
  }
  return best;
}

}  // namespace

double multiply_add_rate(DType dtype, int threads) {
  return dtype == DType::kFloat64 ? rate<double>(threads) : rate<float>(threads);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
