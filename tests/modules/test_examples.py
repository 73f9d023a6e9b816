"""The programs in examples/: each runs through, as a user starts it, with a hundredth of its training."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.__main__ import HERE, NAMES

GALLERY = Path(__file__).parents[2] / "docs" / "gallery.md"


@pytest.fixture(autouse=True)
def modes():
    """What an example changes of torch's and matplotlib's does not reach other tests."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    threads = torch.get_num_threads()
    yield
    plt.close("all")
    torch.set_num_threads(threads)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_runs_through(name, tmp_path, capsys):
    importlib.import_module(f"examples.{name}").main(0.01, tmp_path)
    assert re.search(r"\d", capsys.readouterr().out)
    plots = list(tmp_path.iterdir())
    assert [plot.name for plot in plots] == [f"{name}.png"]
    assert plots[0].stat().st_size < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_is_for_students(name):
    """One file, under 150 lines, which imports no other example and says which lecture it belongs to."""
    text = (HERE / f"{name}.py").read_text()
    assert len(text.splitlines()) < 150
    assert "import examples" not in text
    assert "from examples" not in text
    assert name == "own_cell" or re.search(r"Lectures? 00\d", text)


def test_gallery_shows_them_all():
    text = GALLERY.read_text()
    for name in NAMES:
        assert f"python -m examples {name}`" in text
        assert f"](gallery/{name}.png)" in text
        assert (GALLERY.parent / "gallery" / f"{name}.png").exists()


def run(*arguments, status=0):
    command = [sys.executable, "-m", "examples", *arguments]
    process = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == status, process.stderr
    return process.stdout + process.stderr


def test_list_and_one_example(tmp_path):
    lines = run("--list").splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(line.endswith(".") for line in lines)
    out = run("bidirectional", "--effort", "0.01", "--out", str(tmp_path / "new"))
    assert "bidirectional: " in out
    assert (tmp_path / "new" / "bidirectional.png").exists()


def test_bad_arguments():
    assert "expected --list, --all or the name of an example" in run(status=2)
    assert "invalid choice: 'elephant'" in run("elephant", status=2)
    assert "--effort: expected a number above 0 and up to 100, got 0.0" in run("skip", "--effort", "0", status=2)


def test_own_cell_is_short():
    cell = re.search(r"@fastrnn\.cell.*?\n\n\n", (HERE / "own_cell.py").read_text(), re.DOTALL)[0]
    assert len(cell.splitlines()) < 20
