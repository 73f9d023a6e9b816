#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastrnn::cpu {
namespace {

// About 30 us of spinning: a layer's next call often comes that soon, and waking a sleeping thread costs more.
constexpr int kSpins = 1000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How the calling thread rounds and treats denormals (torch.set_flush_denormal). Workers take it over, or results would
// depend on who computes them.
#if defined(__x86_64__)
unsigned float_mode() { return __builtin_ia32_stmxcsr(); }
void set_float_mode(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
unsigned long float_mode() {
  unsigned long mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(unsigned long mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
int float_mode() { return 0; }
void set_float_mode(int) {}
#endif

// Spins for a while, then yields at every call.
class Patience {
 public:
  void pause() {
    if (++spins_ < kSpins) {
      fastrnn::cpu::pause();
    } else {
      std::this_thread::yield();
    }
  }

 private:
  int spins_ = 0;
};

// The work of one call: of `parallel`, tasks that are handed out one by one; of `team`, one piece for each worker.
struct Job {
  void (*run)(void*, int, int);
  void* context;
  int tasks;
  int team;  // size, or 0
  std::atomic<int> next{0};
  const decltype(float_mode()) mode = float_mode();

  void work(int worker) {
    if (team) return run(context, worker, team);
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(context, task, worker);
  }
};

// A thread with a letterbox. Whoever empties the box owns the job: the worker, or the poster who takes it back because
// all tasks were done before the worker woke up. (A team's workers are waited for.)
class Worker {
 public:
  explicit Worker(int index) : index_(index) {
    std::thread([this] { loop(); }).detach();
  }

  void post(Job* job) {
    busy_.store(true, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      box_.store(job, std::memory_order_release);
    }
    wake_.notify_one();
  }

  void finish(const Job& job) {
    if (!job.team && box_.exchange(nullptr, std::memory_order_acq_rel)) return;
    for (Patience patience; busy_.load(std::memory_order_acquire);) patience.pause();
  }

 private:
  void loop() {
    for (;;) {
      if (Job* job = take()) {
        set_float_mode(job->mode);
        job->work(index_);
        busy_.store(false, std::memory_order_release);
      }
    }
  }

  Job* take() {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (box_.load(std::memory_order_relaxed)) return box_.exchange(nullptr, std::memory_order_acq_rel);
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return box_.load(std::memory_order_relaxed) != nullptr; });
    return box_.exchange(nullptr, std::memory_order_acq_rel);
  }

  const int index_;
  std::atomic<Job*> box_{nullptr};
  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  void run(int threads, Job& job) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    const int helpers = lock.owns_lock() ? hire(threads - 1) : 0;
    if (job.team) job.team = helpers + 1;
    for (int i = 0; i < helpers; ++i) workers_[i]->post(&job);
    job.work(0);
    for (int i = 0; i < helpers; ++i) workers_[i]->finish(job);
  }

 private:
  // Up to `wanted` workers: as many as the system lets us start.
  int hire(int wanted) {
    try {
      while (int(workers_.size()) < wanted) workers_.push_back(std::make_unique<Worker>(int(workers_.size()) + 1));
    } catch (const std::system_error&) {
      wanted = int(workers_.size());
    }
    return wanted;
  }

  std::mutex mutex_;  // held by the call that uses the workers
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Never destroyed: its threads may outlive main's static objects. A forked child has none of them, and starts over.
Pool* pool = new Pool;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return int(std::thread::hardware_concurrency());
}

void parallel(int threads, int tasks, void (*run)(void*, int, int), void* context) {
  Job job{run, context, tasks, 0};
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    job.work(0);
  } else {
    pool->run(threads, job);
  }
}

void team(int threads, void (*run)(void*, int, int), void* context) {
  if (threads <= 1) return run(context, 0, 1);
  Job job{run, context, 0, threads};
  pool->run(threads, job);
}

void Barrier::wait(int worker, int count) {
  const long arrivals = slots_[worker].arrivals + 1;
  __atomic_store_n(&slots_[worker].arrivals, arrivals, __ATOMIC_RELEASE);
  Patience patience;
  for (int other = 0; other < count; ++other)
    while (__atomic_load_n(&slots_[other].arrivals, __ATOMIC_ACQUIRE) < arrivals) patience.pause();
}

}  // namespace fastrnn::cpu
