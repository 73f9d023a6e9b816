"""Builds libfastrnn.so, the ops, its CPU kernels compiled once per instruction set, its CUDA kernels by nvcc; and
fastrnn._C, which is what Python calls of it.

FASTRNN_CUDA=0|1 turns CUDA off or on; by default it is on if this torch can link it. TORCH_CUDA_ARCH_LIST names the
architectures; by default they are those of the GPUs here, or on a machine without one a list for all that can run it.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import setup
from setuptools.modified import newer_group

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    raise SystemExit(
        "fastrnn builds against the torch you already have. Type:\n"
        "    pip install torch pybind11 ninja numpy setuptools\n"
        "    pip install -e . --no-build-isolation"
    ) from None

sys.path.append("fastrnn")  # the package itself needs what is built here
import built
import nvcc
from kernel_flags import (
    CELL_KERNELS,
    CELL_SOURCE,
    INT8_KERNEL,
    ISA_FLAGS,
    KERNELS,
    MATRIX_KERNEL,
    generate_cells,
    kernel_jobs,
)

OLDEST_TORCH = "2.11"
if torch.__version__ < OLDEST_TORCH:
    raise SystemExit(f"fastrnn needs torch {OLDEST_TORCH} or newer, and this is {torch.__version__}")

LIBRARY = "libfastrnn"  # which needs no Python: programs in C++ load it, too
PYTHON_SOURCES = ["csrc/torch/module.cpp", "csrc/torch/eager.cpp", "csrc/torch/recorded.cpp"]
SOURCES = [
    "csrc/cells.cpp",
    "csrc/torch/ops.cpp",
    "csrc/torch/calls.cpp",
    "csrc/torch/fork.cpp",
    "csrc/stream.cpp",
    "csrc/torch/precision.cpp",
    "csrc/torch/schemas.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/threads.cpp",
]
# They know neither torch nor Python: one folder for all builds of a checkout.
KERNEL_OBJECTS = os.path.join("build", "kernels")
CUDA_HOST_SOURCES = ["csrc/torch/cuda.cpp", "csrc/cuda/choose.cpp", "csrc/cuda/dispatch.cpp"]


def headers(*folders):
    return [os.path.join(d, f) for d in folders for f in sorted(os.listdir(d)) if f.endswith(".h")]


generate_cells()
HEADERS = headers("csrc", "csrc/cells", "csrc/cpu")  # of the kernels
# What is not compiled everywhere goes into the source distribution nevertheless.
DEPENDS = [
    *HEADERS,
    *headers("csrc/torch", "csrc/cuda"),
    *KERNELS,
    CELL_SOURCE,
    INT8_KERNEL,
    MATRIX_KERNEL,
    *nvcc.CUDA_SOURCES,
    *CUDA_HOST_SOURCES,
    "fastrnn/nvcc.py",
]


def openmp_flags(compiler):
    """Those with which the kernels run on the threads of PyTorch's own pool. The calls that gcc makes are found in any
    OpenMP runtime that PyTorch may have loaded, those of clang are not; no runtime is linked, so that there is but one.
    """
    macros = subprocess.run(
        [*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    )
    is_gcc = "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout
    return ["-fopenmp"] if is_gcc and torch.backends.openmp.is_available() else []


def use_cuda():
    """Whether to build the CUDA kernels; an error if that is asked for and not possible."""
    wanted = os.environ.get("FASTRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTRNN_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return False
    present = torch.version.cuda is not None and nvcc.CUDA_HOME is not None
    possible = present and torch.version.cuda.split(".")[0] == nvcc.major_version()
    if wanted == "1" and not possible:
        raise SystemExit(
            "FASTRNN_CUDA=1 needs a torch with CUDA and nvcc of the same major version: "
            f"torch.version.cuda is {torch.version.cuda}, CUDA_HOME is {nvcc.CUDA_HOME}"
        )
    return possible


def cuda_architectures():
    """Their numbers, as TORCH_CUDA_ARCH_LIST has them."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in named:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0, 9.0a or 10.0+PTX, got {name!r}")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    visible = [f"{major}.{minor}" for major, minor in sorted(capabilities) if major >= 8]
    return named or visible or nvcc.default_architectures()


