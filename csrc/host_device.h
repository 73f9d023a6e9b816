// Marks a function that the CPU's compilers and nvcc both compile, for both sides.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__
#else
#define FASTRNN_HD
#endif
