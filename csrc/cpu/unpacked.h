// Products of few rows with weights as the caller stores them.
#pragma once

#include "panels.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// out [M, N] = bias + A [M, K] * W^T, W [N, K] unpacked: for so few rows that packing W would cost more than it saves.
// T is the type of sums, E that of A, S that of W and the biases, which may be null.
template <class T, class E, class S>
void multiply_unpacked(int64_t M, int64_t N, int64_t K, const E* a, int64_t lda, const S* w, const S* bias, T* out,
                       int64_t ldo);

}  // namespace fastrnn::cpu::FASTRNN_ISA
