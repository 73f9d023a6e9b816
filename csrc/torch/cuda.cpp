// The backend of NVIDIA GPUs: the kernels of cuda/ for what goes step by step, PyTorch's matrix products (cuBLAS) for
// W_ih x before the steps, for the gradients of x and of the weights after them, and for large products of the steps.
//
// With FASTRNN_EMULATED the tensors are on the CPU, and the kernels run in tests/emulator.
#include "cuda.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#ifndef FASTRNN_EMULATED
#include <c10/cuda/CUDAStream.h>
#endif

#include <array>
#include <map>
#include <string>
#include <utility>

#include "../cells.h"
#include "../cuda/kernels.h"

namespace fastrnn {
namespace {

using at::Tensor;

cuda::Stream current_stream() {
#ifdef FASTRNN_EMULATED
  return nullptr;
#else
  return c10::cuda::getCurrentCUDAStream().stream();
#endif
}

int64_t up_to_8(int64_t n) { return (n + 7) / 8 * 8; }

// An array as a tensor. The device is given, not asked of the pointer, which may be null where there are no elements.
Tensor as_tensor(const void* array, at::IntArrayRef sizes, const at::TensorOptions& options,
                 at::OptionalIntArrayRef strides = {}) {
  return at::for_blob(const_cast<void*>(array), sizes)
      .strides(strides)
      .options(options)
      .target_device(options.device())
      .make_tensor();
}

// The arrays of a call.
class Arrays {
 public:
  Arrays(const Layer& layer, const at::TensorOptions& options) : layer_(layer), options_(options) {}

  Tensor operator()(const void* array, at::IntArrayRef sizes) const { return as_tensor(array, sizes, options_); }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options_); }
  Tensor bytes(size_t count) const { return at::empty({int64_t(count)}, options_.dtype(at::kByte)); }
  int64_t rows() const { return layer_.T * layer_.B; }

 private:
  const Layer& layer_;
  at::TensorOptions options_;
};

void check_device() {
  constexpr int kLeast = 80;
  const int compute = cuda::current_chip().compute;
  TORCH_CHECK_NOT_IMPLEMENTED(compute >= kLeast, "fastrnn: expected a GPU of compute capability 8.0 or newer, got ",
                              compute / 10, ".", compute % 10);
}

void check_sizes(const Layer& layer) {
  constexpr int64_t kMost = 1 << 30, kMostUnits = 1 << 18;
  TORCH_CHECK_VALUE(layer.T < kMost && layer.B < kMost, "x: expected fewer than 2^30 steps and rows on a GPU, got ",
                    layer.T, " and ", layer.B);
  TORCH_CHECK_VALUE(layer.H <= kMostUnits && layer.P <= kMostUnits, "w_hh: expected at most ", kMostUnits,
                    " units on a GPU, got ", layer.H, " and ", layer.P, " outputs");
}

