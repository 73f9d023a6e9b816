// From a layer to the kernels of its cell and storage type: those that are built in, or those that were added.
#include <stdexcept>

#include "../added_kernels.h"
#include "kernels.h"

namespace fastrnn::cuda {
namespace {

AddedKernels<ForwardKernels, BackwardKernels> added;

int storage_of(const Layer& layer) {
  return layer.dtype == DType::kFloat32 && layer.tf32 ? kTFloat32Variant : int(layer.dtype);
}

template <class Kernels>
Kernels checked(Kernels found, const Layer& layer) {
  if (found.run) return found;
  static constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "float32 with TF32"};
  throw std::runtime_error("cell " + cell_info(layer.cell).name + ": this process has no kernels of the GPU for " +
                           kNames[storage_of(layer)] + "; fastrnn.ops.prepare() compiles them");
}

ForwardKernels kernels_of_forward(const Layer& layer) {
  return checked(added.forward(forward_kernels, layer.cell, storage_of(layer)), layer);
}
BackwardKernels kernels_of_backward(const Layer& layer) {
  return checked(added.backward(backward_kernels, layer.cell, storage_of(layer)), layer);
}

}  // namespace

bool has_kernels(int cell, int variant) { return added.forward(forward_kernels, cell, variant).run != nullptr; }

void load_kernels(int cell, int variant, const std::string& path) { added.load(cell, variant, path); }

bool may_project_into_saved(const Layer& layer) {
  const CellInfo& cell = cell_info(layer.cell);
  return layer.saved && cell.second_gates == 0 && cell.saved >= cell.gates;
}

Path forward_path(const Layer& layer) {
  const ForwardKernels kernels = kernels_of_forward(layer);
  const Chip chip = current_chip();
  const Path path = choose(layer, Pass::kForward, chip);
  return limit_groups(layer, Pass::kForward, chip, path, kernels.groups(layer, path));
}

size_t forward_workspace(const Layer& layer, const Path& path) {
  return kernels_of_forward(layer).workspace(layer, path);
}

void forward(const Layer& layer, const Path& path, const Projection& projection, void* workspace,
             const Multiply& multiply, Stream stream) {
  kernels_of_forward(layer).run(layer, path, projection, workspace, multiply, stream);
}

Path backward_path(const Layer& layer) {
  const BackwardKernels kernels = kernels_of_backward(layer);
  const Chip chip = current_chip();
  const Path path = choose(layer, Pass::kBackward, chip);
  return limit_groups(layer, Pass::kBackward, chip, path, kernels.groups(layer, path));
}

size_t backward_workspace(const Layer& layer, const Path& path) {
  return kernels_of_backward(layer).workspace(layer, path);
}

void backward(const Layer& layer, const LayerGrads& grads, const Path& path, const GateGrads& out, void* workspace,
              const Multiply& multiply, Stream stream) {
  kernels_of_backward(layer).run(layer, grads, path, out, workspace, multiply, stream);
}

}  // namespace fastrnn::cuda