def cuda_options():
    """What the CUDA part adds to both."""
    include_dirs, library_dirs = nvcc.folders()
    return {
        "define_macros": [("FASTRNN_CUDA", None)],
        "include_dirs": include_dirs,
        "library_dirs": library_dirs,
        "libraries": ["c10_cuda", "cudart"],
    }


class Build(BuildExtension):
    """Compiles the kernel files, the CPU's once per instruction set, links them into the library, then the extension to
    that."""

    def get_ext_filename(self, ext_name):
        found = super().get_ext_filename(ext_name)
        is_library = ext_name.split(".")[-1] == LIBRARY
        return os.path.join(os.path.dirname(found), f"{LIBRARY}.so") if is_library else found

    def run(self):
        super().run()
        record = os.path.join(os.path.dirname(self.get_ext_fullpath("fastrnn._C")), built.RECORD)
        with open(record, "w") as file:
            file.write(built.record(torch.__version__, torch.version.cuda if ARCHITECTURES else None))
        if not self.inplace:
            self.copy_sources()

    def copy_sources(self):
        """What fastrnn/compiler.py compiles cells of one's own from goes with the package."""
        for file in [*HEADERS, *headers("csrc/cuda"), *CELL_KERNELS, CELL_SOURCE, *nvcc.CELL_SOURCES]:
            target = os.path.join(self.build_lib, "fastrnn", file)
            self.mkpath(os.path.dirname(target))
            self.copy_file(file, target)

    def build_extensions(self):
        def compile_one(job):
            source, isa, isa_flags = job
            flags = [
                "-std=c++17",
                "-O3",
                "-g0",
                "-fPIC",
                "-Wall",
                "-Wno-psabi",
                f"-DFASTRNN_ISA={isa}",
                *isa_flags,
            ]
            if isa.startswith("avx512"):
                flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc's own AVX-512 headers
            output = os.path.join(KERNEL_OBJECTS, isa)
            objects = self.compiler.object_filenames([source], output_dir=output)
            if newer_group([source, "setup.py", "fastrnn/kernel_flags.py", *HEADERS], objects[0]):
                self.compiler.compile([source], output_dir=output, extra_postargs=flags)
            return objects

        library, module = self.extensions
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for objects in pool.map(compile_one, kernel_jobs()):
                library.extra_objects += objects
        for each in self.extensions:
            each.extra_compile_args += openmp_flags(self.compiler.compiler_cxx)
        if ARCHITECTURES:
            library.extra_objects += map(str, nvcc.compile_kernels(ARCHITECTURES))
        library.libraries.remove("torch_python")
        module.extra_objects.append(self.get_ext_fullpath(library.name))
        super().build_extensions()


ARCHITECTURES = cuda_architectures() if use_cuda() else []
CUDA = f"on ({' '.join(map(nvcc.target, ARCHITECTURES))})" if ARCHITECTURES else "off"
print(f"fastrnn: CUDA {CUDA}, CPU kernels for {' + '.join(ISA_FLAGS)}")


def extension(name, sources, **options):
    return CppExtension(
        f"fastrnn.{name}",
        sources,
        depends=DEPENDS,
        extra_compile_args=["-O2", "-g0", "-Wall"],
        **(cuda_options() if ARCHITECTURES else {}),
        **options,
    )


setup(
    install_requires=[built.served(torch.__version__), "numpy"],  # what is built here serves no other torch
    ext_modules=[
        extension(
            LIBRARY,
            [*SOURCES, *CUDA_HOST_SOURCES] if ARCHITECTURES else SOURCES,
            extra_link_args=[f"-Wl,-soname,{LIBRARY}.so"],
        ),
        extension("_C", PYTHON_SOURCES, runtime_library_dirs=["$ORIGIN"]),
    ],
    cmdclass={"build_ext": Build},
)
