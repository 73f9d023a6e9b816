// Products of int8 numbers, for weights="int8": what the kernels of all instruction sets know of them. They are a file
// of their own, int8.cpp, since more instruction sets differ in them: it is compiled once for each.
//
//   out[r][c] = init[c] + a.scales[r] * scale[c] * sum_k a[r][k] * w[k][c]
//
// The sum is of integers and exact (up to K = 131072): all instruction sets leave the same bits.
//
// Packing. A panel is as in panels.h, C vector columns of L lanes, with four k side by side in each lane: row i of it
// has k = 4i to 4i + 3. Two rows follow: of -128 times the sum of each column's weights, for instructions that want one
// operand without sign, and of each column's scale.
#pragma once

#include <stdint.h>

namespace fastrnn::cpu {

// One lane of a panel.
union Int8Lane {
  int8_t weights[4];
  int32_t offset;
  float scale;
};

// Row r is scales[r] times the numbers from data + r * row_stride on; there are zeros up to a multiple of 4.
struct Int8Rows {
  const int8_t* data;
  int64_t row_stride;
  const float* scales;
};

// For a fixed number of rows, panels and vectors in a panel. `init_stride` 0 gives every row the same start; init null
// starts at 0. Panels lie panel_stride lanes apart.
using Int8Tile = void (*)(Int8Rows a, const Int8Lane* w, int64_t panel_stride, int64_t K, const float* init,
                          int64_t init_stride, float* out, int64_t out_stride);

// The one for `vectors` of a panel, on the instruction set in use.
Int8Tile int8_tile(int vectors, int rows, int panels);

}  // namespace fastrnn::cpu
