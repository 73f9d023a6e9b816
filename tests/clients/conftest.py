"""What the tests of other people's programs start from."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The models are small: on a busy machine, more threads would but wait for each other, for seconds."""
    threads(1)
