"""Kernels of one cell, compiled when they are first used: of one dtype, for this machine, kept on disk.

A library is found again by a hash of all that goes into it: the generated header, the sources of the kernels, the flags
and the compiler. Processes that want the same one wait for the first of them. The folder is `FASTRNN_CACHE`, or else
`fastrnn` in `XDG_CACHE_HOME` or in `~/.cache`; `CXX` names another compiler than c++, `CUDA_HOME` another nvcc.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrnn import _C, codegen, nvcc
from fastrnn.cells import CELLS
from fastrnn.kernel_flags import CELL_KERNELS, CELL_SOURCE, ISA_FLAGS

_PACKAGE = Path(__file__).resolve().parent
# The folder of csrc: the package's own, or that of the checkout which it is part of.
_ROOT = next((folder for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "csrc").is_dir()), None)
_HAS_CUDA = _C.build_info()["cuda"]


class CompilationError(RuntimeError):
    """The kernels of a cell could not be compiled; the message is the compiler's."""


@dataclass(frozen=True)
class Toolchain:
    """How the kernels of a backend become a library; paths are relative to the folder of csrc."""

    command: tuple[str, ...]
    version: str  # what else tells one compiler from another
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    header_folders: tuple[str, ...]
    link_flags: tuple[str, ...]
    included: tuple[str, ...] = ()  # what the sources include besides headers

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all that goes into a library but the cell."""
        assert _ROOT is not None
        parts = [self.version, *self.command, *self.flags, *self.link_flags]
        digest = hashlib.sha256("\0".join(parts).encode())
        headers = [file for folder in self.header_folders for file in sorted((_ROOT / folder).glob("*.h"))]
        for file in [*headers, *(_ROOT / source for source in (*self.sources, *self.included))]:
            if file.name != "generated.h":
                digest.update(file.read_bytes())
        return digest.hexdigest()


def prepare(cell: str, dtype: int, rounded: str | None = None) -> bool:
    """Sees to it that this process has the CPU's kernels of a cell for a dtype (its number in `ops.DTYPES`); `rounded`
    as a module's option `weights`. Returns whether it has them: without a compiler or the sources, it has not.

    Raises:
        CompilationError: there is a compiler, and it refuses.
    """
    if _C.has_kernels(cell, dtype, rounded):
        return True
    toolchain = for_cpu()
    if toolchain is None:
        return False
    made = library(cell, toolchain, _C.variant(dtype, rounded))
    _load(lambda path: _C.load_kernels(cell, dtype, rounded, path), made)
    return True


def prepare_on_gpu(cell: str, dtype: int) -> bool:
    """The same for the GPUs of this machine, with nvcc. float32 has kernels of its own for products of TF32, as torch's
    flags are at the time of the call."""
    if not _HAS_CUDA:
        return False
    variant = _C.cuda_variant(dtype)
    if _C.has_cuda_kernels(cell, variant):
        return True
    toolchain = for_gpu()
    if toolchain is None:
        return False
    _load(lambda path: _C.load_cuda_kernels(cell, variant, path), library(cell, toolchain, variant))
    return True


@functools.cache
def for_cpu() -> Toolchain | None:
    """For this machine's instruction set; None without a compiler, and then a warning has said so, once."""
    try:
        command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise CompilationError(f"CXX: expected a command, got {os.environ['CXX']}: {error}") from error
    if _ROOT is None or not shutil.which(command[0]):
        _warn(
            f"a C++ compiler ({command[0]})", "of other dtypes than float32 of most cells that torch.nn does not have"
        )
        return None
    isa = _C.build_info()["isa"].replace("amx", "avx512bf16")
    flags = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-w", *ISA_FLAGS[isa], f"-DFASTRNN_ISA={isa}"]
    version = "\0".join([_run([*command, "--version"]), _C.build_info()["compiler"], _C.__file__])
    folders = "csrc", "csrc/cells", "csrc/cpu"
    link_flags = "-shared", str(Path(_C.__file__).with_name("libfastrnn.so"))  # its products, its threads
    return Toolchain(tuple(command), version, tuple(flags), (CELL_SOURCE,), folders, link_flags, tuple(CELL_KERNELS))


@functools.cache
def for_gpu() -> Toolchain | None:
    """For the GPUs of this machine; None without an nvcc of the CUDA version of torch, after a warning, once."""
    cuda = torch.version.cuda or "none"
    if _ROOT is None or nvcc.CUDA_HOME is None or nvcc.major_version() != cuda.split(".")[0]:
        _warn(f"an nvcc of CUDA {cuda}", "on a GPU of cells that torch.nn does not have")
        return None
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return for_architectures([f"{major}.{minor}" for major, minor in sorted(capabilities)])


