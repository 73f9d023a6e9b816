#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include "job.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastrnn::cpu {

#ifdef _OPENMP
// On the threads of PyTorch's own operations, which spin for a while after each: a second pool would fight them for the
// cores. Nothing is linked against; the symbols are found in the OpenMP runtime that PyTorch has loaded.
namespace {

// The one thread that a forked child is left with has lost the workers of its OpenMP pool, and would wait for them for
// ever: it works alone.
thread_local bool has_forked = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { has_forked = true; });

}  // namespace

void run_job(int threads, Job& job) {
  if (has_forked) return job.work(0, 1);
#pragma omp parallel num_threads(threads)
  {
    const FloatMode before = float_mode();
    set_float_mode(job.mode);
    job.work(omp_get_thread_num(), omp_get_num_threads());  // there may be fewer than were asked for
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

void Barrier::wait(int worker, int count) {
  const long arrivals = slots_[worker].arrivals + 1;
  __atomic_store_n(&slots_[worker].arrivals, arrivals, __ATOMIC_RELEASE);
  Patience patience;
  for (int other = 0; other < count; ++other)
    while (__atomic_load_n(&slots_[other].arrivals, __ATOMIC_ACQUIRE) < arrivals) patience.pause();
}

}  // namespace fastrnn::cpu
