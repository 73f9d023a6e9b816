// The kernels of the forward pass for the emulator.
#include "../../csrc/cuda/forward.cu"
