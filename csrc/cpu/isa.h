// The instruction set that this translation unit is compiled for. Every kernel file is compiled once per instruction
// set, each time into a namespace of its own, FASTRNN_ISA; nothing in these files comes from the C++ standard library,
// whose inline functions would be merged between the copies.
#pragma once

#ifndef FASTRNN_ISA
#error "compile with -DFASTRNN_ISA=base, avx2, avx512 or avx512bf16"
#endif

#if defined(__AVX512F__)
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#elif defined(__AVX2__)
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#else
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 16
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTRNN_INLINE inline __attribute__((always_inline))
