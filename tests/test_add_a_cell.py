"""Follows CONTRIBUTING.md: adds its example cell to a copy of the sources, in two places, builds it and tests it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECK = """
import torch, fastrnn
torch.manual_seed(0)
rnn = fastrnn.SigmoidRNN(3, 4)
x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
y, h_n = rnn(x)
for t in range(5):
    h = torch.sigmoid(x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
    torch.testing.assert_close(y[t], h)
torch.testing.assert_close(h_n[0], h)
"""


def example():
    """The code blocks of the section, in order: equation, module class."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a cell")[1]
    blocks = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    return blocks


def add_cell(root):
    equation, module = example()
    with (root / "fastrnn/cells.py").open("a") as file:
        file.write(f"\n\n{equation}")
    modules = root / "fastrnn/modules.py"
    modules.write_text(modules.read_text().replace("__all__ = [", '__all__ = ["SigmoidRNN", ') + f"\n\n{module}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for folder in ("csrc", "fastrnn", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "nvcc.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root)
    add_cell(root)
    run(root, "setup.py", "-q", "build_ext", "--inplace")
    return root


def run(root, *arguments):
    command = [sys.executable, *arguments]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


def test_module_computes_the_equation(tree):
    run(tree, "-c", CHECK)


def test_suite_finds_the_cell(tree):
    files = [f"tests/test_{name}.py" for name in ("forward", "gradients", "ops", "isa", "cuda_kernels")]
    out = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rnn_sigmoid", *files)
    assert int(re.search(r"(\d+) passed", out)[1]) > 100
