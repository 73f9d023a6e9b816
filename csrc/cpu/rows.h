// How a layer is shared among threads: the threads of each direction are teams, a team has a range of rows, and each of
// its threads has some of the units. Rows never meet inside a layer, so teams need no barrier. The threads of a team
// meet once per product; a team of one walks all time steps by itself.
#pragma once

#include "../layer.h"
#include "gemm.h"
#include "memory.h"
#include "threads.h"

namespace fastrnn::cpu::FASTRNN_ISA {

struct RowRange {
  int d;          // direction
  int64_t b0, n;  // rows [b0, b0 + n)
};

// What one thread of a team does, or a thread on its own.
struct Share {
  int worker = 0, count = 1;  // of the team
  Barrier* barrier = nullptr;
  int thread = 0;  // of all that the call has

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
  static constexpr int kMaxTeams = 32;  // of more than one thread

  // `work`: the products of the pass by those of the forward pass.
  RowTasks(const Layer& layer, int64_t gates, int work) : layer_(layer) {
    const double step_flops = 2.0 * layer.B * gates * layer.H * layer.P;
    // What can be shared of one sequence whose steps are too small for a team is the input's product alone.
    const bool shares_steps = layer.B * layer.D > 1 || step_flops >= 2 * kMeetingFlops;
    const int64_t depth = layer.I + (shares_steps ? layer.P : 0);
    const double flops = 2.0 * work * layer.T * layer.B * layer.D * gates * layer.H * depth;
    const double bytes = 4.0 * layer.D * gates * layer.H * (layer.I + layer.P);
    const double worth = flops / kMinFlops > bytes / kMinBytes ? flops / kMinFlops : bytes / kMinBytes;
    threads_ = worth < layer.threads ? int(larger(1, int64_t(worth))) : layer.threads;
    choose(gates);
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
  static constexpr double kMinFlops = 2e6;      // for each thread: 10 us, less is not worth waking it,
  static constexpr double kMinBytes = 5e5;      // unless there are weights to read that take as long
  static constexpr double kMeetingFlops = 3e4;  // what a thread computes while one of a team announces itself to others
  static constexpr double kMinGain = 1.1;       // of a larger team: it waits for whichever of its threads is slow
  static constexpr int64_t kPiece = kPlain * kLanes<float>;  // of units, at most: a thread has whole ones

  // The team that takes least time for a step, by its multiply-adds and meetings.
  void choose(int64_t gates) {
    const int64_t pieces = larger(1, (layer_.H + kPiece - 1) / kPiece), B = larger(1, layer_.B), D = layer_.D;
    const int64_t most = layer_.recurrent ? smaller(smaller(threads_ / D, pieces), Barrier::kMaxCount) : 1;
    const double piece =
        4.0 * gates * kPiece * layer_.P;  // bytes of its recurrent weights; two operations on each number
    double least = 0;
    for (int64_t team = 1; team == 1 || team <= most; ++team) {
      const int64_t splits = larger(1, smaller(threads_ / (D * team), B)), units = (pieces + team - 1) / team;
      if (team > 1 && splits * D > kMaxTeams) continue;
      const double flops = units * piece / 2 * larger((B + splits - 1) / splits, rows_that_hide(units * piece));
      const double work = flops + (team > 1 ? team * kMeetingFlops : 0);
      if (team > 1 && work * kMinGain >= least) continue;
      least = work, team_ = int(team), splits_ = int(splits);
    }
  }

  // For so many rows multiplying takes as long as reading so many bytes of weights in every step: fewer rows take as
  // long. The weights of a single step are nowhere near.
  int64_t rows_that_hide(double bytes) const {
    if (layer_.T == 1) return 48;
    if (bytes <= 48 << 10) return 1;
    return bytes <= cache_of_a_core() / 2 ? 2 : 8;
  }

  const Layer& layer_;
  int threads_, splits_ = 1, team_ = 1;
};

// This worker's part of the plain panels of W [K, N].
template <class W, class S>
void pack_part(const Share& share, W* packed, Matrix<S> source, int64_t K, int64_t N) {
  int64_t begin, end;
  share.part(N, kPlain * kLanes<Accumulator<S>>, &begin, &end);
  pack(packed + begin * panel_depth<W>(K), source.from_column(begin), K, end - begin);
}

// pack(task, share) for every part of the weights that `count` tasks stand for: all threads share each.
template <class Pack>
void pack_in_parts(const RowTasks& tasks, int count, Pack pack) {
  const int parts = tasks.threads();
  parallel_for(parts, count * parts, [&](int task, int) { pack(task / parts, Share{task % parts, parts}); });
}

// walk(rows, place, share) for every range of rows, by one thread or by a team; those with the same place in scratch
// memory are a team, or come one after the other.
template <class Walk>
void walk_rows(const RowTasks& tasks, Walk walk) {
  if (tasks.team() == 1) {
    parallel_for(tasks.workers(), tasks.count(),
                 [&](int task, int worker) { walk(tasks.range(task), worker, Share{0, 1, nullptr, worker}); });
    return;
  }
  Barrier barriers[RowTasks::kMaxTeams];
  memset(barriers, 0, size_t(tasks.count()) * sizeof(Barrier));
  team_of(tasks.team() * tasks.count(), [&](int thread, int threads) {
    const int team = int(larger(1, threads / tasks.count()));  // there may be fewer threads than were asked for
    for (int task = thread / team; task < tasks.count(); task += int(larger(1, threads / team)))
      walk(tasks.range(task), task, Share{thread % team, team, barriers + task, thread});
  });
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
