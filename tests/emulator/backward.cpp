// The kernels of the backward pass for the emulator.
#include "../../csrc/cuda/backward.cu"
