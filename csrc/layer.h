// One layer, both directions, all time steps: the struct that goes from the PyTorch op down to every backend.
// Plain sizes and pointers; no torch header. All arrays are dense and row-major; the caller owns all of them.
//
//   T steps, B rows (sequences), I inputs, H units, P outputs (P = H unless the LSTM has a projection), D directions
//   Of the cell (cells/cell.h): G = kGates, R = kFirstGates + kSecondGates, K = kCarried,
//   U = kUnitWeights + kGains,
//   M = kMasks, J = kGrads, S = kSaved (+ 1 with a projection: the hidden vector before it)
//   "storage" is dtype; "accumulator" is float, or double for Float64
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "host_device.h"

namespace fastrnn {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// How the CPU computes the products of a float32 layer. States, sums and everything pointwise are float32 throughout.
enum class Products : int {
  kExact,
  kBFloat16Weights,  // weights rounded to bfloat16; forward alone
  kBFloat16,         // weights and what they multiply rounded to bfloat16, where an instruction multiplies those
  kInt8,  // both quantized to int8, by row of a weight and by row and step of what it multiplies; forward alone
};

// What a kernel is compiled for: a dtype with exact products, or float32 with others.
enum Variant : int {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kBFloat16Weights,
  kBFloat16Products,
  kInt8Products,
  kVariants
};

struct Weights {
  const void* w_ih;   // [G*H, I] storage
  const void* w_hh;   // [R*H, P] storage, or null: R = 0
  const void* b_ih;   // [G*H] storage, or null
  const void* b_hh;   // [R*H] storage, or null
  const void* w_hr;   // [P, H] storage, or null: no projection
  const void* w_own;  // [U, H] storage, or null: U = 0
};

struct WeightGrads {
  void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *w_own;  // shapes as in Weights; null: not wanted
};

struct Layer {
  int cell;                            // its index, see cells.h, and what is read of its description:
  int gates, recurrent, unit_weights;  // G, R, U
  int gains;                           // of its normalized products, G + R or 0: the last of the U rows of w_own
  DType dtype;
  int64_t T, B, I, H, P;
  int D;
  bool projected;    // whether there is a w_hr
  int threads;       // CPU: at most so many threads work on this call
  bool tf32;         // GPU: products of the steps may round float32 operands to TF32
  bool matmul_tf32;  // GPU: products by a matrix library do so

  const void* x;   // [T, B, I] storage
  const void* h0;  // [D, B, P] storage, or null: zeros
  const void* c0;  // [D, B, K, H] storage, or null: zeros
  Weights weights[2];
  const void* masks;       // [D, mask_steps, B, M, H] storage, or null: M = 0
  int64_t mask_steps;      // T, or 1: the same in all steps
  const void* packed;      // forward: the weights as pack() left them, `weights` is then not read; or null
  Products products;       // CPU: kExact unless dtype is kFloat32
  const int64_t* lengths;  // [B], 0 <= lengths[b] <= T, or null: all T
  const bool* resets;      // [T, B], or null: none

  void* y;        // [T, B, D*P] storage, directions side by side; 0 where t >= lengths[b]
  void* h_n;      // [D, B, P] storage
  void* c_n;      // [D, B, K, H] storage, or null: K = 0
  void* saved;    // [D, T, B, S, H] storage, or null: not wanted (backward computes it again); 0 where t >= lengths[b]
  void* saved_c;  // [D, T, B, K, H] accumulator, or null: no gradient is asked for, or K = 0
};

struct LayerGrads {
  const void* y;        // dL/dy [T, B, D*P] storage, or null: zeros
  const void* h_n;      // dL/dh_n [D, B, P] storage, or null: zeros
  const void* c_n;      // dL/dc_n [D, B, K, H] storage, or null: zeros
  const void* saved_c;  // dL/dc_t of every step [D, T, B, K, H] accumulator, or null: zeros
  const void* values;   // what is added to each step's gate gradients [D, T, B, J, H] storage, or null: nothing

