// Runs the persistent kernels for ThreadSanitizer to watch. Their results are tested elsewhere; here each number must
// have been written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cells.h"
#include "../../csrc/cuda/recurrence.h"
#include "emulate.h"

namespace {

using namespace fastrnn;

struct Case {
  const char* cell;
  DType dtype;
  int64_t T, B, H;
  bool lengths, resets;
  int multiprocessors;
  const char* tile;  // FASTRNN_CUDA_TILE, or null: the best one
};

// Blocks of units that wait for each other, an incomplete last one; three steps, since sums alternate between two sets.
constexpr int kMany = 132, kFew = 2, kOneCluster = 4;  // few: two blocks, which walk groups of rows one after another
constexpr const char *kClusterTile = "8", *kWarpgroupTiles = "10,14", *kTurnTiles = "13,17";
constexpr Case kCases[] = {
    {"lstm", DType::kBFloat16, 3, 3, 20, false, false, kMany, nullptr},
    {"rnn_tanh", DType::kFloat32, 3, 5, 12, true, true, kFew, nullptr},
    {"gru", DType::kBFloat16, 3, 18, 40, true, true, kFew, kClusterTile},
    {"lstm", DType::kBFloat16, 3, 34, 20, false, true, kOneCluster, kWarpgroupTiles},
    {"lstm", DType::kBFloat16, 3, 36, 20, true, true, kOneCluster, kTurnTiles},
};
constexpr unsigned kSeeds[] = {0, 2};  // in order; in any order, and where a thread meets memory that others write

class Numbers {  // an array of float32 or bfloat16
 public:
  Numbers(DType dtype, int64_t count, std::mt19937* random = nullptr)
      : dtype_(dtype), bytes_(size_t(count) * size(), char(0xff)) {
    if (!random) return;
    for (int64_t i = 0; i < count; ++i) {
      const float value = (float((*random)() % 2001) / 1000 - 1) * 0.4f;
      if (dtype == DType::kFloat32) {
        memcpy(&bytes_[i * 4], &value, 4);
      } else {
        const uint16_t bits = emulate::bfloat16_of(value);
        memcpy(&bytes_[i * 2], &bits, 2);
      }
    }
  }
  void* data() { return bytes_.data(); }
  size_t count() const { return bytes_.size() / size(); }
  float at(size_t i) const {
    float value;
    uint16_t bits;
    if (dtype_ == DType::kFloat32) return memcpy(&value, &bytes_[i * 4], 4), value;
    memcpy(&bits, &bytes_[i * 2], 2);
    return emulate::float_of_bfloat16(bits);
  }

 private:
  size_t size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  DType dtype_;
  std::vector<char> bytes_;
};

// Forward and backward: y, h_n, the gate gradients and those of the initial state.
std::vector<float> run(const Case& c) {
  setenv("FASTRNN_CUDA_TILE", c.tile ? c.tile : "", 1);
  emulate::chip().multiprocessors = c.multiprocessors;
  std::mt19937 random(1);
  Layer layer = {};
  set_cell(layer, find_cell(c.cell)), layer.dtype = c.dtype;
  const CellInfo& cell = cell_info(layer.cell);
  layer.T = c.T, layer.B = c.B, layer.I = 1, layer.H = layer.P = c.H, layer.D = 1;
  const int64_t rows = c.T * c.B, gates = cell.gates * c.H, padded = (c.H + 7) / 8 * 8;
  const auto numbers = [&](int64_t count) { return Numbers(c.dtype, count, &random); };
  Numbers projection = numbers(rows * gates), w = numbers(gates * c.H);
  Numbers b = numbers(gates), h0 = numbers(c.B * c.H), c0 = numbers(c.B * c.H);
  const auto output = [&](int64_t count) { return Numbers(c.dtype, count); };
  Numbers y = output(rows * c.H), h_n = output(c.B * c.H), c_n = output(c.B * c.H);
  Numbers saved = output(rows * cell.saved * c.H), grad_y = numbers(rows * c.H);
  Numbers grad_gates = output(rows * cell.grads * padded), grad_h0 = output(c.B * c.H);
  std::vector<float> saved_c(size_t(rows * c.H));
  std::vector<int64_t> lengths(size_t(c.B));
  std::vector<char> resets(size_t(rows), 0);
  for (auto& n : lengths) n = int64_t(random() % unsigned(c.T + 1));
  for (auto& mark : resets) mark = random() % 3 == 0;
  layer.weights[0].w_hh = w.data(), layer.weights[0].b_hh = b.data();
  layer.h0 = h0.data(), layer.c0 = c0.data(), layer.y = y.data(), layer.h_n = h_n.data(), layer.c_n = c_n.data();
  layer.saved = saved.data(), layer.saved_c = saved_c.data();
  layer.lengths = c.lengths ? lengths.data() : nullptr;
  layer.resets = c.resets ? reinterpret_cast<const bool*>(resets.data()) : nullptr;

  const auto workspace = [](size_t bytes) { return std::vector<uint4>(bytes / sizeof(uint4) + 1); };
  const cuda::Path forward = cuda::forward_path(layer);
  auto scratch = workspace(cuda::forward_workspace(layer, forward));
  cuda::forward(layer, forward, {projection.data(), rows * gates, gates}, scratch.data(), {}, nullptr);
  LayerGrads grads = {};
  grads.y = grad_y.data(), grads.h0 = grad_h0.data();
  const cuda::Path backward = cuda::backward_path(layer);
  scratch = workspace(cuda::backward_workspace(layer, backward));
  cuda::backward(layer, grads, backward, {grad_gates.data(), nullptr}, scratch.data(), {}, nullptr);

  std::vector<float> all;
  for (const Numbers* part : {&y, &h_n, &grad_gates, &grad_h0})
    for (size_t i = 0; i < part->count(); ++i) all.push_back(part->at(i));
  return all;
}

}  // namespace

int main() {
  setenv("FASTRNN_CUDA_LEVEL", "persistent", 1);
  int wrong = 0;
  for (const Case& c : kCases) {
    for (const unsigned seed : kSeeds) {
      emulate::settings().seed = seed;
      const std::vector<float> numbers = run(c);
      const bool written = std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::isfinite(x); });
      std::printf("%s dtype %d T %ld B %ld H %ld seed %u: %s\n", c.cell, int(c.dtype), long(c.T), long(c.B), long(c.H),
                  seed, written ? "written" : "NOT WRITTEN");
      wrong += !written;
    }
  }
  return wrong ? 1 : 0;
}
