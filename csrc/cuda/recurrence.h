// The recurrence of one layer on the GPU: everything that needs one time step after the other. The large products
// around it (W_ih x, the gradients of x and of the weights) are the caller's.
//
// Every call puts its work on `stream` and returns at once. `workspace` is device memory, 256-byte aligned, whose
// content means nothing before or after; it may be freed when the stream has come so far. All arrays of Layer and
// LayerGrads are on the device of the stream, which is the current one.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include "../layer.h"
#include "choose.h"
#include "stream.h"

namespace fastrnn::cuda {

Chip current_chip();  // of the current device

// W_ih x of all steps without biases, in storage: gate g of unit u of direction d and row r of [T*B] is
// data[d * direction + r * row + g * H + u].
struct Projection {
  const void* data;
  int64_t direction, row;
};

// A product of all rows at once, which the caller's matrix library makes on `stream`, for paths of Level::kGemm:
// to [rows, columns], in the accumulator's type, = a [rows, depth] b, in storage. Rows of a are `pitch` numbers apart;
// b is [depth, columns] or, if transposed, [columns, depth].
struct MatrixProduct {
  int64_t rows, depth, columns;
  const void* a;
  int64_t pitch;
  const void* b;
  bool transposed;
  void* to;
};
using Multiply = std::function<void(const MatrixProduct&)>;

// The device did not hold all blocks of a path at once when they were launched, although it had said that it would:
// others may use a part of it. Nothing has run; limit_groups (choose.h) to none gives a path that needs no such thing.
struct LaunchRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Whether this process has the kernels of a cell for a storage type, a variant of kernels.h.
bool has_kernels(int cell, int variant);

// Adds those of a library (added_kernels.h); those that are there stay. Throws std::runtime_error.
void load_kernels(int cell, int variant, const std::string& path);

// Whether the projection of a row may lie where its saved vectors will: [D, T, B, S*H], from its first number on.
bool may_project_into_saved(const Layer& layer);

// The path that will be taken: what `choose` says, unless the device turns out not to hold all blocks at once. Here and
// below: throws std::runtime_error where there are no kernels.
Path forward_path(const Layer& layer);
size_t forward_workspace(const Layer& layer, const Path& path);
// Here and below: throws LaunchRefused if the path is persistent.
void forward(const Layer& layer, const Path& path, const Projection& projection, void* workspace,
             const Multiply& multiply, Stream stream);

// What backward leaves for the large products, in storage; 0 where a row is not active. Hp, Pp: rounded up to 8.
struct GateGrads {
  void* gates;      // [D, T, B, J, Hp], J = kGrads of the cell
  void* projected;  // [D, T, B, Pp] dL/dh_t in full, or null: no projection
};

// Of grads, reads y, h_n and c_n, and writes h0 and c0. Of layer, reads the states, w_hh, w_hr, y, saved and saved_c.
Path backward_path(const Layer& layer);
size_t backward_workspace(const Layer& layer, const Path& path);
void backward(const Layer& layer, const LayerGrads& grads, const Path& path, const GateGrads& out, void* workspace,
              const Multiply& multiply, Stream stream);

// The h that each row of [T, B] had before its step, 0 where the row is not active: to [T*B, P], in storage.
void previous_h(const Layer& layer, int d, void* to, Stream stream);

}  // namespace fastrnn::cuda
