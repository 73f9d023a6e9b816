// Products of bfloat16 numbers on the matrix unit of a core (Intel's AMX), sixteen times as fast as multiply-adds of
// float32 vectors. Its registers are matrices of up to 16 rows of 64 bytes: 16 sums, or 32 bfloat16 numbers, in a row.
// It multiplies pairs as panels store them (panels.h) by rows of A as they lie in memory.
//
// Part of the kernels of the instruction set avx512bf16, which use it where there is one (uses_matrix_unit()).
#pragma once

#include "kernels.h"
#include "number.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Row r is data + r * row_stride.
struct BFloat16Rows {
  const BFloat16* data;
  int64_t row_stride;
};

// out[r][j] = init[r][j] + sum_k a[r][k] * w[k][j] for a fixed number of rows, and of vectors j of panels.
// `init_stride` 0 gives every row the same start; init null starts at 0. Panels lie panel_stride apart.
using BFloat16Tile = void (*)(BFloat16Rows a, const BFloat16* w, int64_t panel_stride, int64_t K, const float* init,
                              int64_t init_stride, float* out, int64_t out_stride);

constexpr int kMatrixRows = 32;       // of a tile, at most
constexpr int64_t kMatrixDepth = 32;  // numbers in a row of a register: products are added up in groups of so many

// The tile of panels of `vectors` vectors, for 1 to kMatrixRows rows; several panels for few rows alone.
BFloat16Tile matrix_tile(int vectors, int rows, int panels);

// At the end of a task that may have used the unit: its registers slow down whoever switches between threads.
void release_matrix_unit();

}  // namespace fastrnn::cpu::FASTRNN_ISA
