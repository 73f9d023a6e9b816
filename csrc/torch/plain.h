// What may go past PyTorch's dispatcher.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fastrnn {

// Whether a call with this tensor would reach the CPU's kernel and nothing before it but autograd: no subclass, tracer,
// autocast, functorch transform, dispatch mode or forward-mode gradient.
inline bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet passed = c10::autograd_dispatch_keyset |
                                     c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                     c10::DispatchKeySet(DispatchKey::BackendSelect);
  const c10::DispatchKeySet keys = ((tensor.key_set() | local.included_) - local.excluded_) - passed;
  return keys == c10::DispatchKeySet(DispatchKey::CPU) && !tensor._fw_grad(/*level=*/0).defined();
}

}  // namespace fastrnn