// The products below see no autocast: the op's own rule has chosen the dtypes.
struct Guards {
  explicit Guards(const at::TensorOptions& options) : device(options.device()) {}
  c10::DeviceGuard device;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// ---- forward

bool tf32_is_allowed() { return at::globalContext().allowTF32CuDNN(at::Float32Op::RNN); }

// Layer.tf32 is for the steps what PyTorch's flag for cuDNN's recurrent layers says, where there are kernels for it.
// Matrix products of PyTorch's, around the steps and in them, have a flag of their own.
Layer with_tf32(Layer layer) {
  const at::Context& context = at::globalContext();
  layer.tf32 =
      layer.dtype == DType::kFloat32 && tf32_is_allowed() && cuda::has_kernels(layer.cell, cuda::kTFloat32Variant);
  layer.matmul_tf32 =
      layer.dtype == DType::kFloat32 &&
      context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
  return layer;
}

// The product of a step, by PyTorch, with sums of the accumulator's type. What it multiplies with and where to are the
// same in every step: these tensors are made once.
cuda::Multiply multiply_by_torch(const at::TensorOptions& options) {
  const at::ScalarType type = c10::typeMetaToScalarType(options.dtype());
  const bool is_16_bit = at::elementSize(type) == 2;
  const at::ScalarType sums = is_16_bit ? at::kFloat : type;
  return [=, kept = std::map<const void*, std::pair<Tensor, Tensor>>()](const cuda::MatrixProduct& p) mutable {
    const std::array<int64_t, 2> of_a = {p.pitch, 1}, of_b = {p.transposed ? 1 : p.columns, p.transposed ? p.depth : 1};
    const Tensor a = as_tensor(p.a, {p.rows, p.depth}, options, at::IntArrayRef(of_a));
    auto& [b, to] = kept[p.to];
    if (!to.defined()) {
      b = as_tensor(p.b, {p.depth, p.columns}, options, at::IntArrayRef(of_b));
      to = as_tensor(p.to, {p.rows, p.columns}, options.dtype(sums));
    }
#ifdef FASTRNN_EMULATED
    at::mm_out(to, a.to(sums), b.to(sums));
#else
    is_16_bit ? at::mm_out(to, a, b, sums) : at::mm_out(to, a, b);
#endif
  };
}

// Runs all steps on a path; if the device refuses it after all, on one that does not need all blocks at once.
template <class Run>
void take_path(const Layer& layer, cuda::Pass pass, const cuda::Path& path, Run run) {
  cuda::Path other;
  try {
    return run(path);
  } catch (const cuda::LaunchRefused& refusal) {
    other = cuda::limit_groups(layer, pass, cuda::current_chip(), path, 0);
    TORCH_WARN("fastrnn: the GPU has no room now for all blocks of a launch at once (", refusal.what(),
               "), so that every step is a launch of its own");
  }
  run(other);
}

void run(const Layer& layer, const at::TensorOptions& options) {
  const CellInfo& cell = cell_info(layer.cell);
  const Arrays arrays(layer, options);
  const int64_t rows = arrays.rows(), gates = cell.gates * layer.H, saved = (cell.saved + layer.projected) * layer.H;
  const bool into_saved = cuda::may_project_into_saved(layer);
  const int64_t pitch = into_saved ? saved : gates;
  Tensor projection = into_saved ? arrays(layer.saved, {layer.D, rows, pitch}) : arrays.empty({layer.D, rows, pitch});
  const Tensor x = arrays(layer.x, {rows, layer.I});
  for (int d = 0; d < layer.D; ++d) {
    Tensor out = projection[d].narrow(1, 0, gates);
    at::mm_out(out, x, arrays(layer.weights[d].w_ih, {gates, layer.I}).t());
  }
  take_path(layer, cuda::Pass::kForward, cuda::forward_path(layer), [&](const cuda::Path& path) {
    const Tensor workspace = arrays.bytes(cuda::forward_workspace(layer, path));
    cuda::forward(layer, path, {projection.const_data_ptr(), rows * pitch, pitch}, workspace.data_ptr(),
                  multiply_by_torch(options), current_stream());
  });
}

void forward(const Layer& layer, const at::TensorOptions& options) {
  const Guards guards(options);
  check_device();
  check_sizes(layer);
  run(with_tf32(layer), options);
}

// ---- backward

// What forward would have saved, had it been asked to: forward again.
Tensor recompute(Layer layer, const at::TensorOptions& options) {
  const CellInfo& cell = cell_info(layer.cell);
  const Arrays arrays(layer, options);
  Tensor saved = arrays.empty({layer.D, arrays.rows(), cell.saved + layer.projected, layer.H});
  Tensor y = arrays.empty({arrays.rows(), layer.D * layer.P}), h_n = arrays.empty({layer.D, layer.B, layer.P});
  Tensor c_n = arrays.empty({layer.D, layer.B, cell.carried, layer.H});
  layer.y = y.data_ptr(), layer.h_n = h_n.data_ptr(), layer.c_n = cell.carried ? c_n.data_ptr() : nullptr;
  layer.saved = saved.data_ptr(), layer.saved_c = nullptr;
  run(layer, options);
  return saved;
}

// The gradients that are sums over all steps, of one direction.
class LargeProducts {
 public:
  LargeProducts(const Layer& layer, const LayerGrads& grads, int d, const at::TensorOptions& options,
                const Tensor& gate_grads, const Tensor& projected)
      : p(layer),
        out(grads.weights[d]),
        cell(cell_info(layer.cell)),
        d(d),
        arrays(layer, options),
        gate_grads(gate_grads),
        projected(projected),
        saved(arrays(layer.saved, {layer.D, arrays.rows(), cell.saved + layer.projected, layer.H})[d]),
        input(vectors(0, cell.gates)) {}

