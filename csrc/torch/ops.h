// The op of inference, for eager.cpp, which calls it without the dispatcher.
#pragma once

#include <tuple>

#include "calls.h"

namespace fastrnn {

// fastrnn::packed_forward on the CPU; see its schema in ops.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> packed_forward_cpu(Inputs in, OptionalName rounded,
                                                                              const OptionalTensor& packed);

}  // namespace fastrnn
