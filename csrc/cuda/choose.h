// Which way a call goes on the GPU: the tiles that there are, and the one rule that chooses among them.
#pragma once

#include <string>

#include "../layer.h"
#include "tile_shapes.h"

namespace fastrnn::cuda {

struct Chip {
  int compute;  // 90 for compute capability 9.0
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

enum class Pass { kForward, kBackward };

struct Path {
  int tile;             // index in tile_shapes()
  int groups;           // of rows that are walked at the same time, in a persistent launch
  double microseconds;  // a step, as the model predicts; 0 for a stepwise one
  std::string reason;   // why, as a sentence
};

// Throws std::runtime_error if FASTRNN_CUDA_LEVEL is "persistent" and that is not possible, or names no level.
Path choose(const Layer& layer, Pass pass, const Chip& chip);

// The best stepwise path, with `reason`.
Path choose_stepwise(const Layer& layer, Pass pass, std::string reason);

}  // namespace fastrnn::cuda
