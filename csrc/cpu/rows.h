// How a layer is shared among threads. With enough rows, each task walks all time steps of one direction for a range of
// rows, and needs no barrier, since rows never meet inside a layer. With few rows and much work per step, a team of
// threads walks all rows together: each computes its own units, and they meet once per product. Where a core's cache
// holds all weights, two rows for each thread are enough, and so is one if a step is too small for a meeting.
#pragma once

#include "../layer.h"
#include "gemm.h"
#include "threads.h"

namespace fastrnn::cpu::FASTRNN_ISA {

struct RowRange {
  int d;          // direction
  int64_t b0, n;  // rows [b0, b0 + n)
};

// What one thread of a team does, or a thread on its own.
struct Share {
  int worker = 0, count = 1;
  Barrier* barrier = nullptr;

  void wait() const {
    if (count > 1) barrier->wait(worker, count);
  }

  // This worker's part of [0, n), its bounds multiples of `multiple`.
  void part(int64_t n, int64_t multiple, int64_t* begin, int64_t* end) const {
    const int64_t pieces = (n + multiple - 1) / multiple;
    *begin = smaller(n, pieces * worker / count * multiple);
    *end = smaller(n, pieces * (worker + 1) / count * multiple);
  }
};

class RowTasks {
 public:
  // `work`: the products of the pass by those of the forward pass.
  RowTasks(const Layer& layer, int64_t gates, int work) : layer_(layer) {
    const double step_flops = 2.0 * layer.B * gates * layer.H * layer.P;
    // What can be shared of one sequence whose steps are too small for a team is the input's product alone.
    const bool shares_steps = layer.B * layer.D > 1 || step_flops >= 2 * kMinTeamFlops;
    const int64_t depth = layer.I + (shares_steps ? layer.P : 0);
    const double flops = 2.0 * work * layer.T * layer.B * layer.D * gates * layer.H * depth;
    const double bytes = 4.0 * layer.D * gates * layer.H * (layer.I + layer.P);
    threads_ = flops < kMinParallelFlops && bytes < kMinParallelBytes ? 1 : layer.threads;
    // Without recurrent products a step is no work, but nobody has to wait for anybody either.
    const int64_t pieces = (layer.H + kPiece - 1) / kPiece;  // of units: each has a thread
    const int64_t most_rows = layer.T == 1 && pieces >= threads_ ? kMaxStepTeamRows : kMaxTeamRows;
    const bool is_cached = layer.T > 1 && 4.0 * gates * layer.H * layer.P <= kMaxCachedBytes;
    const bool splits = is_cached && (layer.B >= kMinRows * threads_ || step_flops <= 2 * kMinTeamFlops);
    const bool may_team =
        layer.B <= most_rows && layer.D == 1 && !layer.projected && layer.recurrent > 0 && !(layer.B > 1 && splits);
    const int64_t most =
        smaller(smaller(smaller(threads_, pieces), Barrier::kMaxCount), int64_t(step_flops / kMinTeamFlops));
    team_ = may_team ? int(larger(1, most)) : 1;
    const int64_t most_splits = layer.B / (is_cached ? 1 : kMinRows);
    splits_ = team_ > 1 ? 1 : int(larger(1, smaller(threads_ / layer.D, most_splits)));
  }

  int threads() const { return threads_; }
  int team() const { return team_; }  // 1: the tasks are independent
  int count() const { return splits_ * layer_.D; }
  int workers() const { return int(smaller(threads_, count())); }
  int64_t max_rows() const { return (layer_.B + splits_ - 1) / splits_; }

  RowRange range(int task) const {
    const int64_t part = task / layer_.D;
    const int64_t b0 = layer_.B * part / splits_, b1 = layer_.B * (part + 1) / splits_;
    return {task % layer_.D, b0, b1 - b0};
  }

 private:
  static constexpr double kMinParallelFlops = 4e6;    // about 20 us of one core: less is not worth waking a thread,
  static constexpr double kMinParallelBytes = 1e6;    // unless there are weights to read that take as long
  static constexpr double kMaxCachedBytes = 1 << 19;  // of recurrent weights in L2
  static constexpr int64_t kMinRows = 2;              // of a task
  static constexpr int64_t kMaxTeamRows = 4;       // with so few, splitting rows would stream the same weights twice;
  static constexpr int64_t kMaxStepTeamRows = 96;  // of a single step each weight is read once, and threads meet once
  static constexpr int64_t kPiece = kPlain * kLanes<float>;  // of units, at most
  static constexpr double kMinTeamFlops = 3e4;               // of a step, for each thread: less is not worth a meeting

  const Layer& layer_;
  int threads_, splits_, team_;
};

// walk(rows, scratch, share) for every range of rows, by one thread or by a team. `scratch` says whose scratch to use.
template <class Walk>
void walk_rows(const RowTasks& tasks, Walk walk) {
  if (tasks.team() == 1) {
    parallel_for(tasks.workers(), tasks.count(),
                 [&](int task, int worker) { walk(tasks.range(task), worker, Share{}); });
    return;
  }
  Barrier barrier;
  team_of(tasks.team(), [&](int worker, int count) { walk(tasks.range(0), 0, Share{worker, count, &barrier}); });
}

// Element-wise view of a layer's arrays in their storage type.
template <class S>
const S* as(const void* p) {
  return static_cast<const S*>(p);
}
template <class S>
S* as(void* p) {
  return static_cast<S*>(p);
}

// The time that step s of direction d reads.
inline int64_t time_of_step(const Layer& layer, int d, int64_t s) { return d == 0 ? s : layer.T - 1 - s; }

}  // namespace fastrnn::cpu::FASTRNN_ISA
