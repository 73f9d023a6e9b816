// From a layer to the kernels of its cell and storage type: those that are built in, or those that were added.
#include <stdexcept>

#include "../added_kernels.h"
#include "kernels.h"

namespace fastrnn::cuda {
namespace {

AddedKernels<ForwardKernels, BackwardKernels> added;

ForwardKernels find_forward(int cell, int variant) {
  const ForwardKernels found = cell < built_in_cells() ? forward_kernels(cell, variant) : ForwardKernels{};
  return found.run ? found : added.forward(cell, variant);
}
BackwardKernels find_backward(int cell, int variant) {
  const BackwardKernels found = cell < built_in_cells() ? backward_kernels(cell, variant) : BackwardKernels{};
  return found.run ? found : added.backward(cell, variant);
}

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

ForwardKernels forward_kernels(const Layer& layer) {
  return checked(find_forward(layer.cell, storage_of(layer)), layer);
}
BackwardKernels backward_kernels(const Layer& layer) {
  return checked(find_backward(layer.cell, storage_of(layer)), layer);
}

}  // namespace

bool has_kernels(int cell, int variant) { return find_forward(cell, variant).run != nullptr; }

void load_kernels(int cell, int variant, const std::string& path) { added.load(cell, variant, path); }

bool may_project_into_saved(const Layer& layer) {
  const CellInfo& cell = cell_info(layer.cell);
  return layer.saved && cell.second_gates == 0 && cell.saved >= cell.gates;
}

Path forward_path(const Layer& layer) {
  const ForwardKernels kernels = forward_kernels(layer);
  const Chip chip = current_chip();
  const Path path = choose(layer, Pass::kForward, chip);
  return limit_groups(layer, Pass::kForward, chip, path, kernels.groups(layer, path));
}

size_t forward_workspace(const Layer& layer, const Path& path) { return forward_kernels(layer).workspace(layer, path); }

void forward(const Layer& layer, const Path& path, const Projection& projection, void* workspace,
             const Multiply& multiply, Stream stream) {
  forward_kernels(layer).run(layer, path, projection, workspace, multiply, stream);
}

Path backward_path(const Layer& layer) {
  const BackwardKernels kernels = backward_kernels(layer);
  const Chip chip = current_chip();
  const Path path = choose(layer, Pass::kBackward, chip);
  return limit_groups(layer, Pass::kBackward, chip, path, kernels.groups(layer, path));
}

size_t backward_workspace(const Layer& layer, const Path& path) {
  return backward_kernels(layer).workspace(layer, path);
}

void backward(const Layer& layer, const LayerGrads& grads, const Path& path, const GateGrads& out, void* workspace,
              const Multiply& multiply, Stream stream) {
  backward_kernels(layer).run(layer, grads, path, out, workspace, multiply, stream);
}

}  // namespace fastrnn::cuda
