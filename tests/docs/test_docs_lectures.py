"""The table of docs/lectures.md: what it names is there."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastrnn
from examples.__main__ import NAMES
from fastrnn.cells import CELLS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "lectures.md").read_text()
HEAD, _, *ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TEXT[TEXT.index("| lectures | ") :].split("\n\n")[0].splitlines()
]


def of(row: list[str], column: str) -> str:
    return row[HEAD.index(column)]


def public(name: str):
    """What a dotted name below fastrnn is."""
    importlib.import_module("fastrnn.reservoir")
    return functools.reduce(getattr, name.split(".")[1:], fastrnn)


each_row = pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])


@each_row
def test_row(row):
    assert len(row) == len(HEAD)
    assert all(row)
    assert set(of(row, "lectures").split(", ")) <= {"000", "001", "002", "003", "004"}
    for cell in re.findall(r"`(.+?)`", of(row, "equation")):
        assert cell in CELLS
    modules = re.findall(r"`(fastrnn\..+?)`", of(row, "module"))
    for name in modules:
        assert public(name) is not None
    for path in re.findall(r"`(examples/.+?)`", of(row, "module")):
        assert (ROOT / path).exists()
    tests = re.findall(r"`(.+?)`", of(row, "tests"))
    texts = [(ROOT / "tests" / path).read_text() for path in tests]
    for name in modules:  # tests of cells find them all in the registry, those of examples in their folder
        in_all = {"kernels/test_cells.py", "modules/test_examples.py"} & set(tests)
        assert in_all or any(name.rpartition(".")[2] in text for text in texts)


@each_row
def test_reference_is_that_of_the_code(row):
    """Each year, with the first author before it, stands in the docstring of a module or equation of the row, too."""
    names = re.findall(r"`(fastrnn\..+?)`", of(row, "module"))
    cells = re.findall(r"`(.+?)`", of(row, "equation"))
    texts = [inspect.getdoc(public(name)) or "" for name in names]
    texts += [inspect.getdoc(CELLS[name].equation) or "" for name in cells]
    if not texts or "functional" in of(row, "module"):
        return
    for author, year in re.findall(r"(\w+)[^;]*? (\d{4})", of(row, "reference")):
        assert any(re.search(rf"{author}[^;)]* {year}", " ".join(text.split())) for text in texts), (author, year)


def test_every_lecture_and_example_is_there():
    assert set(re.findall(r"00\d", " ".join(of(row, "lectures") for row in ROWS))) == {f"00{i}" for i in range(5)}
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    assert all(f"`python -m examples {name}`" in gallery for name in NAMES)