  // dx = dG W_ih; the second direction adds to the first.
  void input_grads(void* to) const {
    const Tensor w_ih = arrays(p.weights[d].w_ih, {cell.gates, p.H, p.I});
    std::vector<Tensor> by_vector;
    for (int j = 0; j < cell.gates; ++j) by_vector.push_back(w_ih[gate_of(j)]);
    const Tensor weights = in_order() ? w_ih.view({cell.gates * p.H, p.I}) : at::cat(by_vector);
    Tensor dx = arrays(to, {arrays.rows(), p.I});
    if (d == 0) {
      at::mm_out(dx, input, weights);
    } else {
      dx.addmm_(input, weights);
    }
  }

  // x: [T*B, I], without numbers of rows that are finished.
  void w_ih_grads(const Tensor& x) const {
    if (out.w_ih) put_by_gate(at::mm(input.t(), x), arrays(out.w_ih, {cell.gates, p.H, p.I}));
    if (out.b_ih) put_by_gate(input.sum(0), arrays(out.b_ih, {cell.gates, p.H}));
  }

  void w_hh_grads() const {
    const int first_gates = cell.first_gates, recurrent = cell.recurrent_gates();
    if (recurrent == 0) return;
    const Tensor first = vectors(cell.recurrent_grad[0], first_gates);
    const Tensor second = cell.second_gates ? vectors(cell.recurrent_grad[first_gates], cell.second_gates) : Tensor();
    if (out.w_hh) {
      Tensor dw = arrays(out.w_hh, {recurrent * p.H, p.P}), of_first = dw.narrow(0, 0, first_gates * p.H);
      Tensor h = arrays.empty({arrays.rows(), p.P});
      cuda::previous_h(p, d, h.data_ptr(), current_stream());
      at::mm_out(of_first, first.t(), h);
      if (second.defined()) {
        Tensor of_second = dw.narrow(0, first_gates * p.H, cell.second_gates * p.H);
        at::mm_out(of_second, second.t(), saved.select(1, cell.saved_operand));
      }
    }
    if (out.b_hh) {
      Tensor db = arrays(out.b_hh, {recurrent * p.H});
      db.narrow(0, 0, first_gates * p.H).copy_(first.sum(0));
      if (second.defined()) db.narrow(0, first_gates * p.H, cell.second_gates * p.H).copy_(second.sum(0));
    }
  }

  void w_own_grads() const {
    if (!out.w_own) return;
    Tensor dw = arrays(out.w_own, {cell.unit_weights, p.H});
    for (int i = 0; i < cell.unit_weights; ++i) dw[i].copy_(vectors(cell.unit_grad[i], 1).sum(0));
  }

  void w_hr_grads() const {
    if (!out.w_hr) return;
    Tensor dw = arrays(out.w_hr, {p.P, p.H});
    at::mm_out(dw, projected.narrow(1, 0, p.P).t(), saved.select(1, cell.saved));
  }

 private:
  // Vectors [first, first + count) of all rows, [T*B, count*H].
  Tensor vectors(int first, int count) const {
    return gate_grads.narrow(1, first, count).narrow(2, 0, p.H).reshape({arrays.rows(), count * p.H});
  }

  int gate_of(int vector) const {
    int gate = 0;
    while (cell.input_grad[gate] != vector) ++gate;
    return gate;
  }
  bool in_order() const {
    for (int g = 0; g < cell.gates; ++g)
      if (cell.input_grad[g] != g) return false;
    return true;
  }
  void put_by_gate(const Tensor& by_vector, const Tensor& to) const {
    const Tensor from = by_vector.view(to.sizes());
    for (int g = 0; g < cell.gates; ++g) to[g].copy_(from[cell.input_grad[g]]);
  }

