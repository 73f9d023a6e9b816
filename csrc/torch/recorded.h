// A layer's call that records gradients, as a node of autograd's graph without Python in it: of a small layer, Python
// takes longer than the kernels do. fastrnn/autograd.py has the same for all calls.
#pragma once

#include <array>

#include "calls.h"

namespace fastrnn {

// y, h_n and c_n on the CPU of plain tensors (plain.h), without masks. Its backward pass does the same in the same
// plain cases, and leaves all others (derivatives of it, batched gradients, modes) to
// fastrnn.autograd.gradients_of_recorded.
std::array<at::Tensor, 3> recorded_forward(const Inputs& in, bool recompute);

}  // namespace fastrnn
