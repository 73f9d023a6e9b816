// What is different in a forked child.
#pragma once

namespace fastrnn {

// The thread that forked has lost the workers of its OpenMP pool, if it had any, and OpenMP would wait for them for
// ever. To be called before anything that may use it: the first call in a child sets PyTorch's number of threads to 1,
// as its DataLoader does in its workers. Costs nothing elsewhere.
void leave_openmp_after_fork();

}  // namespace fastrnn
