// The ops: their implementations on the CPU, and weights that are kept packed.
#include "ops.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cstring>
#include <string>

#include "../cpu/dispatch.h"
#include "calls.h"
#include "fork.h"
#include "precision.h"
#include "schemas.h"
#ifdef FASTRNN_CUDA
#include "cuda.h"
#endif

namespace fastrnn {
namespace {

using at::Tensor;

// ---- the backend of the CPU

Tensor workspace_of(size_t bytes) { return empty_large({int64_t(bytes)}, at::TensorOptions().dtype(at::kByte)); }

// What torch's switch allows need not be there: exact products stand in for it.
Layer with_kernels(Layer layer) {
  const bool is_there = layer.products != Products::kBFloat16 || cpu::has_kernels(layer.cell, variant_of(layer));
  if (!is_there) layer.products = Products::kExact;
  return layer;
}

void forward_on_cpu(const Layer& given, const at::TensorOptions&) {
  const Layer layer = with_kernels(given);
  Tensor workspace = workspace_of(cpu::forward_workspace(layer));
  cpu::forward(layer, workspace.data_ptr());
}

void backward_on_cpu(const Layer& given, const LayerGrads& grads, const at::TensorOptions&) {
  const Layer layer = with_kernels(given);
  Tensor workspace = workspace_of(cpu::backward_workspace(layer, grads));
  cpu::backward(layer, grads, workspace.data_ptr());
}

const char* products_text(Products products) {
  switch (products) {
    case Products::kExact:
      return "";
    case Products::kBFloat16Weights:
      return "; weights rounded to bfloat16";
    case Products::kInt8:
      return "; products of int8";
    case Products::kBFloat16:
      return cpu::has_bfloat16_products()
                 ? "; products of numbers rounded to bfloat16, as torch's fp32_precision allows"
                 : "; exact products: only avx512bf16 and amx have those of bfloat16 that torch's fp32_precision "
                   "allows";
  }
  return "";
}

std::string explain_on_cpu(const Layer& given, const at::TensorOptions&, bool training) {
  const Layer layer = with_kernels(given);
  const char* const weights = reads_weights_in_place(layer)
                                  ? "reads the weights where they lie, since there are few rows"
                              : training           ? "packs the weights in every call"
                              : keeps_packs(layer) ? "keeps the packed weights from call to call"
                                                   : "packs the weights in every call, since that costs little";
  std::string text =
      "CPU, " + cpu::isa_in_use() + ", at most " + std::to_string(layer.threads) + " threads; " + weights;
  return text + products_text(layer.products);
}

constexpr Backend kCpu = {forward_on_cpu, backward_on_cpu, explain_on_cpu};

// ---- kept packs

constexpr int64_t kHeaderBytes = 64;  // of a tensor of packed weights: their fingerprint comes first

bool are_packs_of(const OptionalTensor& packed, const Tensor& x, int64_t bytes, uint64_t fingerprint) {
  if (!packed || packed->scalar_type() != at::kByte || packed->device() != x.device()) return false;
  if (packed->numel() != bytes || !packed->is_contiguous()) return false;
  const void* data = packed->const_data_ptr();
  return reinterpret_cast<uintptr_t>(data) % 64 == 0 && std::memcmp(data, &fingerprint, sizeof fingerprint) == 0;
}

// Packs a copy of the weights and takes its fingerprint: another thread may be writing to the weights themselves.
Tensor pack(Layer layer, Inputs& in, int64_t bytes) {
  for (Tensor& tensor : in.weights) tensor = tensor.clone();
  add_weights(layer, in, in.x);
  Tensor packed = workspace_of(bytes).zero_();  // also between the pieces: the same call, same bytes
  char* data = static_cast<char*>(packed.data_ptr());
  const uint64_t fingerprint = cpu::fingerprint(layer);
  std::memcpy(data, &fingerprint, sizeof fingerprint);
  cpu::pack(layer, data + kHeaderBytes);
  return packed;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_forward_cpu(Inputs in, OptionalName rounded,
                                                              const OptionalTensor& packed) {
  leave_openmp_after_fork();
  if (rounded) check("x", in.x, in.x.sizes(), in.x, at::kFloat);
  Layer layer = with_kernels(make_layer(in));
  if (rounded) layer.products = products_of(layer, rounded);
  Tensor fresh;
  if (keeps_packs(layer)) {
    const int64_t bytes = kHeaderBytes + int64_t(cpu::packed_size(layer));
    if (!are_packs_of(packed, in.x, bytes, cpu::fingerprint(layer))) fresh = pack(layer, in, bytes);
    const Tensor& used = fresh.defined() ? fresh : *packed;
    layer.packed = static_cast<const char*>(used.const_data_ptr()) + kHeaderBytes;
  }
  const auto [y, h_n, c_n] = add_outputs(layer, in, true);
  forward_on_cpu(layer, in.x.options());
  return {y, h_n, c_n, fresh};
}

Outputs forward_cpu(Inputs in, bool recompute) { return forward_call(kCpu, std::move(in), true, recompute); }

std::vector<Tensor> backward_cpu(Inputs in, Saved saved, const c10::List<bool>& wanted) {
  return backward_call(kCpu, std::move(in), std::move(saved), wanted, false);
}

namespace {

void packed_forward_op(const c10::OperatorHandle& op, c10::Stack* stack) {
  Arguments arguments(op, stack);
  Inputs inputs = arguments.take_inputs();
  const auto rounded = arguments.take<std::optional<std::string>>();
  auto [y, h_n, c_n, packed] = packed_forward_cpu(std::move(inputs), rounded, arguments.take<OptionalTensor>());
  arguments.give(y, h_n, c_n, packed.defined() ? packed : at::empty({0}, at::kByte));
}

}  // namespace

}  // namespace fastrnn

TORCH_LIBRARY(fastrnn, m) { fastrnn::define_layer_ops(m); }

// Forward for inference, with weights that are kept packed, and rounded if `rounded` ("bf16" or "int8", for float32
// only) is given. `packed` is what an earlier call returned; if it is not of these weights, to the bit, new ones are
// made and come back as the last output, which is empty otherwise.
TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def("packed_forward(" FASTRNN_INPUTS
        ", str? rounded, Tensor? packed) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor packed)");
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  fastrnn::implement_layer_ops(m, fastrnn::kCpu);
  m.impl("packed_forward", torch::CppFunction::makeFromBoxedFunction<&fastrnn::packed_forward_op>());
}

#ifdef FASTRNN_CUDA
TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { fastrnn::implement_layer_ops(m, fastrnn::kCuda); }
#endif

// Gradients are attached in fastrnn/ops.py. Backward through a raw op is an error, not a silent None.
TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("layer_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("layer_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("packed_forward", torch::autograd::autogradNotImplementedFallback());
}
