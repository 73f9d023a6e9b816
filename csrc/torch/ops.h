// The ops on the CPU, for those who call them without the dispatcher.
#pragma once

#include <tuple>
#include <vector>

#include "calls.h"

namespace fastrnn {

// fastrnn::packed_forward on the CPU; see its schema in ops.cpp. Where no weights were packed anew the last is
// undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> packed_forward_cpu(Inputs in, OptionalName rounded,
                                                                              const OptionalTensor& packed);

// fastrnn::layer_forward, which saves, and fastrnn::layer_backward.
Outputs forward_cpu(Inputs in, bool recompute);
std::vector<at::Tensor> backward_cpu(Inputs in, Saved saved, const c10::List<bool>& wanted);

}  // namespace fastrnn
