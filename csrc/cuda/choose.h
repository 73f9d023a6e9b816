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
  int tile;             // index in the list of tile_shapes.h
  int groups;           // of rows that are walked at the same time
  double microseconds;  // a step, as the model predicts
  std::string reason;   // why, as a sentence
};

// The environment can force a choice, for tests and measurements: FASTRNN_CUDA_LEVEL to stepwise, gemm, persistent or
// scan, FASTRNN_CUDA_TILE to an index in the lists of tile shapes, or to one for each pass, such as "4,10". Throws
// std::runtime_error if that is not possible.
Path choose(const Layer& layer, Pass pass, const Chip& chip);

// A path in words.
std::string describe(const Layer& layer, Pass pass, const Path& path);

// The path if the device turns out to hold no more than so many groups of rows at once; not persistent if none.
Path limit_groups(const Layer& layer, Pass pass, const Chip& chip, Path path, int groups);

}  // namespace fastrnn::cuda
