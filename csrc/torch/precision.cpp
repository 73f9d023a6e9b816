#include "precision.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace fastrnn {
namespace {

// Read only where the products of matrices may be of bfloat16: PyTorch refuses to tell if a newer switch said so.
bool matmul_precision_is_medium(const at::Context& context) {
  try {
    return context.float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
  } catch (const c10::Error&) {
    return false;
  }
}

bool allows_bfloat16_products() {
  using at::Float32Backend, at::Float32Op, at::Float32Precision;
  const at::Context& context = at::globalContext();
  const Float32Precision own = context.float32Precision(Float32Backend::MKLDNN, Float32Op::RNN);
  if (own != Float32Precision::NONE) return own == Float32Precision::BF16;
  return context.float32Precision(Float32Backend::MKLDNN, Float32Op::MATMUL) == Float32Precision::BF16 &&
         matmul_precision_is_medium(context);
}

}  // namespace

Products products_of(const Layer& layer, std::optional<std::string_view> rounded) {
  if (!rounded)
    return layer.dtype == DType::kFloat32 && allows_bfloat16_products() ? Products::kBFloat16 : Products::kExact;
  if (*rounded == "bf16") return Products::kBFloat16Weights;
  TORCH_CHECK_VALUE(*rounded == "int8", "rounded: expected 'bf16' or 'int8', got '", *rounded, "'");
  const int64_t depth = std::max({layer.I, layer.H, layer.P});
  TORCH_CHECK_VALUE(depth <= kMaxInt8Depth, "weights='int8': expected at most ", int64_t(kMaxInt8Depth),
                    " inputs and units, got ", depth);
  return Products::kInt8;
}

}  // namespace fastrnn