def for_architectures(names: list[str]) -> Toolchain:
    """For GPUs, as TORCH_CUDA_ARCH_LIST names them."""
    command = (os.path.join(nvcc.CUDA_HOME or "", "bin", "nvcc"),)
    flags = [
        *nvcc.NVCC_FLAGS,
        "-Xcompiler=-fvisibility=hidden",
        *(flag for name in names for flag in nvcc.flags_of(name)),
    ]
    folders = "csrc", "csrc/cells", "csrc/cuda"
    link_flags = "-shared", "-cudart=shared"  # torch has loaded it
    return Toolchain(
        command, _run([*command, "--version"]), tuple(flags), tuple(nvcc.CELL_SOURCES), folders, link_flags
    )


def _warn(missing: str, others: str) -> None:
    missing = "its C++ sources" if _ROOT is None else missing
    warnings.warn(
        f"fastrnn: without {missing} there are no kernels of cells of one's own, nor {others}; they run in torch's "
        "operations, which takes much longer",
        UserWarning,
        stacklevel=3,
    )


def cache_folder() -> Path:
    named = os.environ.get("FASTRNN_CACHE")
    return (
        Path(named).expanduser()
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrnn"
    )


def library(cell: str, toolchain: Toolchain, variant: int) -> Path:
    """The library of a cell and variant, which is compiled unless it is there, and whole."""
    codegen.check_unchanged(CELLS[cell])
    header = codegen.header([CELLS[cell]]).replace('"cell.h"', '"cells/cell.h"')
    flags = [f"-DFASTRNN_ONLY_VARIANT={variant}", f"-DFASTRNN_ONLY_CELL={codegen.class_name(CELLS[cell])}"]
    key = hashlib.sha256("\0".join([header, toolchain.fingerprint, *flags]).encode()).hexdigest()[:32]
    folder = cache_folder()
    found = folder / f"{cell}-{key}.so"
    if _is_whole(found):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{key}.lock").open("w")
    except OSError as error:
        raise CompilationError(f"FASTRNN_CACHE: expected a folder to write to, got {folder}: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        if not _is_whole(found):
            _compile(header, toolchain, flags, found)
    return found


def _is_whole(library: Path) -> bool:
    """Whether a file reaches as far as an ELF header says. Of a write that a full disk or a power cut ended it may not,
    and to load that can end the process."""
    try:
        with library.open("rb") as file:
            header, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError:  # it is not there, or no file
        return False
    if len(header) < 64:
        return False
    table: int = struct.unpack_from("<Q", header, 40)[0]  # of the sections, which is the last thing in the file
    entry, entries = struct.unpack_from("<HH", header, 58)
    return bool(size >= table + entry * entries)


def _compile(header: str, toolchain: Toolchain, flags: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        assert _ROOT is not None
        (Path(folder) / "own_cell.h").write_text(header)
        flags = [*toolchain.flags, *flags, f"-I{folder}", f"-I{_ROOT}/csrc", '-DFASTRNN_ONLY_HEADER="own_cell.h"']

        def compile_one(source: str) -> str:
            made = f"{folder}/{Path(source).stem}.o"
            _run([*toolchain.command, *flags, "-c", f"{_ROOT}/{source}", "-o", made])
            return made

        with ThreadPoolExecutor(len(toolchain.sources)) as pool:
            objects = list(pool.map(compile_one, toolchain.sources))
        made = f"{folder}/library.so"
        said = _run([*toolchain.command, *objects, *toolchain.link_flags, "-o", made])
        if not Path(made).exists():
            raise CompilationError(
                f"{shlex.join(toolchain.command)}: expected a compiler, but it made no library\n{said}"
            )
        os.replace(made, target)


def _run(command: list[str] | tuple[str, ...]) -> str:
    """What a command says."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilationError(f"This failed: {shlex.join(command)}\n{error}") from error
    if process.returncode != 0:
        raise CompilationError(f"This failed: {shlex.join(command)}\n{process.stdout}{process.stderr}")
    return process.stdout


def _load(load: Callable[[str], None], path: Path) -> None:
    try:
        load(str(path))
    except RuntimeError as error:
        raise CompilationError(f"{error}: if the file is damaged, delete it, and it will be compiled again") from error
