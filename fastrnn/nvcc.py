"""Compiles the CUDA kernels, which know no torch: for setup.py, tests/cuda/test_cuda_compile.py and compiler.py."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Each file is compiled once, for all architectures together.
CUDA_SOURCES = ["csrc/cuda/forward.cu", "csrc/cuda/backward.cu", "csrc/cuda/any_cell.cu"]
CELL_SOURCES = CUDA_SOURCES[:2]  # those of a cell that is compiled when it is first used
CUDA_ARCHITECTURES = ["8.0", "9.0a", "10.0"]
NVCC_FLAGS = ["-std=c++17", "-O1", "-Xcompiler=-fPIC", "-Xptxas=-v"]  # -O is the host's: it but launches
HEADERS = [header for folder in (".", "cells", "cuda") for header in sorted((ROOT / "csrc" / folder).glob("*.h"))]


def find_home() -> str | None:
    """The folder whose bin/nvcc is used, or None: CUDA_HOME or CUDA_PATH if set, else where the PATH finds nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin")
    return nvcc and os.path.dirname(os.path.dirname(nvcc))


CUDA_HOME = find_home()


def run(*arguments: object) -> str:
    """Runs nvcc; returns all that it says."""
    command = [os.path.join(CUDA_HOME or "", "bin", "nvcc"), *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"This failed: {shlex.join(command)}\n{process.stdout}{process.stderr}")
    return process.stdout + process.stderr


def major_version() -> str:
    """As torch.version.cuda begins."""
    found: list[str] = re.findall(r"release (\d+)", run("--version"))
    return found[0]


def folders() -> tuple[list[str], list[str]]:
    """Those in which nvcc itself looks for headers, and those for libraries."""
    said = run("--dryrun", "-x", "cu", "-c", os.devnull)
    flags = [re.findall(rf"^#\$ {name}=(.*)$", said, re.MULTILINE)[0] for name in ("INCLUDES", "LIBRARIES")]
    headers, libraries = ([flag[2:] for flag in shlex.split(line)] for line in flags)
    return headers, libraries


def default_architectures() -> list[str]:
    """Those of CUDA_ARCHITECTURES that this nvcc knows, the last one as PTX, too, for newer chips."""
    known = run("--list-gpu-arch").split()
    found = [name for name in CUDA_ARCHITECTURES if ptx_target(name) in known]
    return [*found[:-1], f"{found[-1]}+PTX"]


def target(architecture: str) -> str:
    """sm_80 for 8.0, sm_90a for 9.0a and for 9.0, whose chips have all of it, sm_100 for 10.0+PTX."""
    name = architecture.removesuffix("+PTX")
    return "sm_" + ("90a" if name == "9.0" else name.replace(".", ""))


def ptx_target(architecture: str) -> str:
    """What runs on all newer chips: compute_80 for 8.0, compute_90 for 9.0a, compute_100 for 10.0+PTX."""
    return "compute_" + re.sub(r"\D", "", architecture)


def flags_of(architecture: str) -> list[str]:
    """The flags that compile for an architecture as TORCH_CUDA_ARCH_LIST names it."""
    sm = target(architecture)
    flags = [f"-gencode=arch={sm.replace('sm', 'compute')},code={sm}"]
    if architecture.endswith("+PTX"):
        ptx = ptx_target(architecture)
        flags.append(f"-gencode=arch={ptx},code={ptx}")
    return flags


def is_newer(file: Path, inputs: Iterable[Path]) -> bool:
    return file.exists() and all(file.stat().st_mtime > Path(other).stat().st_mtime for other in inputs)


def compile_kernels(architectures: list[str]) -> list[Path]:
    """Compiles each source for all architectures, unless it is done; returns the objects.

    What nvcc and ptxas said of an object lies beside it, in a file that ends in .txt.
    """
    folder = ROOT / "build" / "cuda" / "-".join(architectures)
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // len(CUDA_SOURCES))
    flags = [*NVCC_FLAGS, *(flag for name in architectures for flag in flags_of(name)), f"--threads={threads}"]

    def compile_one(source: str) -> Path:
        made = folder / Path(source).with_suffix(".o").name
        report = made.with_suffix(".txt")
        if not is_newer(report, [ROOT / source, Path(__file__), *HEADERS]):
            report.write_text(run(*flags, "-c", source, "-o", made))
        return made

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))
