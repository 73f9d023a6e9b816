"""The files and flags of the CPU's kernels, for setup.py, tests/sanitize/run.py and compiler.py.

This file needs nothing but Python, and can be imported without its package.
"""

import platform
import subprocess
import sys
from pathlib import Path

# Those that know the cells, and both in one file, for a cell that is compiled when it is first used.
CELL_KERNELS = ["csrc/cpu/backward.cpp", "csrc/cpu/forward.cpp"]
CELL_SOURCE = "csrc/cpu/cell.cpp"

# Compiled once per instruction set, with -DFASTRNN_ISA=<name>, but for what avx512bf16 has from avx512; those that take
# longest first.
WITH_PRODUCTS = ["backward_pass", "tiles", "forward_pass", "gemm", "unpacked"]
PRODUCTS = [*CELL_KERNELS, *(f"csrc/cpu/{name}.cpp" for name in WITH_PRODUCTS)]
OTHERS = ["csrc/cpu/fingerprint.cpp", "csrc/cpu/limits.cpp"]
KERNELS = [*PRODUCTS, *OTHERS]

# Contraction is off where the sources spell out fused multiply-adds: every instance of a kernel must round alike.
ISA_FLAGS: dict[str, list[str]] = {"base": ["-ffp-contract=fast"]}
if platform.machine() in ("x86_64", "AMD64"):
    AVX2 = ["-ffp-contract=off", "-mavx2", "-mfma", "-mf16c"]
    AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISA_FLAGS = {
        "base": ["-ffp-contract=off"],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
    }
# Of the cells that are built in, avx512bf16 has kernels with products of bfloat16 alone; all else is avx512's.
COMPLETE = {isa: flags for isa, flags in ISA_FLAGS.items() if isa != "avx512bf16"}

# Int8 products are a file of their own, since two more instruction sets differ in them.
INT8_KERNEL = "csrc/cpu/int8.cpp"
INT8_FLAGS = dict(COMPLETE)
if "avx2" in ISA_FLAGS:
    INT8_FLAGS |= {"avxvnni": [*AVX2, "-mavxvnni"], "avx512vnni": [*AVX512, "-mavx512vnni"]}

# The matrix unit: a part of the kernels of one instruction set.
MATRIX_KERNEL = "csrc/cpu/matrix_unit.cpp"


# The package without its __init__, which needs what is being built.
GENERATE = """
import sys, types
package = sys.modules["fastrnn"] = types.ModuleType("fastrnn")
package.__path__ = [sys.argv[1]]
from fastrnn import cells, codegen
codegen.write(cells.CELLS.values())
"""


def generate_cells() -> None:
    """Writes csrc/cells/generated.h, if it is not as it should be."""
    subprocess.run([sys.executable, "-c", GENERATE, Path(__file__).resolve().parent], check=True)


def kernel_jobs() -> list[tuple[str, str, list[str]]]:
    """(source, instruction set, flags) of every object file of kernels, those that take longest first."""
    jobs = [(source, isa, ISA_FLAGS[isa]) for source in PRODUCTS for isa in reversed(ISA_FLAGS)]
    jobs += [(source, isa, flags) for source in OTHERS for isa, flags in COMPLETE.items()]
    if "avx512bf16" in ISA_FLAGS:
        jobs.append((MATRIX_KERNEL, "avx512bf16", [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]))
    return jobs + [(INT8_KERNEL, isa, flags) for isa, flags in INT8_FLAGS.items()]
