"""The CUDA kernels on the CPU: `build()` compiles them for the emulator of emulate.h, as an extension of its own;
`add_kernels()` those of a cell that is not built in, as `fastrnn.compiler` does on a machine with a GPU.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

from fastrnn import codegen, compiler
from fastrnn.cells import CELLS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "csrc/torch/calls.cpp",
    "csrc/cells.cpp",
    "csrc/torch/fork.cpp",
    "csrc/torch/precision.cpp",
    "csrc/torch/schemas.cpp",
    "csrc/torch/cuda.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/threads.cpp",
    "csrc/cuda/choose.cpp",
    "csrc/cuda/dispatch.cpp",
    "tests/emulator/any_cell.cpp",
    "tests/emulator/forward.cpp",
    "tests/emulator/backward.cpp",
    "tests/emulator/module.cpp",
]
FLAGS = ["-std=c++20", "-O1", "-g0", "-DFASTRNN_EMULATED", "-Wall", "-Wno-unknown-pragmas"]


@functools.cache
def build():
    """The extension: ops `fastrnn_emulated::layer_forward` and `layer_backward`, and the emulator's settings."""
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "fastrnn_emulated",
        [str(ROOT / source) for source in SOURCES],
        extra_cflags=FLAGS,
        extra_include_paths=[str(ROOT / "tests" / "emulator")],
        build_directory=str(folder),
    )


@functools.cache
def add_kernels(cell: str, variant: int) -> None:
    """The emulated kernels of a cell for a variant of csrc/cuda/kernels.h."""
    toolchain = compiler.Toolchain(
        command=("g++",),
        version=subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout,
        flags=(*FLAGS, "-w", "-fPIC", f"-I{ROOT}/tests/emulator"),
        sources=("tests/emulator/forward.cpp", "tests/emulator/backward.cpp"),
        header_folders=("csrc", "csrc/cells", "csrc/cuda", "tests/emulator"),
        link_flags=("-shared",),
    )
    build().add_cell(cell, codegen.description(CELLS[cell]))
    build().load_kernels(cell, variant, str(compiler.library(cell, toolchain, variant)))


RACING = ("lstm", "gru", "rnn_tanh")  # the cells of driver.cpp, and its types, in their places; it has no float64
RACING_TYPES = "Variants<kFloat32, kFloat32, kBFloat16>"


def run_races() -> subprocess.CompletedProcess:
    """Builds driver.cpp with ThreadSanitizer, which sees a thread in each CUDA thread, and runs it.

    Of a copy of the sources that knows its cells and types alone: the sanitizer makes the compiler slow.
    """
    folder = ROOT / "build" / "emulator" / "races"
    for part in ("csrc", "tests/emulator"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)
    (folder / "csrc/cells/generated.h").write_text(codegen.header(CELLS[name] for name in RACING))
    kernels = folder / "csrc/cuda/kernels.h"
    text, count = re.subn(r"(?<=AllVariants = )Variants<.*>", RACING_TYPES, kernels.read_text())
    assert count == 1
    kernels.write_text(text)
    flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-I", "tests/emulator"]
    flags += ["-DFASTRNN_WARPS=4", "-fsanitize=thread"]
    sources = [
        "csrc/cells.cpp",
        "csrc/cuda/choose.cpp",
        "csrc/cuda/dispatch.cpp",
        *(f"tests/emulator/{name}.cpp" for name in ("any_cell", "forward", "backward", "driver")),
    ]
    objects = [Path(source).with_suffix(".o").name for source in sources]

    def compile_one(source, target):
        subprocess.run(["g++", *flags, "-c", source, "-o", target], cwd=folder, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run(["g++", *flags, *objects, "-o", "driver"], cwd=folder, check=True)
    options = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([folder / "driver"], env=options, capture_output=True, text=True, timeout=600, check=False)
