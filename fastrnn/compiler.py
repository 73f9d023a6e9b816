"""Kernels of one cell, compiled when they are first used: of one dtype, for this machine, kept on disk.

A library is found again by a hash of all that goes into it: the generated header, the sources of the kernels, the flags
and the compiler. Processes that want the same one wait for the first of them. The folder is `FASTRNN_CACHE`, or else
`fastrnn` in `XDG_CACHE_HOME` or in `~/.cache`; `CXX` names another compiler than c++.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastrnn import _C, codegen
from fastrnn.cells import CELLS
from fastrnn.kernel_flags import ISA_FLAGS, RUN_TIME_KERNELS

_PACKAGE = Path(__file__).resolve().parent
# The folder of csrc: the package's own, or that of the checkout which it is part of.
_ROOT = next((folder for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "csrc").is_dir()), None)
_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-w"]


class CompilationError(RuntimeError):
    """The kernels of a cell could not be compiled; the message is the compiler's."""


def prepare(cell: str, dtype: int, rounded: str | None = None) -> bool:
    """Sees to it that this process has the CPU's kernels of a cell for a dtype (its number in `ops.DTYPES`); `rounded`
    as a module's option `weights`. Returns whether it has them: without a compiler or the sources, it has not.

    Raises:
        CompilationError: there is a compiler, and it refuses.
    """
    if _C.has_kernels(cell, dtype, rounded):
        return True
    compiler = find_compiler()
    if compiler is None:
        return False
    _C.load_kernels(cell, dtype, rounded, str(library(cell, _C.variant(dtype, rounded), compiler)))
    return True


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """The command, or None; then a warning has said so, once."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if _ROOT is not None and shutil.which(command[0]):
        return tuple(command)
    missing = "its C++ sources" if _ROOT is None else f"a C++ compiler ({command[0]})"
    warnings.warn(
        f"fastrnn: without {missing} there are no kernels of cells of one's own, nor of other dtypes than float32 of "
        "most cells that torch.nn does not have; they run in torch's operations, which takes much longer",
        UserWarning,
        stacklevel=2,
    )
    return None


def cache_folder() -> Path:
    named = os.environ.get("FASTRNN_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrnn"


def library(cell: str, variant: int, compiler: tuple[str, ...]) -> Path:
    """The library of a cell and variant, which is compiled unless it is there."""
    header = codegen.header([CELLS[cell]]).replace('"cell.h"', '"cells/cell.h"')
    isa = _C.build_info()["isa"].replace("amx", "avx512bf16")
    flags = [*_FLAGS, *ISA_FLAGS[isa], f"-DFASTRNN_ISA={isa}", f"-DFASTRNN_ONLY_VARIANT={variant}"]
    flags.append(f"-DFASTRNN_ONLY_CELL={codegen.class_name(CELLS[cell])}")
    inputs = [header, _sources_hash(), _version(compiler), *compiler, *flags, _C.__file__, _C.build_info()["compiler"]]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:32]
    folder = cache_folder()
    found = folder / f"{cell}-{key}.so"
    if found.exists():
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{key}.lock").open("w")
    except OSError as error:
        raise CompilationError(f"FASTRNN_CACHE: expected a folder to write to, got {folder}: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        if not found.exists():
            _compile(header, compiler, flags, found)
    return found


def _compile(header: str, compiler: tuple[str, ...], flags: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        (Path(folder) / "own_cell.h").write_text(header)
        flags = [*flags, f"-I{folder}", f"-I{_ROOT}/csrc", '-DFASTRNN_ONLY_HEADER="own_cell.h"']

        def compile_one(source):
            made = f"{folder}/{Path(source).stem}.o"
            _run([*compiler, *flags, "-c", str(_ROOT / source), "-o", made])
            return made

        with ThreadPoolExecutor(len(RUN_TIME_KERNELS)) as pool:
            objects = list(pool.map(compile_one, RUN_TIME_KERNELS))
        made = f"{folder}/library.so"
        _run([*compiler, "-shared", *objects, _C.__file__, "-o", made])
        os.replace(made, target)


def _run(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise CompilationError(f"This failed: {shlex.join(command)}\n{process.stdout}{process.stderr}")


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    headers = [file for folder in ("", "cells", "cpu") for file in sorted((_ROOT / "csrc" / folder).glob("*.h"))]
    for file in [*headers, *(_ROOT / source for source in RUN_TIME_KERNELS)]:
        if file.name != "generated.h":
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
