"""What every test on a GPU starts from, and what becomes of these tests where there is none."""

from pathlib import Path

import pytest
import torch

import fastrnn  # noqa: F401 - registers the ops
from benchmarks.measure import products_of

HERE = Path(__file__).parent


def obstacle() -> str:
    """Why nothing here can run, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastrnn::layer_forward", "CUDA"):
        return "this fastrnn was built without CUDA kernels"
    return ""


def pytest_collection_modifyitems(items):
    """Where nothing can run, one skipped test stands for all."""
    reason = obstacle()
    own = [item for item in items if HERE in item.path.parents]
    if reason and own:
        items[:] = [item for item in items if item not in own[1:]]
        own[0].add_marker(pytest.mark.skip(reason=f"{reason}, for {len(own)} tests"))


@pytest.fixture(autouse=True)
def exact_products():
    """Unless a test asks for it, no product of float32 numbers is rounded to TensorFloat-32, torch.nn's neither."""
    with products_of("float32"):
        yield


@pytest.fixture(autouse=True)
def sound_device():
    """Ends the run after a test that leaves the device in error: every later test of this process would fail."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the device is in error since the last test: {error}")


@pytest.fixture
def force(monkeypatch):
    """A function that forces a level, or a tile, for the calls that follow."""

    def set_variables(level: str | None = None, tile: int | None = None):
        for name, value in (("FASTRNN_CUDA_LEVEL", level), ("FASTRNN_CUDA_TILE", tile)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return set_variables
