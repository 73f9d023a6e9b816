// What a cell is given besides products and states: its unit weights and masks.
#pragma once

#include "../layer.h"
#include "number.h"
#include "tile.h"

namespace fastrnn::cuda {

// The size of an array that may have no elements.
template <int count>
constexpr int kAtLeast1 = count > 0 ? count : 1;

// Args: ForwardArgs or BackwardArgs, which have H, own, masks and the strides of masks.
template <int count, class A, class Args, class Item>
__device__ __forceinline__ void load_own(A* own, const Args& p, int d, const Item& item) {
#pragma unroll
  for (int i = 0; i < count; ++i) own[i] = widen((d == 0 ? p.own[0] : p.own[1])[i * size_t(p.H) + item.u]);
}

template <int count, class Args, class Item>
__device__ __forceinline__ auto masks_at(const Args& p, int d, int t, const Item& item) {
  return count > 0 ? p.masks + d * p.mask_direction + t * p.mask_time + item.b * size_t(count) * p.H + item.u : nullptr;
}

template <int count, class S>
__device__ __forceinline__ void load_masks(Ahead<S>* masks, int H, const S* from) {
  if constexpr (count > 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) masks[i] = Ahead<S>(from + i * size_t(H));
  }
}

// As the cell takes them.
template <int own_count, int mask_count, class V, class A, class S>
__device__ __forceinline__ void put_given(V* given, const A* own, const Ahead<S>* masks) {
#pragma unroll
  for (int i = 0; i < own_count; ++i) given[i] = V(own[i]);
#pragma unroll
  for (int i = 0; i < mask_count; ++i) given[own_count + i] = V(widen(masks[i].get()));
}

// Of a layer, in Args.
template <class S, class Args>
void fill_given(Args& args, const Layer& layer, int mask_count) {
  for (int d = 0; d < layer.D; ++d) args.own[d] = static_cast<const S*>(layer.weights[d].w_own);
  args.masks = static_cast<const S*>(layer.masks);
  const int64_t of_step = layer.B * mask_count * layer.H;
  args.mask_direction = layer.mask_steps * of_step, args.mask_time = layer.mask_steps == 1 ? 0 : of_step;
}

}  // namespace fastrnn::cuda
