// Which instruction set runs: the widest one of this machine, or the one that FASTRNN_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "../layer.h"
#include "kernels.h"

namespace fastrnn::cpu {

std::vector<std::string> available_isas();  // of this build and this machine, narrowest first

// The one in use. Throws std::runtime_error, naming what there is, if FASTRNN_CPU_ISA names none of them.
std::string isa_in_use();

// Whether it multiplies numbers rounded to bfloat16 as they are, and not widened to float32.
bool has_bfloat16_products();

// Whether this process has the kernels of a cell (cells.h) for a variant.
bool has_kernels(int cell, int variant);

// Adds those of a library (added_kernels.h); those that are there stay. Throws std::runtime_error.
void load_kernels(int cell, int variant, const std::string& path);

// Multiply-adds per second, times two, that `threads` cores reach with all operands in registers.
double peak_flops(DType dtype, int threads);

}  // namespace fastrnn::cpu
