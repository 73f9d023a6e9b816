// The work of one call of parallel() or team(), for whichever threads do it.
#pragma once

#include <atomic>
#include <thread>

namespace fastrnn::cpu {

// How the calling thread rounds and treats denormals (torch.set_flush_denormal). Workers take it over, or results would
// depend on who computes them.
#if defined(__x86_64__)
using FloatMode = unsigned;
inline FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
inline void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = unsigned long;
inline FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

struct Job {
  void (*run)(void*, int, int);
  void* context;
  int tasks;  // of parallel(), handed out one by one; -1: of team(), one piece for each worker
  std::atomic<int> next{0};
  const FloatMode mode = float_mode();

  void work(int worker, int count) {
    if (tasks < 0) return run(context, worker, count);
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(context, task, worker);
  }
};

// Does the job on up to `threads` threads: the calling one, worker 0, and others.
void run_job(int threads, Job& job);

// Spins for a while, then yields at every call.
class Patience {
 public:
  // About 30 us: a layer's next call often comes that soon, and waking a sleeping thread costs more.
  static constexpr int kSpins = 1000;

  static void spin() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void pause() {
    if (++spins_ < kSpins) {
      spin();
    } else {
      std::this_thread::yield();
    }
  }

 private:
  int spins_ = 0;
};

}  // namespace fastrnn::cpu
