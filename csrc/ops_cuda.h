// The backend of NVIDIA GPUs, for the registration of the ops.
#pragma once

#include "calls.h"

namespace fastrnn {
extern const Backend kCuda;
}
