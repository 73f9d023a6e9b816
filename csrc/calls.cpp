// The two calls of a layer, for any backend.
#include "calls.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "cells.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace fastrnn {

using at::Tensor;

namespace {

// ---- from tensors to sizes

int cell_index(c10::string_view name) {
  const auto found =
      std::find_if(std::begin(kCells), std::end(kCells), [&](const CellInfo& c) { return name == c.name; });
  if (found != std::end(kCells)) return int(found - std::begin(kCells));
  std::string known;
  for (const CellInfo& cell : kCells) known += (known.empty() ? "" : ", ") + std::string(cell.name);
  TORCH_CHECK_VALUE(false, "cell: expected one of ", known, ", got ", name);
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "x: expected float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
}

}  // namespace

void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK(tensor.device() == like.device(), name, ": expected device ", like.device(), " as x, got ",
              tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ", tensor.sizes());
}

namespace {

const Tensor* check_dense(const char* name, OptionalTensor& tensor, at::IntArrayRef shape, const Tensor& x,
                          at::ScalarType dtype) {
  if (!tensor) return nullptr;
  check(name, *tensor, shape, x, dtype);
  tensor = tensor->contiguous();
  return &*tensor;
}

// One tensor per direction, or none at all where `optional`.
void check_list(const char* name, std::vector<Tensor>& list, at::IntArrayRef shape, size_t directions, bool optional,
                const Tensor& x) {
  if (optional && list.empty()) return;
  TORCH_CHECK_VALUE(list.size() == directions, name, ": expected ", directions, " tensors (one per direction), got ",
                    list.size());
  for (Tensor& tensor : list) {
    check(name, tensor, shape, x, x.scalar_type());
    tensor = tensor.contiguous();
  }
}

// Reads each length once, before any kernel; [0, T] is what the kernels rely on.
void check_lengths(const Tensor& lengths, int64_t T) {
  const int64_t* begin = lengths.const_data_ptr<int64_t>();
  const auto bad = std::find_if(begin, begin + lengths.numel(), [T](int64_t n) { return n < 0 || n > T; });
  TORCH_CHECK_VALUE(bad == begin + lengths.numel(), "lengths: expected values in [0, ", T, "], got ", *bad,
                    " at index ", bad - begin);
}

const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
const void* pointer(const std::vector<Tensor>& list, int d) {
  return list.empty() ? nullptr : list[d].const_data_ptr();
}

int cpu_threads() { return std::max(1, std::min(at::get_num_threads(), cpu::available_cpus())); }

}  // namespace

void add_weights(Layer& layer, Inputs& in, c10::string_view cell, const Tensor& like) {
  TORCH_CHECK_VALUE(in.w_hh.size() == 1 || in.w_hh.size() == 2, "w_hh: expected 1 or 2 directions, got ",
                    in.w_hh.size());
  TORCH_CHECK_VALUE(in.w_hh[0].dim() == 2, "w_hh: expected 2 dimensions, got shape ", in.w_hh[0].sizes());
  layer.cell = cell_index(cell);
  const CellInfo& info = kCells[layer.cell];
  layer.H = in.w_hh[0].size(0) / info.gates, layer.P = in.w_hh[0].size(1), layer.D = int(in.w_hh.size());
  layer.projected = !in.w_hr.empty();
  TORCH_CHECK_VALUE(layer.I >= 0 && layer.H > 0 && layer.P > 0, "x, w_hh: sizes must be positive, got ", layer.I,
                    " inputs, ", in.w_hh[0].sizes());
  TORCH_CHECK_VALUE(layer.projected ? info.has_cell : layer.P == layer.H,
                    "w_hh: expected [gates*H, H], or w_hr as well (only with lstm), got ", in.w_hh[0].sizes());

  const int64_t gates = info.gates * layer.H;
  check_list("w_ih", in.w_ih, {gates, layer.I}, layer.D, false, like);
  check_list("w_hh", in.w_hh, {gates, layer.P}, layer.D, false, like);
  check_list("b_ih", in.b_ih, {gates}, layer.D, true, like);
  check_list("b_hh", in.b_hh, {gates}, layer.D, true, like);
  check_list("w_hr", in.w_hr, {layer.P, layer.H}, layer.D, true, like);
  for (int d = 0; d < layer.D; ++d)
    layer.weights[d] = {pointer(in.w_ih, d), pointer(in.w_hh, d), pointer(in.b_ih, d), pointer(in.b_hh, d),
                        pointer(in.w_hr, d)};
}

