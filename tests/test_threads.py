"""Thread counts, calls from several Python threads, and child processes. Nothing here may wait for ever."""

import multiprocessing
import os
import queue
import threading

import pytest
import torch
from twins import LAYERS, make

import fastrnn

TIMEOUT = 60  # seconds; a call takes milliseconds
each_layer = pytest.mark.parametrize("case", LAYERS)


def large(case, **options):
    """A module and an input large enough for several threads.

    No tensor is so large (32768 elements) that torch would split it among threads: OpenMP's do not survive a fork.
    """
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


def _child(send, module, x):
    send.send([tensor.numpy() for tensor in outputs_and_gradients(module, x)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child(threads):
    """A child of a process whose worker threads are running starts its own; the parent's go on."""
    threads(2)
    module, x = large("LSTM", bidirectional=True)
    expected = outputs_and_gradients(module, x)
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(send, module, x), daemon=True)
        child.start()
        try:
            assert receive.poll(TIMEOUT), "the child hangs"
            assert_equal_bits([torch.from_numpy(array) for array in receive.recv()], expected)
        finally:
            child.kill()
        assert_equal_bits(outputs_and_gradients(module, x), expected)


class Features(torch.utils.data.Dataset):
    """Item i is the output of a module for a sequence of i + 1 steps: computed in the worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(torch.ones(i + 1, 64, dtype=torch.float64))[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_data_loader_worker(threads):
    threads(2)
    module, x = large("LSTM")
    outputs_and_gradients(module, x)
    features = Features(module)
    loader = torch.utils.data.DataLoader(
        features, batch_size=None, num_workers=2, timeout=TIMEOUT, multiprocessing_context="fork"
    )
    for i, item in enumerate(loader):
        assert_equal_bits(item, features[i])
    assert i == 5
