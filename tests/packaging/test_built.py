"""An import of the package with an extension that does not fit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrnn import _C, built

HERE = torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0", "torch==2.13.*"),
        ("2.13.0+cpu", "torch==2.13.*"),
        ("2.9.1+cu128", "torch==2.9.*"),
        ("2.14.0.dev20261101+cpu", "torch==2.14.0.dev20261101"),
        ("2.11.0a0+git1234", "torch==2.11.0a0"),
    ],
)
def test_served(version, expected):
    assert built.served(version) == expected


@pytest.mark.parametrize(
    ("built_with", "here", "serves"),
    [
        (("2.13.0", None), ("2.13.1", None), True),
        (("2.13.0+cpu", None), ("2.13.0+cu130", "13.0"), True),
        (("2.13.0", "13.0"), ("2.13.0", "13.2"), True),
        (("2.13.0", None), ("2.12.1", None), False),
        (("2.13.0", None), ("2.14.0", None), False),
        (("2.13.0", None), ("3.13.0", None), False),
        (("2.13.0", None), ("2.13.0a0", None), False),
        (("2.13.0", "13.0"), ("2.13.0+cpu", None), False),
        (("2.13.0", "13.0"), ("2.13.0", "12.8"), False),
    ],
)
def test_what_is_served(built_with, here, serves):
    reason = built.why_not({"torch": built_with[0], "cuda": built_with[1]}, *here)
    assert (reason is None) == serves
    assert reason is None or "pip install" in reason


def package(folder, record=None, extension=None):
    """A copy of the package with another record of its build, and this file for its extension; without, its own."""
    copy = folder / "fastrnn"
    source = Path(built.__file__).parent
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("_C.*.so", built.RECORD, "__pycache__", "csrc"))
    (copy / built.RECORD).write_text(record or built.record(torch.__version__, None))
    if extension is None:
        (copy / Path(_C.__file__).name).symlink_to(_C.__file__)
    else:
        (copy / extension).write_bytes(b"damaged")
    return folder


def said(folder):
    """What an import of the package in a folder says that fails."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import fastrnn"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 1, process.stderr
    return process.stderr.strip().splitlines()[-1]


def test_another_torch_is_an_error(tmp_path):
    assert said(package(tmp_path, built.record("2.9.1+cpu", None))) == (
        "ImportError: fastrnn was built with torch 2.9.1+cpu and serves torch==2.9.* alone, and this is torch "
        f"{torch.__version__}. Either install one that it serves, pip install 'torch==2.9.*', or, in a clone of "
        "fastrnn, build it with the torch that is here: pip install --no-build-isolation ."
    )


def test_an_extension_that_does_not_load_is_an_error(tmp_path):
    text = said(package(tmp_path, extension=Path(_C.__file__).name))
    assert text.startswith(
        f"ImportError: fastrnn's extension, built with torch {torch.__version__}, does not load with torch {HERE}"
    )
    assert "file too short" in text or "ELF" in text


def test_an_extension_of_another_python_is_an_error(tmp_path):
    text = said(package(tmp_path, extension="_C.cpython-39-x86_64-linux-gnu.so"))
    assert f"is not built for this Python {sys.version.split()[0]}" in text
    assert "has _C.cpython-39-x86_64-linux-gnu.so. Build it: make setup" in text


def test_a_build_of_this_torch_is_imported(tmp_path):
    package(tmp_path)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastrnn; fastrnn.GRU"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