namespace {

// Checks the states, lengths and resets, and fills in everything but the weights and the outputs.
void add_inputs(Layer& layer, Inputs& in) {
  const bool has_cell = kCells[layer.cell].has_cell;
  const at::ScalarType dtype = in.x.scalar_type();
  in.x = in.x.contiguous();
  check_dense("h0", in.h0, {layer.D, layer.B, layer.P}, in.x, dtype);
  if (!has_cell) in.c0.reset();
  check_dense("c0", in.c0, {layer.D, layer.B, layer.H}, in.x, dtype);
  // Elsewhere a look at the values would wait for the device; kernels clamp them.
  const bool given = check_dense("lengths", in.lengths, {layer.B}, in.x, at::kLong);
  if (given && in.lengths->is_cpu()) check_lengths(*in.lengths, layer.T);
  check_dense("resets", in.resets, {layer.T, layer.B}, in.x, at::kBool);
  layer.threads = cpu_threads();
  layer.x = in.x.const_data_ptr(), layer.h0 = pointer(in.h0), layer.c0 = pointer(in.c0);
  layer.lengths = in.lengths ? in.lengths->const_data_ptr<int64_t>() : nullptr;
  layer.resets = in.resets ? in.resets->const_data_ptr<bool>() : nullptr;
}

Layer layer_of(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected 3 dimensions [T, B, I], got shape ", x.sizes());
  Layer layer = {};
  layer.dtype = dtype_of(x);
  layer.T = x.size(0), layer.B = x.size(1), layer.I = x.size(2);
  return layer;
}

}  // namespace

Layer make_layer(Inputs& in, c10::string_view cell) {
  Layer layer = layer_of(in.x);
  add_weights(layer, in, cell, in.x);
  add_inputs(layer, in);
  return layer;
}

Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor tensor = at::empty(sizes, options);
  if (tensor.is_cpu()) cpu::prefer_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

// ---- forward

Outputs run_forward(const Backend& backend, Layer layer, const at::TensorOptions& options, bool save, bool recompute) {
  const CellInfo& info = kCells[layer.cell];
  const int64_t saved_vectors = info.saved + layer.projected;
  const auto accumulator = options.dtype(layer.dtype == DType::kFloat64 ? at::kDouble : at::kFloat);

  Tensor y = empty_large({layer.T, layer.B, layer.D * layer.P}, options);
  Tensor h_n = at::empty({layer.D, layer.B, layer.P}, options);
  Tensor c_n = at::empty({info.has_cell ? layer.D : 0, layer.B, layer.H}, options);
  Tensor saved = empty_large({save && !recompute ? layer.D : 0, layer.T, layer.B, saved_vectors, layer.H}, options);
  Tensor saved_c = empty_large({save && info.has_cell ? layer.D : 0, layer.T, layer.B, layer.H}, accumulator);
  layer.y = y.data_ptr(), layer.h_n = h_n.data_ptr(), layer.c_n = info.has_cell ? c_n.data_ptr() : nullptr;
  layer.saved = saved.numel() ? saved.data_ptr() : nullptr;
  layer.saved_c = save && info.has_cell ? saved_c.data_ptr() : nullptr;
  backend.forward(layer, options);
  return {y, h_n, c_n, saved, saved_c};
}

Outputs forward_call(const Backend& backend, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                     at::TensorList w_ih, at::TensorList w_hh, at::TensorList b_ih, at::TensorList b_hh,
                     at::TensorList w_hr, const OptionalTensor& lengths, const OptionalTensor& resets,
                     c10::string_view cell, bool save, bool recompute) {
  Inputs in{x, h0, c0, w_ih.vec(), w_hh.vec(), b_ih.vec(), b_hh.vec(), w_hr.vec(), lengths, resets};
  return run_forward(backend, make_layer(in, cell), x.options(), save, recompute);
}

// ---- backward

namespace {

// A gradient for each tensor of the list, or empty tensors where it is not wanted.
std::vector<Tensor> grads_like(const std::vector<Tensor>& list, bool wanted) {
  std::vector<Tensor> grads;
  for (const Tensor& tensor : list)
    grads.push_back(wanted ? empty_large(tensor.sizes(), tensor.options()) : at::empty({0}, tensor.options()));
  return grads;
}

void* pointer(std::vector<Tensor>& grads, int d) {
  return grads.empty() || !grads[d].numel() ? nullptr : grads[d].data_ptr();
}

}  // namespace

