"""The CUDA kernels on the CPU: `build()` compiles them for the emulator of emulate.h, as an extension of its own."""

from __future__ import annotations

import functools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "csrc/calls.cpp",
    "csrc/cells.cpp",
    "csrc/fork.cpp",
    "csrc/precision.cpp",
    "csrc/ops_cuda.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/pool.cpp",
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


def run_threads(sanitizer: str) -> subprocess.CompletedProcess:
    """Builds driver.cpp, a thread for each CUDA thread, with a sanitizer of g++, and runs it."""
    folder = ROOT / "build" / "emulator" / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wno-unknown-pragmas", "-I", "tests/emulator"]
    flags += ["-DEMULATE_THREADS", "-DFASTRNN_WARPS=4", f"-fsanitize={sanitizer}"]
    sources = [
        "csrc/cells.cpp",
        "csrc/cuda/choose.cpp",
        *(f"tests/emulator/{name}.cpp" for name in ("forward", "backward", "driver")),
    ]
    objects = [str(folder / Path(source).with_suffix(".o").name) for source in sources]

    def compile_one(source, target):
        subprocess.run(["g++", *flags, "-c", source, "-o", target], cwd=ROOT, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    driver = str(folder / "driver")
    subprocess.run(["g++", *flags, *objects, "-o", driver], cwd=ROOT, check=True)
    options = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([driver], env=options, capture_output=True, text=True, timeout=600, check=False)
