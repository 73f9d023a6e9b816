// The kernels of one cell and storage type, as dispatch.cpp calls them. What they are called with is in recurrence.h.
#pragma once

#include "../cells/lookup.h"
#include "recurrence.h"

namespace fastrnn::cuda {

// The storage types, as variants of lookup.h: those of DType in its order, then float whose products may be of TF32.
constexpr int kTFloat32Variant = 4;
using AllVariants = Variants<kFloat32, kFloat64, kBFloat16, kFloat16, kTFloat32Variant>;
using OtherVariants = Variants<>;

// All null: there are none.
struct ForwardKernels {
  int (*groups)(const Layer& layer, const Path& path);  // of the path, those that the device holds at the same time
  size_t (*workspace)(const Layer& layer, const Path& path);
  void (*run)(const Layer& layer, const Path& path, const Projection& projection, void* workspace,
              const Multiply& multiply, Stream stream);
};
struct BackwardKernels {
  int (*groups)(const Layer& layer, const Path& path);
  size_t (*workspace)(const Layer& layer, const Path& path);
  void (*run)(const Layer& layer, const LayerGrads& grads, const Path& path, const GateGrads& out, void* workspace,
              const Multiply& multiply, Stream stream);
};

ForwardKernels forward_kernels(int cell, int variant);
BackwardKernels backward_kernels(int cell, int variant);

}  // namespace fastrnn::cuda