  void* x;   // dL/dx [T, B, I] storage, or null: not wanted
  void* h0;  // dL/dh0 [D, B, P] storage, or null: not wanted
  void* c0;  // dL/dc0 [D, B, K, H] storage, or null: not wanted
  WeightGrads weights[2];
  void* steps;  // what each step's gate gradients are [D, T, B, J, H] storage, J = kGrads, or null: not wanted
};

enum : int64_t {
  kMaxInt8Depth = 131072,  // inputs, units or outputs with Products::kInt8: sums of so many products fit into 32 bits
  kMaxInPlaceRows = 4,     // T*B
  kMaxStepRows = 128,      // B of a single step
  kInPlaceLengthPerRow = 20,  // I + P of a single step, by B
  kMinKeptWeights = 65536,    // of a gate: about 1 MB of an LSTM's
  kMaxKeptRows = 1024,        // T*B
};

constexpr double kNormEpsilon = 1e-5;  // of layer normalization, as torch.nn.LayerNorm's

static inline Variant variant_of(const Layer& layer) {
  return Variant(layer.products == Products::kExact ? int(layer.dtype) : 3 + int(layer.products));
}

// The masks of a row at a time, [M, H], as an offset in `masks`.
static inline int64_t mask_offset(const Layer& layer, int d, int64_t t, int64_t b, int64_t masks) {
  const int64_t step = layer.mask_steps == 1 ? 0 : t;
  return ((d * layer.mask_steps + step) * layer.B + b) * masks * layer.H;
}

// Whether the weights are rounded at the user's word, so that every call has to read rounded ones.
static inline bool rounds_weights(const Layer& layer) {
  return layer.products == Products::kBFloat16Weights || layer.products == Products::kInt8;
}

// Whether forward reads the weights where they lie: so few rows that packing would cost more than the products. Of a
// single step the longer a row of a weight is, the less it matters that its products have to be added up in the end.
// Weights of 16 bits, and those that are rounded to 16, are packed for less.
static inline bool reads_weights_in_place(const Layer& layer) {
  if (layer.packed || rounds_weights(layer) || layer.projected || layer.gains) return false;
  const int64_t rows = layer.T * layer.B;
  const bool is_wide = layer.dtype == DType::kFloat32 || layer.dtype == DType::kFloat64;
  const bool is_exact = is_wide && layer.products == Products::kExact;
  const int64_t long_enough = (layer.I + layer.P) / kInPlaceLengthPerRow;
  return rows <= kMaxInPlaceRows || (is_exact && layer.T == 1 && rows <= long_enough && rows <= kMaxStepRows);
}

// Whether packed weights are worth the memory to keep them, and the reading of all weights to know that they are right:
// where packing is a good part of a call. Rounded ones always are.
static inline bool keeps_packs(const Layer& layer) {
  const int64_t weights = layer.D * layer.H * (layer.I + layer.P);
  return rounds_weights(layer) ||
         (weights >= kMinKeptWeights && layer.T * layer.B <= kMaxKeptRows && !reads_weights_in_place(layer));
}

// The rules for rows, in one place for every backend. A step index counts in the order of the direction: step s of the
// forward direction reads time s, step s of the reverse direction reads time T-1-s. A row of length n is active at
// times 0 to n-1, and its reverse direction starts at n-1.

// Where the state comes from that a row has before a direction reads a time: another time, or one of these.
enum : int64_t { kInitialState = -1, kZeroState = -2 };

// The time whose reset sets the state of an active row to zero before direction d reads time t, or -1: there is none.
template <class Int>
FASTRNN_HD static inline Int restart_time(int d, Int t, Int length) {
  return d == 0 ? t : t + 1 < length ? t + 1 : -1;
}

// Where the state of an active row comes from at time t if nothing restarts it there.
template <class Int>
FASTRNN_HD static inline Int carried_time(int d, Int t, Int length) {
  if (d == 0) return t - 1;  // -1 is kInitialState
  return t + 1 < length ? t + 1 : Int(kInitialState);
}

static inline bool row_is_active(const Layer& layer, int64_t t, int64_t b) {
  return !layer.lengths || t < layer.lengths[b];
}

static inline bool row_restarts(const Layer& layer, int d, int64_t t, int64_t b) {
  if (!layer.resets) return false;
  const int64_t from = restart_time(d, t, layer.lengths ? layer.lengths[b] : layer.T);
  return from >= 0 && layer.resets[from * layer.B + b];
}

static inline int64_t previous_time(const Layer& layer, int d, int64_t t, int64_t b) {
  if (row_restarts(layer, d, t, b)) return kZeroState;
  return carried_time(d, t, layer.lengths ? layer.lengths[b] : layer.T);
}

namespace cpu {

// The weights in the order in which forward reads them: for any T, B, lengths and resets of the same cell, sizes, dtype
// and products, in the same process. `packed` must be 64-byte aligned.
size_t packed_size(const Layer& layer);
void pack(const Layer& layer, void* packed);

// A 64-bit hash of what pack() would read and how. Not against an adversary who looks for collisions.
uint64_t fingerprint(const Layer& layer);

// Bytes of scratch that a call needs; `workspace` must be 64-byte aligned. What it holds means nothing before or after.
size_t forward_workspace(const Layer& layer);
void forward(const Layer& layer, void* workspace);

// Reads x, the states, the weights, y, saved and saved_c as forward left them.
size_t backward_workspace(const Layer& layer, const LayerGrads& grads);
void backward(const Layer& layer, const LayerGrads& grads, void* workspace);

}  // namespace cpu
}  // namespace fastrnn
