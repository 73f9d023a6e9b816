// All kernels of a cell that is compiled when it is first used, in one file: half of the time goes into headers.
#include "backward.cpp"
#include "forward.cpp"
