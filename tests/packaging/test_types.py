"""What type checkers and `help` see of the package."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")
CLASSES = [name for name in fastrnn.__all__ if inspect.isclass(getattr(fastrnn, name))]
WRONG = """
import torch
import fastrnn

fastrnn.GRU(4, 8, proj_size=2)
fastrnn.SLSTM("4", 8)
output, (h_n, c_n) = fastrnn.LSTM(4, 8)(torch.randn(5, 2, 4), length=None)
fastrnn.LSTMCell(4, 8)(torch.randn(2, 4)).shape
"""


def mypy(*arguments):
    command = [sys.executable, "-m", "mypy", "--strict", *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return process.returncode, process.stdout + process.stderr


def test_the_program_names_all_that_is_public():
    text = PROGRAM.read_text()
    assert [name for name in fastrnn.__all__ if not re.search(rf"\bfastrnn\.{name}\b", text)] == []


def test_the_program_runs():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CXX": "none"}  # own cells in torch's operations
    subprocess.run([sys.executable, PROGRAM], cwd=ROOT, env=environment, check=True, timeout=300)


def test_strict_mypy_accepts_the_program():
    pytest.importorskip("mypy")
    assert mypy(PROGRAM) == (0, "Success: no issues found in 1 source file\n")


def test_strict_mypy_sees_mistakes(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    status, said = mypy(wrong)
    assert status == 1
    lines = {int(line.split(":")[1]) for line in said.splitlines() if ": error:" in line}
    assert lines == {5, 6, 7, 8}, said


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_say_what_may_be_given(name):
    parameters = inspect.signature(getattr(fastrnn, name)).parameters.values()
    assert next(iter(parameters)).name in ("input_size", "layer", "layers", "cell", "order")
    assert all(p.annotation is not p.empty for p in parameters)


@pytest.mark.parametrize("name", fastrnn.papers.__all__)
def test_signatures_of_papers_are_those_of_recurrent(name):
    cell, *expected = inspect.signature(fastrnn.Recurrent).parameters.values()
    found = list(inspect.signature(getattr(fastrnn, name)).parameters.values())
    assert cell.name == "cell"
    own = {"CTRNN": ["leak"], "LayerNormLSTM": ["carries_normalized"], "LayerNormGRU": ["joint"]}.get(name, [])
    assert [p for p in found if p.name not in own] == expected
    assert len(found) == len(expected) + len(own)
