"""Kernels that are compiled when they are first used: found again, by several processes, or done without."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import make_case

import fastrnn
from fastrnn import compiler, ops, reference
from fastrnn.kernel_flags import CELL_SOURCE

TESTS = Path(__file__).parents[1]
PROGRAM = """
import time, torch, fastrnn
from own_cells import two_states
torch.manual_seed(0)
layer = fastrnn.Recurrent(two_states, 3, 4)
x = torch.randn(5, 2, 3)
begin = time.perf_counter()
y = layer(x)[0]
torch.testing.assert_close(y, fastrnn.reference.layer(layer._cell, x, None, None, layer._weights()[0])[0])
print("kernels" if fastrnn._C.has_kernels(layer._cell, 0, None) else "reference")
"""


def start(folder, program=PROGRAM, **environment):
    environment = os.environ | {"FASTRNN_CACHE": str(folder), "PYTHONPATH": f"{TESTS.parent}:{TESTS}"} | environment
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def libraries(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.so")}


def test_processes_that_start_together_compile_once_and_later_ones_not_at_all(tmp_path):
    count_calls = tmp_path / "compiler"
    count_calls.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo "$*" >> {tmp_path}/calls\nexec c++ "$@"\n')
    count_calls.chmod(0o755)
    together = [start(tmp_path, CXX=str(count_calls)) for _ in range(3)]
    assert [finish(process)[0] for process in together] == ["kernels\n"] * 3
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # the kernels, the library
    made = libraries(tmp_path)
    assert len(made) == 1
    finish(start(tmp_path, CXX=str(count_calls)))
    assert libraries(tmp_path) == made
    assert sorted(file.suffix for file in tmp_path.glob("*-*")) == [".so"]


def test_another_kernel_is_another_library():
    """Of all that the one source includes."""
    toolchain = compiler.for_cpu()
    included = re.findall(r'#include "(\w+\.cpp)"', (TESTS.parent / CELL_SOURCE).read_text())
    assert {Path(file).name for file in toolchain.included} == set(included) == {"forward.cpp", "backward.cpp"}
    assert replace(toolchain, included=()).fingerprint != toolchain.fingerprint


def test_another_instruction_set_is_another_library(tmp_path):
    finish(start(tmp_path))
    finish(start(tmp_path, FASTRNN_CPU_ISA="base"))
    assert len(libraries(tmp_path)) == (1 if fastrnn._C.build_info()["isa"] == "base" else 2)


def test_without_a_compiler_the_equation_runs_and_it_is_said_once(tmp_path):
    out, err = finish(start(tmp_path, PROGRAM + "layer(x)\n", CXX="no-such-compiler"))
    assert out == "reference\n"
    assert err.count("without a C++ compiler (no-such-compiler) there are no kernels") == 1


def test_without_a_compiler_everything_else_works(tmp_path):
    program = """
import torch, fastrnn
from own_cells import given_much
layer, x = fastrnn.Recurrent(given_much, 3, 4, 2, bidirectional=True), torch.randn(5, 2, 3, requires_grad=True)
masks = {name: torch.ones(4, 2, 4) for name in ("keep", "drop")}
y = layer(x, masks=masks)[0]
y.sum().backward(create_graph=True)
with torch.no_grad():
    torch.testing.assert_close(layer(x, masks=masks)[0], y)
assert layer.bfloat16()(x.bfloat16(), masks=masks)[0].dtype == torch.bfloat16
try:
    fastrnn.Recurrent("slstm", 3, 4, weights="int8").requires_grad_(False)(x)
except NotImplementedError as error:
    print(error)
try:
    fastrnn.Recurrent("slstm", 3, 4, dtype=torch.float64).stream()(x[0].double())
except NotImplementedError as error:
    print(error)