Gradients backward_call(const Backend& backend, const OptionalTensor& grad_y, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& x, const OptionalTensor& h0,
                        const OptionalTensor& c0, at::TensorList w_ih, at::TensorList w_hh, at::TensorList b_ih,
                        at::TensorList b_hh, at::TensorList w_hr, const OptionalTensor& lengths,
                        const OptionalTensor& resets, const Tensor& y, const Tensor& saved, const Tensor& saved_c,
                        c10::string_view cell, const c10::List<bool>& wanted) {
  Inputs in{x, h0, c0, w_ih.vec(), w_hh.vec(), b_ih.vec(), b_hh.vec(), w_hr.vec(), lengths, resets};
  Layer layer = make_layer(in, cell);
  const CellInfo& info = kCells[layer.cell];
  TORCH_CHECK_VALUE(wanted.size() == 8, "wanted: expected 8 flags, one per output, got ", wanted.size());
  const at::ScalarType dtype = x.scalar_type(), accumulator = layer.dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
  const int64_t saved_vectors = info.saved + layer.projected;
  OptionalTensor dy = grad_y, dh_n = grad_h_n, dc_n = grad_c_n, out = y, gates = saved, cells = saved_c;
  check_dense("grad_y", dy, {layer.T, layer.B, layer.D * layer.P}, x, dtype);
  check_dense("grad_h_n", dh_n, {layer.D, layer.B, layer.P}, x, dtype);
  if (!info.has_cell) dc_n.reset();
  check_dense("grad_c_n", dc_n, {layer.D, layer.B, layer.H}, x, dtype);
  check_dense("y", out, {layer.T, layer.B, layer.D * layer.P}, x, dtype);
  const int64_t saved_directions = saved.size(0) ? layer.D : 0;  // 0: recompute
  check_dense("saved", gates, {saved_directions, layer.T, layer.B, saved_vectors, layer.H}, x, dtype);
  check_dense("saved_c", cells, {info.has_cell ? layer.D : 0, layer.T, layer.B, layer.H}, x, accumulator);
  layer.y = out->data_ptr(), layer.saved = gates->data_ptr(), layer.saved_c = cells->data_ptr();

  const auto states = [&](bool want, int64_t size) {
    return at::empty({want ? layer.D : 0, layer.B, size}, x.options());
  };
  Tensor dx = empty_large(wanted[0] ? in.x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor dh0 = states(wanted[1], layer.P), dc0 = states(wanted[2] && info.has_cell, layer.H);
  std::vector<Tensor> dw_ih = grads_like(in.w_ih, wanted[3]), dw_hh = grads_like(in.w_hh, wanted[4]),
                      db_ih = grads_like(in.b_ih, wanted[5]), db_hh = grads_like(in.b_hh, wanted[6]),
                      dw_hr = grads_like(in.w_hr, wanted[7]);
  LayerGrads grads = {};
  grads.y = pointer(dy), grads.h_n = pointer(dh_n), grads.c_n = pointer(dc_n);
  grads.x = wanted[0] ? dx.data_ptr() : nullptr, grads.h0 = wanted[1] ? dh0.data_ptr() : nullptr;
  grads.c0 = wanted[2] && info.has_cell ? dc0.data_ptr() : nullptr;
  for (int d = 0; d < layer.D; ++d)
    grads.weights[d] = {pointer(dw_ih, d), pointer(dw_hh, d), pointer(db_ih, d), pointer(db_hh, d), pointer(dw_hr, d)};

  backend.backward(layer, grads, x.options());
  return {dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr};
}

std::string explain_call(const Backend& backend, const Tensor& x, c10::string_view cell, int64_t H, int64_t P,
                         int64_t D, bool projected, bool training) {
  Layer layer = layer_of(x);
  layer.cell = cell_index(cell), layer.H = H, layer.P = P, layer.D = int(D), layer.projected = projected;
  layer.threads = cpu_threads();
  TORCH_CHECK_VALUE(H > 0 && P > 0 && (D == 1 || D == 2),
                    "explain: expected units, outputs and 1 or 2 directions, got ", H, ", ", P, " and ", D);
  return backend.explain(layer, x.options(), training);
}

}  // namespace fastrnn
