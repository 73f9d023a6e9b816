"""Compiles the CUDA kernels for every architecture, and what binds them to torch; needs nvcc, but neither GPU nor CUDA
in torch. Writes what each kernel takes to build/cuda/resources.txt.
"""

import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from own_cells import given_much, of_options, two_stages
from torch.utils.cpp_extension import include_paths

from benchmarks.machine_code import readable
from fastrnn import compiler, nvcc
from fastrnn.nvcc import CUDA_ARCHITECTURES

pytestmark = pytest.mark.skipif(nvcc.CUDA_HOME is None, reason="needs nvcc, on the PATH or in CUDA_HOME")

ROOT = Path(__file__).parents[2]
TARGETS = [nvcc.target(architecture) for architecture in CUDA_ARCHITECTURES]
ENTRY = "Compiling entry function"
KERNEL = re.compile(
    rf"{ENTRY} '(\w+)' for '(\w+)'\n.*Function properties for \1\n"
    r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers(?:.* (\d+) bytes smem)?"
)


@dataclass
class Kernel:
    """What ptxas says of a kernel on an architecture; sizes in bytes, spills as stores/loads."""

    name: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    static_shared: int

    def __str__(self):
        spills = f"{self.spill_stores}/{self.spill_loads}"
        return f"{self.architecture:8}{self.registers:9}{self.static_shared:13}{self.stack:6}{spills:>7}  {self.name}"


HEAD = "        registers static shared stack spills  kernel\n"


def kernels_of(report):
    """Those that a report tells of."""
    found = KERNEL.findall(report)
    assert len(found) == report.count(ENTRY) > 0
    names = readable([name for name, *_ in found])
    return [
        Kernel(name, arch, *(int(n or 0) for n in numbers))
        for name, (_, arch, *numbers) in zip(names, found, strict=True)
    ]


@pytest.fixture(scope="module")
def reports():
    """What was said when each object was made."""
    objects = nvcc.compile_kernels(nvcc.default_architectures())
    return [made.with_suffix(".txt").read_text() for made in objects]


@pytest.fixture(scope="module")
def kernels(reports):
    found = [kernel for report in reports for kernel in kernels_of(report)]
    found.sort(key=lambda kernel: kernel.name)
    (ROOT / "build/cuda/resources.txt").write_text(HEAD + "".join(f"{kernel}\n" for kernel in found))
    return found


def test_compiles_without_warnings(reports):
    """Nor what ptxas says of wgmma that it puts one after the other, which it takes for information."""
    bad = ("warning", "Potential Performance Loss")
    assert [line for report in reports for line in report.splitlines() if any(words in line for words in bad)] == []


def test_the_host_calls_nothing_of_the_device():
    """nvcc lets a template do so, and makes of the function that is called one that ends the process."""
    for made in nvcc.compile_kernels(nvcc.default_architectures()):
        undefined = subprocess.run(["nm", "-u", made], capture_output=True, text=True, check=True).stdout.split()
        assert "cudaLaunchKernelExC" in undefined, made
        assert "exit" not in undefined, made


def test_all_architectures_have_all_kernels(kernels):
    names = {kernel.name for kernel in kernels}
    assert {(kernel.name, kernel.architecture) for kernel in kernels} == {
        (name, architecture) for name in names for architecture in TARGETS
    }


@pytest.mark.parametrize("architecture", TARGETS)
def test_steps_stay_in_registers(kernels, architecture):
    of_steps = ("run_steps", "finish_step")
    assert all(any(k.name.startswith(name) for k in kernels) for name in of_steps)
    steps = [k for k in kernels if k.architecture == architecture and k.name.startswith(of_steps)]
    spilled = [k for k in steps if k.stack or k.spill_stores or k.spill_loads]
    assert not spilled, "\n" + HEAD + "\n".join(map(str, spilled))


# By variants of csrc/cuda/kernels.h.
@pytest.mark.parametrize(
    ("cell", "variant"),
    [
        *[("slstm", 2), ("mingru", 0), ("spiking", 2), ("diagonal", 2), (given_much.name, 0), (two_stages.name, 3)],
        *((name, 2) for name in of_options()),
    ],
    ids=str,
)
def test_kernels_compiled_at_first_use(tmp_path, monkeypatch, cell, variant):
    said, run = [], subprocess.run

    def listen(*args, **options):
        process = run(*args, **options)
        said.append(process.stdout + process.stderr)
        return process

    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", listen)
    library = compiler.library(cell, compiler.for_architectures(["9.0"]), variant)
    found = [kernel for report in said if ENTRY in report for kernel in kernels_of(report)]
    assert {kernel.architecture for kernel in found} == {"sm_90a"}
    steps = [k for k in found if k.name.startswith(("run_steps", "finish_step", "scan_steps"))]
    assert steps
    assert not [str(k) for k in steps if k.stack or k.spill_stores or k.spill_loads]
    symbols = run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {"fastrnn_forward_kernels", "fastrnn_backward_kernels"} <= set(symbols.split())


@pytest.mark.parametrize("source", ["ops.cpp", "cuda.cpp", "module.cpp"])
def test_host_code_compiles(source):
    folders = [*include_paths(), sysconfig.get_path("include"), *nvcc.folders()[0]]
    flags = ["-std=c++17", "-Wall", "-Werror", "-DFASTRNN_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command = ["g++", "-fsyntax-only", *flags, *(f"-isystem{folder}" for folder in folders), f"csrc/torch/{source}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
