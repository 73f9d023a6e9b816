"""What every test starts from."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """A function that sets torch's thread count; the count of before comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """Says how much of the CUDA kernels was executed."""
    emulator = sys.modules.get("emulator")
    if emulator and emulator.build.cache_info().currsize:
        launches = emulator.build().launches()
        terminalreporter.write_line(
            f"CUDA kernels executed by the emulator: {len(launches)}, in {sum(launches.values())} launches"
        )


def pytest_collection_finish():
    """torch.testing._internal, which some tests import, forbids to assign to the flags of torch.backends; others do."""
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
