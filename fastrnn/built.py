"""Loads the extension, or says why it cannot be loaded.

A binary serves one minor version of torch: those of others lack some of the C++ symbols that it was linked with, and
might differ in what they do not lack. So the versions are compared before anything is loaded.

setup.py imports this file alone, without the package.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import re
import sys
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
RECORD = "built_with.json"  # beside the extension, by setup.py
REBUILD = "in a clone of fastrnn, build it with the torch that is here: pip install --no-build-isolation ."


def record(version: str, cuda: str | None) -> str:
    """What the record of a build is: the versions of torch, and of CUDA if there are kernels for GPUs."""
    return json.dumps({"torch": version, "cuda": cuda})


def served(version: str) -> str:
    """The versions of torch that an extension built with this one serves, as pip writes them."""
    release = version.split("+")[0]
    is_final = re.fullmatch(r"\d+\.\d+\.\d+", release)
    return f"torch=={release.rpartition('.')[0]}.*" if is_final else f"torch=={release}"


def why_not(built: dict[str, str | None], version: str, cuda: str | None) -> str | None:
    """Why a build does not serve a torch of this version and CUDA; None if it does."""
    wanted = served(built["torch"] or "")
    if served(version) != wanted:
        return (
            f"fastrnn was built with torch {built['torch']} and serves {wanted} alone, and this is torch {version}. "
            f"Either install one that it serves, pip install '{wanted}', or, {REBUILD}"
        )
    major = (built["cuda"] or "").split(".")[0]
    if major and major != (cuda or "").split(".")[0]:
        here = f"for CUDA {cuda}" if cuda else "without CUDA"
        return (
            f"fastrnn was built for CUDA {built['cuda']}, and this is a torch {here}. Install one for it, or, {REBUILD}"
        )
    return None


def _load() -> None:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((_FOLDER / f"_C{suffix}").exists() for suffix in suffixes):
        others = ", ".join(sorted(file.name for file in _FOLDER.glob("_C.*") if file.suffix in (".so", ".pyd")))
        raise ImportError(
            f"fastrnn's extension is not built for this Python {sys.version.split()[0]}: {_FOLDER} has "
            f"{others or 'none'}. Build it: make setup, or pip install --no-build-isolation . in a clone of fastrnn"
        )
    file = _FOLDER / RECORD
    built = json.loads(file.read_text()) if file.exists() else None
    reason = built and why_not(built, torch.__version__, torch.version.cuda)
    if reason:
        raise ImportError(reason)
    try:
        importlib.import_module("fastrnn._C")
    except ImportError as error:
        made = f"built with torch {built['torch']}" if built else "of which nothing says what torch it was built with"
        raise ImportError(
            f"fastrnn's extension, {made}, does not load with torch {torch.__version__}: {error}. "
            f"To repair it, {REBUILD}"
        ) from error


if __package__:
    _load()
