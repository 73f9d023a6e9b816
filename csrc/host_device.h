// Marks a function that the CPU's compilers and nvcc both compile, for both sides. On the CPU it is part of a loop
// whose operands are in registers: a call would hand them over in memory.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__
#else
#define FASTRNN_HD __attribute__((always_inline))
#endif
