// The kernels of one instruction set, as dispatch.cpp calls them.
#pragma once

#include "../layer.h"

namespace fastrnn::cpu {

#define FASTRNN_DECLARE_KERNELS(isa)                                           \
  namespace isa {                                                              \
  size_t packed_size(const Layer& layer);                                      \
  void pack(const Layer& layer, void* packed);                                 \
  uint64_t fingerprint(const Layer& layer);                                    \
  size_t forward_workspace(const Layer& layer);                                \
  void forward(const Layer& layer, void* workspace);                           \
  size_t backward_workspace(const Layer& layer, const LayerGrads& grads);      \
  void backward(const Layer& layer, const LayerGrads& grads, void* workspace); \
  double multiply_add_rate(DType dtype, int threads);                          \
  }

FASTRNN_DECLARE_KERNELS(base)
#if defined(__x86_64__)
FASTRNN_DECLARE_KERNELS(avx2)
FASTRNN_DECLARE_KERNELS(avx512)
FASTRNN_DECLARE_KERNELS(avx512bf16)
#endif

}  // namespace fastrnn::cpu
