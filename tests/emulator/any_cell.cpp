// What is the same for all cells, for the emulator.
#include "../../csrc/cuda/any_cell.cu"