  const Layer& p;
  const WeightGrads& out;
  const CellInfo& cell;
  const int d;
  const Arrays arrays;
  const Tensor gate_grads, projected;  // [T*B, J, Hp], [T*B, Pp]
  const Tensor saved;                  // [T*B, V, H]
  const Tensor input;                  // [T*B, G*H] gradients of the input products, by vector
};

// x with zeros where a row is finished: what stands there must not reach the sums, not even as NaN * 0.
Tensor masked_input(const Layer& layer, const Arrays& arrays, const at::TensorOptions& options) {
  const Tensor x = arrays(layer.x, {layer.T, layer.B, layer.I});
  if (!layer.lengths) return x.view({arrays.rows(), layer.I});
  const auto index = options.dtype(at::kLong);
  const Tensor lengths = as_tensor(layer.lengths, {1, layer.B, 1}, index);
  const Tensor finished = at::arange(layer.T, index).view({layer.T, 1, 1}) >= lengths;
  return x.masked_fill(finished, 0).view({arrays.rows(), layer.I});
}

void backward(const Layer& given, const LayerGrads& grads, const at::TensorOptions& options) {
  const Guards guards(options);
  check_device();
  check_sizes(given);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !grads.saved_c && !grads.values,
      "grad_saved_c, grad_values: there are no kernels on a GPU for gradients of what the steps "
      "compute in between");
  Layer layer = with_tf32(given);
  Tensor again;
  if (!layer.saved) again = recompute(layer, options), layer.saved = again.data_ptr();

  const CellInfo& cell = cell_info(layer.cell);
  const Arrays arrays(layer, options);
  const Tensor gates = arrays.empty({layer.D, arrays.rows(), cell.grads, up_to_8(layer.H)});
  const Tensor projected = arrays.empty({layer.D, layer.projected ? arrays.rows() : 0, up_to_8(layer.P)});
  take_path(layer, cuda::Pass::kBackward, cuda::backward_path(layer), [&](const cuda::Path& path) {
    const Tensor workspace = arrays.bytes(cuda::backward_workspace(layer, path));
    cuda::backward(layer, grads, path, {gates.data_ptr(), projected.data_ptr()}, workspace.data_ptr(),
                   multiply_by_torch(options), current_stream());
  });
  if (grads.steps)
    arrays(grads.steps, {layer.D, arrays.rows(), cell.grads, layer.H}).copy_(gates.narrow(3, 0, layer.H));
  const Tensor x = masked_input(layer, arrays, options);
  for (int d = 0; d < layer.D; ++d) {
    const LargeProducts products(layer, grads, d, options, gates[d], projected[d]);
    if (grads.x) products.input_grads(grads.x);
    products.w_ih_grads(x);
    products.w_hh_grads();
    products.w_hr_grads();
    products.w_own_grads();
  }
}

std::string explain(const Layer& given, const at::TensorOptions& options, bool training) {
  const Guards guards(options);
  check_device();
  check_sizes(given);
  const Layer layer = with_tf32(given);
  const cuda::Chip chip = cuda::current_chip();
  std::string text =
      "GPU of compute capability " + std::to_string(chip.compute / 10) + "." + std::to_string(chip.compute % 10) +
      ", " + std::to_string(chip.multiprocessors) +
      " multiprocessors\n  forward: " + cuda::describe(layer, cuda::Pass::kForward, cuda::forward_path(layer));
  if (training) text += "\n  backward: " + cuda::describe(layer, cuda::Pass::kBackward, cuda::backward_path(layer));
  return text;
}

}  // namespace

const Backend kCuda = {forward, backward, explain};

int cuda_variant(DType dtype) {
  return dtype == DType::kFloat32 && tf32_is_allowed() ? cuda::kTFloat32Variant : int(dtype);
}

}  // namespace fastrnn
