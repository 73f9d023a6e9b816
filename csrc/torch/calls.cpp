// The two calls of a layer, for any backend.
#include "calls.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <iterator>

#include "../cells.h"
#include "../cpu/memory.h"
#include "../cpu/threads.h"
#include "fork.h"
#include "precision.h"

namespace fastrnn {

using at::Tensor;

namespace {

// ---- from tensors to sizes

int cell_index(c10::string_view name) {
  const int found = find_cell(name);
  if (found >= 0) return found;
  std::string known;
  for (const std::string& cell : cell_names()) known += (known.empty() ? "" : ", ") + cell;
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

// Reads each length once, before any kernel; [0, T] is what the kernels rely on.
void check_lengths(const Tensor& lengths, int64_t T) {
  const int64_t* begin = lengths.const_data_ptr<int64_t>();
  const auto bad = std::find_if(begin, begin + lengths.numel(), [T](int64_t n) { return n < 0 || n > T; });
  TORCH_CHECK_VALUE(bad == begin + lengths.numel(), "lengths: expected values in [0, ", T, "], got ", *bad,
                    " at index ", bad - begin);
}

// Of an array whose first dimension, of steps or directions, a single step's tensors do not have.
at::IntArrayRef shape_of(const Inputs& in, at::IntArrayRef shape) { return shape.slice(in.is_step ? 1 : 0); }

const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// ---- the list of weights

struct WeightKind {
  const char* name;
  const void* Weights::* of;
  void* WeightGrads::* grad;
};

constexpr WeightKind kWeightKinds[] = {
    {"w_ih", &Weights::w_ih, &WeightGrads::w_ih}, {"w_hh", &Weights::w_hh, &WeightGrads::w_hh},
    {"b_ih", &Weights::b_ih, &WeightGrads::b_ih}, {"b_hh", &Weights::b_hh, &WeightGrads::b_hh},
    {"w_hr", &Weights::w_hr, &WeightGrads::w_hr}, {"w_own", &Weights::w_own, &WeightGrads::w_own}};

// The weights of a direction with `count` tensors, as indices in kWeightKinds; empty if no such number can be. Those of
// the cell are there in any case; there are as many biases as products, or none.
std::vector<int> kinds_of_weights(const CellInfo& cell, size_t count) {
  const bool is_recurrent = cell.recurrent_gates() > 0, has_own = cell.own_rows() > 0;
  for (const bool has_biases : {false, true})
    for (const bool is_projected : {false, true}) {
      const bool present[] = {true, is_recurrent, has_biases, has_biases && is_recurrent, is_projected, has_own};
      std::vector<int> kinds;
      for (int kind = 0; kind < int(std::size(present)); ++kind)
        if (present[kind]) kinds.push_back(kind);
      if (kinds.size() == count && (!is_projected || is_recurrent)) return kinds;
    }
  return {};
}

// What a cell without a state c has in its place: an array without directions.
int64_t carried_directions(const Layer& layer) { return cell_info(layer.cell).carried ? layer.D : 0; }
int64_t carried_size(const Layer& layer) { return std::max(1, cell_info(layer.cell).carried) * layer.H; }

// A single step of few rows is not worth the rounding: it is bound by the reading of the weights as they are.
Products products_for(Layer layer, const Tensor& x) {
  layer.products = products_of(layer, {});
  return x.is_cpu() && !reads_weights_in_place(layer) ? layer.products : Products::kExact;
}

int cpu_threads() { return std::max(1, std::min(at::get_num_threads(), cpu::available_cpus())); }

}  // namespace

// FSDP frees the memory of the weights that it has gathered, and keeps the tensors.
static void check_memory(const Tensor& weight) {
  TORCH_CHECK(
      weight.numel() == 0 || !weight.has_storage() || weight.storage().nbytes() > 0,
      "weights: their memory was freed. FSDP keeps none between calls of the module that it was given: call that "
      "one. For a backward pass it gathers them by a hook on the module's results, which an in-place operation "
      "on one that is a view (y += x) takes off: use y = y + x");
}

void add_weights(Layer& layer, Inputs& in, const Tensor& like) {
  TORCH_CHECK_VALUE(in.directions == 1 || in.directions == 2, "directions: expected 1 or 2, got ", in.directions);
  const size_t count = in.weights.size() / in.directions;
  set_cell(layer, cell_index(in.cell));
  const CellInfo& info = cell_info(layer.cell);
  const std::vector<int> kinds = kinds_of_weights(info, count);
  TORCH_CHECK_VALUE(
      in.weights.size() % in.directions == 0 && !kinds.empty(), "weights: expected w_ih, ",
      info.recurrent_gates() ? "w_hh, both biases or none, and w_hr if there is a projection" : "and b_ih or not",
      info.own_rows() ? ", and w_own" : "", ", for each of ", in.directions, " directions, got ", in.weights.size(),
      " tensors");
  const Tensor& sized = in.weights[info.recurrent_gates() ? 1 : 0];
  const char* const name = info.recurrent_gates() ? "w_hh" : "w_ih";
  TORCH_CHECK_VALUE(sized.dim() == 2, name, ": expected 2 dimensions, got shape ", sized.sizes());
  layer.D = int(in.directions);
  layer.H = sized.size(0) / (info.recurrent_gates() ? info.recurrent_gates() : info.gates);
  layer.P = info.recurrent_gates() ? sized.size(1) : layer.H;
  layer.projected = std::find(kinds.begin(), kinds.end(), 4) != kinds.end();
  TORCH_CHECK_VALUE(layer.I >= 0 && layer.H > 0 && layer.P > 0, "x, ", name, ": sizes must be positive, got ", layer.I,
                    " inputs, ", sized.sizes());
  TORCH_CHECK_VALUE(layer.projected ? info.may_project : layer.P == layer.H,
                    "w_hh: expected [gates*H, H], or w_hr as well (only with lstm), got ", sized.sizes());

  const int64_t gates = info.gates * layer.H, recurrent = info.recurrent_gates() * layer.H;
  const int64_t of_w_ih[] = {gates, layer.I}, of_w_hh[] = {recurrent, layer.P}, of_w_hr[] = {layer.P, layer.H};
  const int64_t of_w_own[] = {info.own_rows(), layer.H};
  const at::IntArrayRef shapes[] = {of_w_ih, of_w_hh, gates, recurrent, of_w_hr, of_w_own};
  for (size_t i = 0; i < in.weights.size(); ++i) {
    const int kind = kinds[i % count];
    check(kWeightKinds[kind].name, in.weights[i], shapes[kind], like, like.scalar_type());
    check_memory(in.weights[i]);
    in.weights[i] = in.weights[i].contiguous();
    layer.weights[i / count].*kWeightKinds[kind].of = in.weights[i].const_data_ptr();
  }
}

namespace {

// Checks the states, lengths and resets, and fills in everything but the weights and the outputs.
void add_inputs(Layer& layer, Inputs& in) {
  const CellInfo& info = cell_info(layer.cell);
  const at::ScalarType dtype = in.x.scalar_type();
  in.x = in.x.contiguous();
  check_dense("h0", in.h0, shape_of(in, {layer.D, layer.B, layer.P}), in.x, dtype);
  if (!info.carried) in.c0.reset();
  check_dense("c0", in.c0, shape_of(in, {layer.D, layer.B, carried_size(layer)}), in.x, dtype);
  // Elsewhere a look at the values would wait for the device; kernels clamp them.
  const bool given = check_dense("lengths", in.lengths, {layer.B}, in.x, at::kLong);
  if (given && in.lengths->is_cpu()) check_lengths(*in.lengths, layer.T);
  check_dense("resets", in.resets, {layer.T, layer.B}, in.x, at::kBool);
  TORCH_CHECK_VALUE(in.masks.has_value() == (info.masks > 0), "masks: expected ", info.masks ? "those" : "none",
                    " of cell ", info.name, ", got ", in.masks ? "some" : "none");
  if (in.masks) {
    layer.mask_steps = in.masks->dim() == 4 && in.masks->size(1) == 1 ? 1 : layer.T;
    check_dense("masks", in.masks, {layer.D, layer.mask_steps, layer.B, info.masks * layer.H}, in.x, dtype);
  }
  layer.threads = cpu_threads();
  layer.masks = pointer(in.masks);
  layer.x = in.x.const_data_ptr(), layer.h0 = pointer(in.h0), layer.c0 = pointer(in.c0);
  layer.lengths = in.lengths ? in.lengths->const_data_ptr<int64_t>() : nullptr;
  layer.resets = in.resets ? in.resets->const_data_ptr<bool>() : nullptr;
}

Layer layer_of(const Tensor& x, bool is_step = false) {
  TORCH_CHECK_VALUE(x.dim() == (is_step ? 2 : 3), "x: expected 3 dimensions [T, B, I], got shape ", x.sizes());
  Layer layer = {};
  layer.dtype = dtype_of(x);
  layer.T = is_step ? 1 : x.size(0), layer.B = x.size(-2), layer.I = x.size(-1);
  return layer;
}

}  // namespace

Layer make_layer(Inputs& in) {
  Layer layer = layer_of(in.x, in.is_step);
  add_weights(layer, in, in.x);
  add_inputs(layer, in);
  layer.products = products_for(layer, in.x);
  return layer;
}

Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor tensor = at::empty(sizes, options);
  if (tensor.is_cpu()) cpu::prefer_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

// ---- forward

std::array<Tensor, 3> add_outputs(Layer& layer, const Inputs& in, bool is_read_alone) {
  const at::TensorOptions options = in.x.options();
  const int64_t with_c = carried_directions(layer), of_c[] = {with_c, layer.B, carried_size(layer)};
  is_read_alone = is_read_alone && in.is_step;
  const Tensor y = empty_large(shape_of(in, {layer.T, layer.B, layer.D * layer.P}), options);
  const Tensor h_n = is_read_alone ? y : at::empty(shape_of(in, {layer.D, layer.B, layer.P}), options);
  Tensor c_n;
  if (with_c || !is_read_alone) c_n = at::empty(with_c ? shape_of(in, of_c) : at::IntArrayRef(of_c), options);
  layer.y = y.data_ptr(), layer.h_n = h_n.data_ptr(), layer.c_n = with_c ? c_n.data_ptr() : nullptr;
  return {y, h_n, c_n};
}

Outputs forward_call(const Backend& backend, Inputs in, bool save, bool recompute) {
  leave_openmp_after_fork();
  Layer layer = make_layer(in);
  const CellInfo& info = cell_info(layer.cell);
  TORCH_CHECK_NOT_IMPLEMENTED(!recompute || !info.is_normalized(), "recompute: expected false with cell ", info.name,
                              ", which has layer normalization");
  const at::TensorOptions options = in.x.options();
  const auto accumulator = options.dtype(layer.dtype == DType::kFloat64 ? at::kDouble : at::kFloat);
  const int64_t saved_vectors = info.saved + layer.projected, with_c = carried_directions(layer);
  const auto [y, h_n, c_n] = add_outputs(layer, in, false);
  Tensor saved = empty_large({save && !recompute ? layer.D : 0, layer.T, layer.B, saved_vectors, layer.H}, options);
  Tensor saved_c = empty_large({save ? with_c : 0, layer.T, layer.B, carried_size(layer)}, accumulator);
  layer.saved = saved.numel() ? saved.data_ptr() : nullptr;
  layer.saved_c = save && with_c ? saved_c.data_ptr() : nullptr;
  backend.forward(layer, options);
  return {y, h_n, c_n, saved, saved_c};
}

// ---- backward

namespace {

// Checks everything, and fills it in.
void add_saved(Layer& layer, LayerGrads& grads, Saved& in, const Inputs& inputs) {
  const Tensor& x = inputs.x;
  const CellInfo& info = cell_info(layer.cell);
  const int64_t with_c = carried_directions(layer);
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType accumulator = layer.dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
  check_dense("grad_y", in.grad_y, shape_of(inputs, {layer.T, layer.B, layer.D * layer.P}), x, dtype);
  check_dense("grad_h_n", in.grad_h_n, shape_of(inputs, {layer.D, layer.B, layer.P}), x, dtype);
  if (!with_c) in.grad_c_n.reset();
  check_dense("grad_c_n", in.grad_c_n, shape_of(inputs, {layer.D, layer.B, carried_size(layer)}), x, dtype);
  check_dense("y", in.y, shape_of(inputs, {layer.T, layer.B, layer.D * layer.P}), x, dtype);
  TORCH_CHECK_VALUE(in.saved->dim() == 5, "saved: expected 5 dimensions, got shape ", in.saved->sizes());
  const int64_t directions = in.saved->size(0) || info.is_normalized() ? layer.D : 0;  // 0: recompute
  check_dense("saved", in.saved, {directions, layer.T, layer.B, info.saved + layer.projected, layer.H}, x, dtype);
  check_dense("saved_c", in.saved_c, {with_c, layer.T, layer.B, carried_size(layer)}, x, accumulator);
  if (!with_c) in.grad_saved_c.reset();
  check_dense("grad_saved_c", in.grad_saved_c, {with_c, layer.T, layer.B, carried_size(layer)}, x, accumulator);
  check_dense("grad_values", in.grad_values, {layer.D, layer.T, layer.B, info.grads, layer.H}, x, dtype);
  layer.y = in.y->data_ptr(), layer.saved = in.saved->data_ptr(), layer.saved_c = in.saved_c->data_ptr();
  grads.y = pointer(in.grad_y), grads.h_n = pointer(in.grad_h_n), grads.c_n = pointer(in.grad_c_n);
  grads.saved_c = pointer(in.grad_saved_c), grads.values = pointer(in.grad_values);
}

}  // namespace

std::vector<Tensor> backward_call(const Backend& backend, Inputs in, Saved saved, const c10::List<bool>& wanted,
                                  bool steps) {
  leave_openmp_after_fork();
  const at::TensorOptions options = in.x.options();
  Layer layer = make_layer(in);
  LayerGrads grads = {};
  add_saved(layer, grads, saved, in);
  TORCH_CHECK_NOT_IMPLEMENTED(!cell_info(layer.cell).is_normalized() || !grads.values,
                              "grad_values: ", "expected none with cell ", in.cell, ", which has layer normalization");
  TORCH_CHECK_VALUE(wanted.size() == 3 + in.weights.size(), "wanted: expected ", 3 + in.weights.size(),
                    " flags, of x, h0, c0 and each weight, got ", wanted.size());

  std::vector<Tensor> results;
  const auto result = [&](at::IntArrayRef sizes) {
    const bool want = wanted[results.size()];
    results.push_back(want ? empty_large(sizes, options) : at::empty({0}, options));
    return want ? results.back().data_ptr() : nullptr;
  };
  grads.x = result(in.x.sizes()), grads.h0 = result(shape_of(in, {layer.D, layer.B, layer.P}));
  const int64_t of_c0[] = {carried_directions(layer), layer.B, carried_size(layer)};
  grads.c0 = result(of_c0[0] ? shape_of(in, of_c0) : at::IntArrayRef(of_c0));
  const size_t count = in.weights.size() / in.directions;
  const std::vector<int> kinds = kinds_of_weights(cell_info(layer.cell), count);
  for (size_t i = 0; i < in.weights.size(); ++i)
    grads.weights[i / count].*kWeightKinds[kinds[i % count]].grad = result(in.weights[i].sizes());
  if (steps) {
    const int64_t vectors = cell_info(layer.cell).grads;
    results.push_back(empty_large({layer.D, layer.T, layer.B, vectors, layer.H}, options));
    grads.steps = results.back().data_ptr();
  }
  backend.backward(layer, grads, options);
  return results;
}

std::string explain_call(const Backend& backend, const Tensor& x, c10::string_view cell, int64_t H, int64_t P,
                         int64_t D, bool projected, bool training, OptionalName rounded) {
  Layer layer = layer_of(x);
  set_cell(layer, cell_index(cell)), layer.H = H, layer.P = P, layer.D = int(D), layer.projected = projected;
  layer.threads = cpu_threads();
  layer.products = rounded ? products_of(layer, rounded) : products_for(layer, x);
  TORCH_CHECK_VALUE(H > 0 && P > 0 && (D == 1 || D == 2),
                    "explain: expected units, outputs and 1 or 2 directions, got ", H, ", ", P, " and ", D);
  return backend.explain(layer, x.options(), training);
}

}  // namespace fastrnn
