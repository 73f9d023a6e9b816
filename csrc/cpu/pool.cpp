// Threads of our own, where PyTorch has no OpenMP whose threads could be used (threads.cpp), and under ThreadSanitizer,
// which does not see how OpenMP's threads meet.
#ifndef _OPENMP
#include <pthread.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <vector>

#include "job.h"

namespace fastrnn::cpu {
namespace {

struct Letter {
  Job* job;
  int count;  // of workers
};

// A thread with a letterbox. Whoever empties the box owns the letter: the worker, or the poster who takes it back
// because all tasks were done before the worker woke up. (A team's workers are waited for.)
class Worker {
 public:
  explicit Worker(int index) : index_(index) {
    std::thread([this] { loop(); }).detach();
  }

  void post(Letter* letter) {
    busy_.store(true, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      box_.store(letter, std::memory_order_release);
    }
    wake_.notify_one();
  }

  void finish(const Job& job) {
    if (job.tasks >= 0 && box_.exchange(nullptr, std::memory_order_acq_rel)) return;
    for (Patience patience; busy_.load(std::memory_order_acquire);) patience.pause();
  }

 private:
  void loop() {
    for (;;) {
      if (const Letter* letter = take()) {
        set_float_mode(letter->job->mode);
        letter->job->work(index_, letter->count);
        busy_.store(false, std::memory_order_release);
      }
    }
  }

  Letter* take() {
    for (int spins = 0; spins < Patience::kSpins; ++spins) {
      if (box_.load(std::memory_order_relaxed)) return box_.exchange(nullptr, std::memory_order_acq_rel);
      Patience::spin();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return box_.load(std::memory_order_relaxed) != nullptr; });
    return box_.exchange(nullptr, std::memory_order_acq_rel);
  }

  const int index_;
  std::atomic<Letter*> box_{nullptr};
  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  void run(int threads, Job& job) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    const int helpers = lock.owns_lock() ? hire(threads - 1) : 0;
    Letter letter = {&job, helpers + 1};
    for (int i = 0; i < helpers; ++i) workers_[i]->post(&letter);
    job.work(0, helpers + 1);
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

void run_job(int threads, Job& job) { pool->run(threads, job); }

}  // namespace fastrnn::cpu
#endif
