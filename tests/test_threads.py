"""Thread counts, and calls from several Python threads. Nothing here may wait for ever."""

import queue
import threading

import pytest
import torch
from twins import LAYERS, make

import fastrnn

TIMEOUT = 60  # seconds; a call takes milliseconds
each_layer = pytest.mark.parametrize("case", LAYERS)


def large(case, **options):
    """A module and an input large enough for several threads."""
    module = make(fastrnn, case, 64, 64, **options)
    return module, torch.randn(8, 32, 64, dtype=torch.float64)


def outputs_and_gradients(module, x):
    x = x.detach().requires_grad_()
    output, _ = module(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])]


def assert_equal_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_layer
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
def test_any_thread_count_gives_the_same_bits(case, bidirectional, threads):
    module, x = large(case, bidirectional=bidirectional)
    found = []
    for count in (1, 2, 3, 16):
        threads(count)
        found.append(outputs_and_gradients(module, x))
    for other in found[1:]:
        assert_equal_bits(other, found[0])


@each_layer
def test_the_same_call_gives_the_same_bits(case, threads):
    threads(2)
    module, x = large(case, bidirectional=True)
    first = outputs_and_gradients(module, x)
    for _ in range(5):
        assert_equal_bits(outputs_and_gradients(module, x), first)


@pytest.mark.parametrize("count", [1, 2], ids=["1-thread", "2-threads"])
def test_calls_from_several_python_threads(count, threads):
    """Four Python threads, each with a module and inputs of its own and a shared module, ten times each."""
    threads(count)
    shared, x = large("LSTM", bidirectional=True)
    own = [large("GRU") for _ in range(4)]
    expected = [(outputs_and_gradients(shared, x + i), outputs_and_gradients(*own[i])) for i in range(4)]
    results = queue.Queue()

    def work(i):
        torch.set_num_threads(count)  # the setting is one per thread
        for _ in range(10):
            results.put((i, (outputs_and_gradients(shared, x + i), outputs_and_gradients(*own[i]))))

    for i in range(4):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    for _ in range(40):
        i, found = results.get(timeout=TIMEOUT)
        assert_equal_bits(found, expected[i])
