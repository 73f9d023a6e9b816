// How a layer is shared among threads: each task walks all time steps of one direction for a range of rows, and needs
// no barrier, since rows never meet inside a layer.
#pragma once

#include "../layer.h"
#include "gemm.h"
#include "threads.h"

namespace fastrnn::cpu::FASTRNN_ISA {

struct RowRange {
  int d;          // direction
  int64_t b0, n;  // rows [b0, b0 + n)
};

class RowTasks {
 public:
  RowTasks(const Layer& layer, int64_t gates) : layer_(layer) {
    const double flops = 2.0 * layer.T * layer.B * layer.D * gates * layer.H * (layer.I + layer.P);
    threads_ = flops < kMinParallelFlops ? 1 : layer.threads;
    splits_ = int(larger(1, smaller(threads_ / layer.D, layer.B / kMinRows)));
  }

  int threads() const { return threads_; }
  int count() const { return splits_ * layer_.D; }
  int workers() const { return int(smaller(threads_, count())); }
  int64_t max_rows() const { return (layer_.B + splits_ - 1) / splits_; }

  RowRange range(int task) const {
    const int64_t part = task / layer_.D;
    const int64_t b0 = layer_.B * part / splits_, b1 = layer_.B * (part + 1) / splits_;
    return {task % layer_.D, b0, b1 - b0};
  }

 private:
  static constexpr double kMinParallelFlops = 2e6;  // about 10 us of one core: less is not worth waking a thread
  static constexpr int64_t kMinRows = 2;            // fewer rows a thread would only stream the same weights twice

  const Layer& layer_;
  int threads_, splits_;
};

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
