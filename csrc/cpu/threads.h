// How the CPU backend works on several threads. It is compiled once; the kernels of every instruction set call it.
#pragma once

namespace fastrnn::cpu {

// Calls run(context, task, worker) for every task in [0, tasks), on at most `threads` threads, the caller among them,
// and returns when all are done. A worker is one thread for the length of the call, 0 <= worker < threads. Tasks are
// handed out one by one, so which worker gets a task is chance: a task must not depend on it. There may be fewer
// workers than asked for: inside of another parallel region, in a forked child, where the system has no more.
void parallel(int threads, int tasks, void (*run)(void* context, int task, int worker), void* context);

// Calls run(context, worker, count) once on each of `count` threads at the same time, the caller being worker 0, and
// returns when all have returned. count is `threads` or, as above, less. The workers may wait for each other.
void team(int threads, void (*run)(void* context, int worker, int count), void* context);

// Where the workers of a team wait for each other: zeros at first. Everything written before wait() is seen by all
// after it. A wait spins for a bounded time, then sleeps.
class Barrier {
 public:
  static constexpr int kMaxCount = 16;

  void wait(int worker, int count);  // 0 <= worker < count <= kMaxCount, the same `count` for all who wait here

 private:
  struct alignas(64) Slot {
    unsigned arrivals;
    unsigned sleepers;  // how many wait for the next arrival in their sleep
  };

  static bool has_arrived(const Slot& slot, unsigned arrivals);
  Slot slots_[kMaxCount];
};

// How many threads the machine can run at once (the process's CPU affinity).
int available_cpus();

// The same with a callable.
template <class F>
static void parallel_for(int threads, int tasks, F&& f) {
  auto run = [](void* context, int task, int worker) { (*static_cast<F*>(context))(task, worker); };
  parallel(threads, tasks, run, &f);
}

template <class F>
static void team_of(int threads, F&& f) {
  auto run = [](void* context, int worker, int count) { (*static_cast<F*>(context))(worker, count); };
  team(threads, run, &f);
}

}  // namespace fastrnn::cpu
