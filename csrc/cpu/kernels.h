// The kernels of one instruction set, as dispatch.cpp calls them.
#pragma once

#include "../cells/lookup.h"
#include "int8.h"

namespace fastrnn::cpu {

// Of one cell and variant; all null: there are none.
struct ForwardKernels {
  void (*run)(const Layer& layer, void* workspace);
  size_t (*workspace)(const Layer& layer);
  size_t (*pack)(const Layer& layer, void* packed);  // returns the bytes; of null it only measures
};
struct BackwardKernels {
  void (*run)(const Layer& layer, const LayerGrads& grads, void* workspace);
  size_t (*workspace)(const Layer& layer, const LayerGrads& grads);
};

// What is built in: of a cell that has all kernels, and of the others.
#if defined(__AVX512BF16__)
// All else is as without that instruction: dispatch.cpp takes it from avx512.
using AllVariants = Variants<kBFloat16, kBFloat16Products>;
using OtherVariants = Variants<>;
#else
using AllVariants =
    Variants<kFloat32, kFloat64, kBFloat16, kFloat16, kBFloat16Weights, kBFloat16Products, kInt8Products>;
using OtherVariants = Variants<kFloat32>;
#endif

#define FASTRNN_DECLARE_KERNELS(isa)                       \
  namespace isa {                                          \
  ForwardKernels forward_kernels(int cell, int variant);   \
  BackwardKernels backward_kernels(int cell, int variant); \
  uint64_t fingerprint(const Layer& layer);                \
  double multiply_add_rate(DType dtype, int threads);      \
  Int8Tile int8_tile(int vectors, int rows, int panels);   \
  }

// Whether those in use multiply bfloat16 numbers with matrix_unit.h.
bool uses_matrix_unit();

FASTRNN_DECLARE_KERNELS(base)
#if defined(__x86_64__)
FASTRNN_DECLARE_KERNELS(avx2)
FASTRNN_DECLARE_KERNELS(avx512)
FASTRNN_DECLARE_KERNELS(avx512bf16)

// What multiplies int8 numbers on a machine that has an instruction for it.
namespace avxvnni {
Int8Tile int8_tile(int vectors, int rows, int panels);
}
namespace avx512vnni {
Int8Tile int8_tile(int vectors, int rows, int panels);
}
#endif

}  // namespace fastrnn::cpu
