// The thread pool of the CPU backend. It is compiled once; the kernels of every instruction set call it.
#pragma once

namespace fastrnn::cpu {

// Calls run(context, task, worker) for every task in [0, tasks), on at most `threads` threads, the caller among them,
// and returns when all are done. A worker is one thread for the length of the call, 0 <= worker < threads. Tasks are
// handed out one by one, so which worker gets a task is chance: a task must not depend on it. Workers that another call
// keeps busy are done without; in a forked child the pool starts anew.
void parallel(int threads, int tasks, void (*run)(void* context, int task, int worker), void* context);

// How many threads the machine can run at once (the process's CPU affinity).
int available_cpus();

// The same with a callable.
template <class F>
static void parallel_for(int threads, int tasks, F&& f) {
  auto run = [](void* context, int task, int worker) { (*static_cast<F*>(context))(task, worker); };
  parallel(threads, tasks, run, &f);
}

}  // namespace fastrnn::cpu
