// A stack of layers that advances one step per call, in memory of its own that is allocated once: packed weights,
// workspace, and what goes from layer to layer. Plain pointers; no torch header.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "layer.h"

namespace fastrnn {

class Stream {
 public:
  // One element per layer: cell, dtype, B, I, H, P, projected, threads, products; weights[0], which are only read
  // here; h_n and c_n, the state [B, P] and [B, H], which the caller owns, may change between steps and keeps alive.
  // The last layer's y [B, P] is the caller's too.
  explicit Stream(std::vector<Layer> layers);

  // Reads x [B, I], leaves the output in the last layer's y and the new state in place of the old one. Throws
  // std::runtime_error if another thread is inside.
  void step(const void* x);

  size_t bytes() const { return bytes_; }  // of the memory that it holds

 private:
  void* allocate(size_t bytes);

  struct Free {
    void operator()(void* p) const;
  };
  std::vector<std::unique_ptr<void, Free>> memory_;
  std::vector<Layer> layers_;
  void* workspace_;
  size_t bytes_ = 0;
  std::mutex mutex_;
};

}  // namespace fastrnn
