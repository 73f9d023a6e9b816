#include "threads.h"

#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <climits>

#include "job.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastrnn::cpu {

#ifdef _OPENMP
// On the threads of PyTorch's own operations, which spin for a while after each: a second pool would fight them for the
// cores. Nothing is linked against; the symbols are found in the OpenMP runtime that PyTorch has loaded. All of them
// come, as they do to those operations, also where fewer are of use: GNU's runtime ends the threads that a parallel
// region leaves out, and starts others for the next one.
namespace {

// The one thread that a forked child is left with has lost the workers of its OpenMP pool, and would wait for them for
// ever: it works alone.
thread_local bool has_forked = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { has_forked = true; });

}  // namespace

void run_job(int threads, Job& job) {
  if (has_forked) return job.work(0, 1);
  const int all = std::max(threads, omp_get_max_threads());
#pragma omp parallel num_threads(all)
  if (omp_get_thread_num() < threads) {
    const FloatMode before = float_mode();
    set_float_mode(job.mode);
    job.work(omp_get_thread_num(), std::min(threads, omp_get_num_threads()));  // there may be fewer than asked for
    set_float_mode(before);
  }
}
#endif

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return int(std::thread::hardware_concurrency());
}

void parallel(int threads, int tasks, void (*run)(void*, int, int), void* context) {
  Job job{run, context, tasks};
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    job.work(0, 1);
  } else {
    run_job(threads, job);
  }
}

void team(int threads, void (*run)(void*, int, int), void* context) {
  if (threads <= 1) return run(context, 0, 1);
  Job job{run, context, -1};
  run_job(threads, job);
}

namespace {

// A thread that is late has most often lost its core to another program. The one that waits gives up its own core
// for it by sleeping: the scheduler moves a thread to an idle core at once, while a core that is only yielded stays
// taken, and may be given to that other program, for a slice of milliseconds.
#if defined(__linux__)
void sleep_while(const unsigned* word, unsigned value) {
  const timespec longest = {0, 1000000};
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &longest, nullptr, 0);
}
void wake_all(unsigned* word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
void sleep_while(const unsigned*, unsigned) { std::this_thread::yield(); }
void wake_all(unsigned*) {}
#endif

// About 0.15 ms. With 1000 small layers took up to 5 % longer on an idle machine, whose virtual cores pause now and
// then.
constexpr int kSpins = 5000;

}  // namespace

bool Barrier::has_arrived(const Slot& slot, unsigned arrivals) {
  return int(__atomic_load_n(&slot.arrivals, __ATOMIC_ACQUIRE) - arrivals) >= 0;
}

void Barrier::wait(int worker, int count) {
  Slot& own = slots_[worker];
  const unsigned arrivals = own.arrivals + 1;
  __atomic_store_n(&own.arrivals, arrivals, __ATOMIC_RELEASE);
  // There is no fence between the two, which every step would pay for: who begins to sleep in this very moment may be
  // missed, and wakes up by itself.
  if (__atomic_load_n(&own.sleepers, __ATOMIC_RELAXED)) wake_all(&own.arrivals);
  int spins = 0;
  for (int other = 0; other < count; ++other) {
    Slot& slot = slots_[other];
    while (!has_arrived(slot, arrivals) && ++spins < kSpins) Patience::spin();
    if (has_arrived(slot, arrivals)) continue;
    __atomic_fetch_add(&slot.sleepers, 1, __ATOMIC_RELAXED);
    while (!has_arrived(slot, arrivals)) sleep_while(&slot.arrivals, arrivals - 1);
    __atomic_fetch_sub(&slot.sleepers, 1, __ATOMIC_RELAXED);
  }
}

}  // namespace fastrnn::cpu
