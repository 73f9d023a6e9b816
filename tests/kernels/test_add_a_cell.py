"""Follows CONTRIBUTING.md: adds its example cell to a copy of the sources, builds it and tests it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHECK = """
import torch, fastrnn
torch.manual_seed(0)
rnn = fastrnn.Recurrent("ugrnn", 3, 4)
x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
y, h_n = rnn(x)
for t in range(5):
    both = x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
    z, n = torch.sigmoid(both[:, :4]), torch.tanh(both[:, 4:])
    h = z * h + (1 - z) * n
    torch.testing.assert_close(y[t], h)
torch.testing.assert_close(h_n[0], h)
"""


def example():
    """The code block of the section."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a cell")[1]
    blocks = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


# Of the other cells those that tests name are enough, in float32: to build them all again would take minutes.
ALONE = """
for name in set(CELLS) - {"lstm", "gru", "rnn_tanh", "mgu", "slstm", "lmu", "diagonal", "ugrnn", "update_gate"}:
    del CELLS[name]
for name in set(CELLS) - {"update_gate"}:
    CELLS[name] = replace(CELLS[name], has_all_kernels=False)
"""


def add_cell(root):
    """As it is, and once more under another name as a cell with all kernels."""
    other = example().replace("@cell(", "@cell(has_all_kernels=True, ").replace("ugrnn", "update_gate")
    with (root / "fastrnn/cells.py").open("a") as file:
        file.write(f"\n\n{example()}\n\n{other}{ALONE}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for folder in ("csrc", "fastrnn", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root)
    add_cell(root)
    compiler = root / "without_optimization"  # in half the time
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    run(root, "setup.py", "-q", "build_ext", "--inplace", CXX=str(compiler))
    return root


def run(root, *arguments, **environment):
    command, environment = [sys.executable, *arguments], os.environ | environment
    process = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


def test_module_computes_the_equation(tree):
    run(tree, "-c", CHECK)


# Products and the exchange between blocks are not a cell's own: those tests need but one.
WITH_ALL_KERNELS = "update_gate and not turns and not split"
KERNELS = (
    "kernels/test_forward",
    "kernels/test_gradients",
    "kernels/test_ops",
    "kernels/test_isa",
    "cuda/test_cuda_kernels",
    "cuda/test_cuda_choice",
)


@pytest.mark.parametrize(
    ("cell", "files", "count"),
    [("ugrnn", ("kernels/test_cells",), 20), (WITH_ALL_KERNELS, KERNELS, 100)],
    ids=["one", "all"],
)
def test_suite_finds_the_cell(tree, cell, files, count):
    files = [f"tests/{name}.py" for name in files]
    out = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", cell, *files)
    assert int(re.search(r"(\d+) passed", out)[1]) > count
