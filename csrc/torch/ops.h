// The op of inference, for eager.cpp, which calls it without the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastrnn {

// fastrnn::packed_forward on the CPU; see its schema in ops.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> packed_forward_cpu(
    const at::Tensor& x, const std::optional<at::Tensor>& h0, const std::optional<at::Tensor>& c0,
    at::TensorList weights, int64_t directions, const std::optional<at::Tensor>& lengths,
    const std::optional<at::Tensor>& resets, const std::optional<at::Tensor>& masks, c10::string_view cell,
    std::optional<c10::string_view> rounded, const std::optional<at::Tensor>& packed);

}  // namespace fastrnn
