// How exact the products of float32 layers on the CPU shall be.
#pragma once

#include <optional>
#include <string_view>

#include "../layer.h"

namespace fastrnn {

// Of a layer on the CPU whose sizes and dtype are given. `rounded` is its option weights="bf16" or "int8"; without it a
// float32 layer's products may be of numbers rounded to bfloat16 if PyTorch's switches allow that:
// torch.backends.mkldnn.rnn.fp32_precision and what it inherits from, or, if none of these is set,
// torch.set_float32_matmul_precision("medium"). Throws c10::ValueError for another name, or a size that int8 products
// cannot have.
Products products_of(const Layer& layer, std::optional<std::string_view> rounded);

}  // namespace fastrnn
