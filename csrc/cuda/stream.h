// A CUDA stream, for headers that do without CUDA's own.
#pragma once

struct CUstream_st;

namespace fastrnn::cuda {
using Stream = CUstream_st*;
}
