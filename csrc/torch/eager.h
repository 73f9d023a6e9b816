// The short way from a module's call to the CPU kernels: no dispatcher, no boxing.
#pragma once

#include <Python.h>

namespace fastrnn {

// Adds `eager_forward` to the module; returns whether it could.
bool add_eager_forward(PyObject* module);

}  // namespace fastrnn
