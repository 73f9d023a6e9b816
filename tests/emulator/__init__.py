"""The CUDA kernels on the CPU: `build()` compiles them for the emulator of emulate.h, as an extension of its own."""

from __future__ import annotations

import functools
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "csrc/calls.cpp",
    "csrc/ops_cuda.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/threads.cpp",
    "csrc/cuda/choose.cpp",
    "tests/emulator/forward.cpp",
    "tests/emulator/backward.cpp",
    "tests/emulator/module.cpp",
]


@functools.cache
def build():
    """The extension: ops `fastrnn_emulated::layer_forward` and `layer_backward`, and the emulator's settings."""
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "fastrnn_emulated",
        [str(ROOT / source) for source in SOURCES],
        extra_cflags=["-std=c++20", "-O1", "-g0", "-DFASTRNN_EMULATED", "-Wall", "-Wno-unknown-pragmas"],
        extra_include_paths=[str(ROOT / "tests" / "emulator")],
        build_directory=str(folder),
    )
