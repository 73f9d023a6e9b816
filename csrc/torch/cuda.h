// The backend of NVIDIA GPUs, for the registration of the ops.
#pragma once

#include "calls.h"

namespace fastrnn {
extern const Backend kCuda;

// Which kernels (cuda/kernels.h) a call with this dtype should have, as PyTorch's flags are now.
int cuda_variant(DType dtype);
}  // namespace fastrnn
