#include "fork.h"

#include <ATen/Parallel.h>
#include <pthread.h>

namespace fastrnn {
namespace {

thread_local bool has_forked = false;  // this thread is the one that a child was left with
const int at_fork = pthread_atfork(nullptr, nullptr, [] { has_forked = true; });

}  // namespace

void leave_openmp_after_fork() {
  if (!has_forked) return;
  has_forked = false;
  at::set_num_threads(1);
}

}  // namespace fastrnn
