// How exact the products of float32 layers on the CPU shall be.
#pragma once

#include <string_view>

#include "layer.h"

namespace fastrnn {

// Whether PyTorch's switches allow products of numbers rounded to bfloat16: torch.backends.mkldnn.rnn.fp32_precision
// and what that inherits from, or, if none of these is set, torch.set_float32_matmul_precision("medium").
bool allows_bfloat16_products();

// Of a layer of these sizes with weights="bf16" or "int8". Throws c10::ValueError for another name, or a size that int8
// products cannot have.
Products products_of(std::string_view rounded, const Layer& layer);

}  // namespace fastrnn
