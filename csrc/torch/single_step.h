// Single steps as users have them, and as the ops do, which know sequences alone.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn {

inline at::Tensor as_sequence(const at::Tensor& tensor, bool is_step) {
  return is_step && tensor.defined() ? tensor.unsqueeze(0) : tensor;
}

// What has no first dimension of 1 (the c of a cell without one) stays as it is.
inline at::Tensor from_sequence(const at::Tensor& tensor, bool is_step) {
  return is_step && tensor.defined() && tensor.size(0) == 1 ? tensor.squeeze(0) : tensor;
}

}  // namespace fastrnn