"""
    out, _ = finish(start(tmp_path, program, CXX="no-such-compiler"))
    refused, missing = out.splitlines()
    assert refused == "weights='int8': there are no kernels of cell slstm here"
    assert missing == "stream: there are no kernels of cell slstm for torch.float64 here"


def test_a_compiler_that_fails_says_why(tmp_path):
    program = "import torch, fastrnn\nfastrnn.Recurrent('slstm', 3, 4).double()(torch.randn(2, 2, 3).double())"
    process = start(tmp_path, program, CXX="false")
    _, err = process.communicate(timeout=60)
    assert "CompilationError: This failed: false" in err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("'unbalanced", "CXX: expected a command, got 'unbalanced: No closing quotation"),
        ("{folder}/noexec", "This failed: {folder}/noexec --version\n[Errno 8] Exec format error"),
        ("true", "true: expected a compiler, but it made no library"),
    ],
    ids=["quotes", "no program", "no compiler"],
)
def test_other_things_than_a_compiler(tmp_path, monkeypatch, command, said):
    (tmp_path / "noexec").write_text("nothing")
    (tmp_path / "noexec").chmod(0o755)
    monkeypatch.setenv("CXX", command.format(folder=tmp_path))
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    compiler.for_cpu.cache_clear()
    try:
        with pytest.raises(compiler.CompilationError, match=re.escape(said.format(folder=tmp_path))):
            compiler.library("sru", compiler.for_cpu(), 1)
    finally:
        compiler.for_cpu.cache_clear()


def test_a_damaged_library(tmp_path, monkeypatch):
    """One that is not whole, which dlopen may read beyond its end, is compiled again; another one is named."""
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    toolchain = compiler.for_cpu()
    made = compiler.library("qrnn", toolchain, 1)
    whole = made.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_compile", lambda *given: given[-1].write_bytes(whole))
        for part in (b"", whole[: len(whole) // 2], whole[:-1]):
            made.write_bytes(part)
            assert compiler.library("qrnn", toolchain, 1).read_bytes() == whole
    made.write_bytes(bytes(len(whole)))
    assert compiler.library("qrnn", toolchain, 1).read_bytes() == bytes(len(whole))
    with pytest.raises(
        compiler.CompilationError, match=f"{made.name}: invalid ELF header: if the file is damaged, delete it"
    ):
        compiler._load(lambda path: fastrnn._C.load_kernels("qrnn", 1, None, path), made)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    """Not even by root: a file is in its place."""
    (tmp_path / "file").touch()
    process = start(tmp_path / "file" / "folder")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"CompilationError: FASTRNN_CACHE: expected a folder to write to, got {tmp_path}/file/folder" in err


def test_op_without_kernels_says_what_to_do():
    """A graph that was made elsewhere asks for a cell by its name alone."""
    case = make_case("leaky_relu", 2, 2, 3, 4, dtype=torch.float16)
    arguments = *case.op_inputs(), None, None, None, "leaky_relu", False
    if not fastrnn._C.has_kernels("leaky_relu", ops.DTYPES[torch.float16], None):
        with pytest.raises(RuntimeError, match=r"no kernels for float16; fastrnn.ops.prepare\(\) compiles them"):
            torch.ops.fastrnn.layer_forward(*arguments)
    assert ops.prepare("leaky_relu", torch.float16)
    torch.ops.fastrnn.layer_forward(*arguments)


def test_prepare_in_a_forked_child():
    case = make_case("leaky_tanh", 3, 2, 3, 4)
    expected = case.run(reference.layer)[0]
    pid = os.fork()
    if pid == 0:
        try:
            torch.testing.assert_close(case.run(ops.layer)[0], expected)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_folder_of_the_cache(monkeypatch):
    for name in ("FASTRNN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert compiler.cache_folder() == Path.home() / ".cache/fastrnn"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiler.cache_folder() == Path("/somewhere/fastrnn")
    monkeypatch.setenv("FASTRNN_CACHE", "/here")
    assert compiler.cache_folder() == Path("/here")
    monkeypatch.setenv("FASTRNN_CACHE", "~/here")
    assert compiler.cache_folder() == Path.home() / "here"
