"""The emulator of a GPU, in the place of the CPU's kernels."""

import pytest
import torch
from emulated import H200
from emulator import build


@pytest.fixture(scope="session")
def extension():
    return build()


@pytest.fixture
def emulator(extension, monkeypatch):
    """The emulator of an H200, in the place of the CPU's kernels."""
    extension.set_chip(*H200)
    extension.set_seed(0)
    monkeypatch.setattr(torch.ops, "fastrnn", torch.ops.fastrnn_emulated)
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    allowed = [flag.allow_tf32 for flag in flags]
    yield extension
    for flag, before in zip(flags, allowed, strict=True):
        flag.allow_tf32 = before


@pytest.fixture
def unwritten_is_nan():
    """Memory that torch hands out holds NaN; bytes, such as those of the kernels' workspace, hold 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def level(monkeypatch):
    """A function that forces a level or a tile."""

    def force(name=None, tile=None):
        for variable, value in (("FASTRNN_CUDA_LEVEL", name), ("FASTRNN_CUDA_TILE", tile)):
            if value is None:
                monkeypatch.delenv(variable, raising=False)
            else:
                monkeypatch.setenv(variable, str(value))

    return force
