#include "stream.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "cpu/memory.h"

namespace fastrnn {
namespace {

constexpr size_t kAlignment = 64;

size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

void Stream::Free::operator()(void* p) const { std::free(p); }

void* Stream::allocate(size_t bytes) {
  bytes = (std::max(bytes, kAlignment) + kAlignment - 1) / kAlignment * kAlignment;
  void* p = std::aligned_alloc(kAlignment, bytes);
  if (!p) throw std::bad_alloc();
  memory_.emplace_back(p);
  bytes_ += bytes;
  cpu::prefer_huge_pages(p, bytes);
  return p;
}

Stream::Stream(std::vector<Layer> layers) : layers_(std::move(layers)) {
  size_t most = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    layer.T = 1, layer.D = 1;
    layer.h0 = layer.h_n, layer.c0 = layer.c_n;
    void* packed = allocate(cpu::packed_size(layer));
    cpu::pack(layer, packed);
    layer.packed = packed, layer.weights[0] = {};
    if (i + 1 < layers_.size()) layers_[i + 1].x = layer.y = allocate(layer.B * layer.P * size_of(layer.dtype));
    most = std::max(most, cpu::forward_workspace(layer));
  }
  workspace_ = allocate(most);
}

void Stream::step(const void* x) {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) throw std::runtime_error("Stream: another thread is inside step()");
  layers_[0].x = x;
  for (const Layer& layer : layers_) cpu::forward(layer, workspace_);
}

}  // namespace fastrnn
