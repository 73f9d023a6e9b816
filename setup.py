"""Builds fastrnn._C: one extension, its CPU kernels compiled once per instruction set.

FASTRNN_CUDA=0|1 turns CUDA off or on; by default it is on if this torch can link it.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import setup
from setuptools.modified import newer_group

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError:
    raise SystemExit(
        "fastrnn builds against the torch you already have. Type:\n"
        "    pip install torch pybind11 ninja numpy setuptools\n"
        "    pip install -e . --no-build-isolation"
    ) from None

sys.path.insert(0, os.curdir)  # pip runs this file without its folder on the path
from kernel_flags import ISA_FLAGS, KERNELS

SOURCES = ["csrc/module.cpp", "csrc/ops.cpp", "csrc/calls.cpp", "csrc/eager.cpp", "csrc/stream.cpp"]
SOURCES += ["csrc/cpu/dispatch.cpp", "csrc/cpu/memory.cpp", "csrc/cpu/threads.cpp"]
HEADERS = [os.path.join("csrc", f) for f in sorted(os.listdir("csrc")) if f.endswith(".h")]
HEADERS += [os.path.join(d, f) for d in ("csrc/cells", "csrc/cpu") for f in sorted(os.listdir(d)) if f.endswith(".h")]


def use_cuda():
    """Whether to build the CUDA kernels. They are not written yet, so asking for them is an error."""
    wanted = os.environ.get("FASTRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTRNN_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "1":
        raise SystemExit(
            "FASTRNN_CUDA=1: this version of fastrnn has no CUDA kernels "
            f"(torch.version.cuda is {torch.version.cuda}, CUDA_HOME is {CUDA_HOME})"
        )
    return False


class Build(BuildExtension):
    """Compiles the kernel files once per instruction set, then links the objects into the extension."""

    def build_extensions(self):
        def compile_one(job):
            source, isa = job
            flags = [
                "-std=c++17",
                "-O3",
                "-g0",
                "-fPIC",
                "-Wall",
                "-Wno-psabi",
                f"-DFASTRNN_ISA={isa}",
                *ISA_FLAGS[isa],
            ]
            if isa.startswith("avx512"):
                flags.append("-Wno-maybe-uninitialized")  # gcc's own AVX-512 headers
            output = os.path.join(self.build_temp, isa)
            objects = self.compiler.object_filenames([source], output_dir=output)
            if newer_group([source, "setup.py", "kernel_flags.py", *HEADERS], objects[0]):
                self.compiler.compile([source], output_dir=output, extra_postargs=flags)
            return objects

        jobs = [(source, isa) for isa in reversed(ISA_FLAGS) for source in KERNELS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for objects in pool.map(compile_one, jobs):
                self.extensions[0].extra_objects += objects
        super().build_extensions()


print(f"fastrnn: CUDA {'on' if use_cuda() else 'off'}, CPU kernels for {' + '.join(ISA_FLAGS)}")
setup(
    ext_modules=[
        CppExtension(
            "fastrnn._C",
            SOURCES,
            depends=[*HEADERS, *KERNELS, "kernel_flags.py"],  # so they go into the source distribution as well
            extra_compile_args=["-O2", "-g0", "-Wall"],
        )
    ],
    cmdclass={"build_ext": Build},
)
