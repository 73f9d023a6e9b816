"""Forked children, whatever their parent did before: they never hang, and compute the same."""

import multiprocessing
import os

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map_only
from twins import CELLS, LAYERS, make

import fastrnn

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

TIMEOUT = 60  # seconds; a call takes milliseconds
T, B, H = 6, 128, 96  # x, the weights and every state of a stack are so large that torch splits them among threads

# Name: options of the module, whether the input is packed, whether a state is given.
WAYS = {
    "plain": ({}, False, False),
    "batch_first": ({"batch_first": True}, False, True),
    "packed": ({}, True, False),
    "stack": ({"num_layers": 3, "bidirectional": True, "dropout": 0.5}, False, True),
    "packed-stack": ({"num_layers": 3, "bidirectional": True, "dropout": 0.5}, True, True),
    "recompute": ({"recompute": True}, False, False),
}


@pytest.fixture(autouse=True)
def parent(threads):
    """This process has used both pools of threads, its own and OpenMP's, for which a fork leaves no workers."""
    threads(2)
    assert (torch.ones(400000) + 1).sum() == 800000
    fastrnn.LSTM(64, 64)(torch.randn(8, 64, 64))


def in_child(function):
    """What `function()` returns in a forked child, tensors as float64; an error there is one here."""

    def run(send):
        try:
            send.send(tree_map_only(torch.Tensor, lambda t: t.detach().double().numpy(), function()))
        except Exception as error:
            send.send(repr(error))

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(send,), daemon=True)
    child.start()
    try:
        assert receive.poll(TIMEOUT), "the child hangs"
        return receive.recv()
    finally:
        child.kill()


def assert_same_in_child(function, tolerance=0):
    torch.manual_seed(1)
    expected = [t.detach().double() for t in tree_leaves(function())]
    found = in_child(lambda: torch.manual_seed(1) and tree_leaves(function()))
    assert not isinstance(found, str), found
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=0, atol=tolerance)


def call_of(case, dtype, way):
    options, is_packed, has_state = WAYS[way]
    module = make(fastrnn, case, H, H, dtype=dtype, **options)
    x = torch.randn((B, T, H) if module.batch_first else (T, B, H), dtype=dtype)
    if is_packed:
        x = pack_padded_sequence(x, torch.randint(1, T + 1, (B,)), enforce_sorted=False)
    L = module.num_layers * (2 if module.bidirectional else 1)
    h, c = torch.randn(L, B, module.proj_size or H, dtype=dtype), torch.randn(L, B, H, dtype=dtype)
    state = None if not has_state else (h, c) if isinstance(module, torch.nn.LSTM) else h
    return module, lambda: module(x, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LAYERS)
def test_inference(case, way, dtype):
    call = call_of(case, dtype, way)[1]
    with torch.no_grad():
        assert_same_in_child(lambda: call()[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LAYERS)
def test_training(case, way):
    """With torch's own operations around the layer, which use OpenMP, too."""
    module, call = call_of(case, torch.float32, way)

    def step():
        y, state = call()
        module.zero_grad()
        (getattr(y, "data", y).square().sum() + sum(s.sum() for s in tree_leaves(state))).backward()
        return [p.grad for p in module.parameters()]

    assert_same_in_child(step)


@pytest.mark.parametrize("case", ["LSTM", "GRU", "RNN-tanh"])
def test_rounded_and_kept_weights(case):
    """Packing copies all weights: here more than torch copies on one thread."""
    for weights in (None, "bf16"):
        module = make(fastrnn, case, 512, 512, dtype=torch.float32, weights=weights)
        x = torch.randn(10, 2, 512)
        with torch.no_grad():
            assert_same_in_child(lambda module=module, x=x: module(x)[0])


@pytest.mark.parametrize("case", CELLS)
def test_cells(case):
    module = make(fastrnn, case, 512, 512, dtype=torch.float32)
    x, h = torch.randn(256, 512), torch.randn(256, 512)
    with torch.no_grad():
        assert_same_in_child(lambda: module(x, (h, h) if isinstance(module, torch.nn.LSTMCell) else h))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("case", ["LSTM", "GRU", "RNN-tanh"])
def test_streams(case, copy):
    """Made in the parent or in the child; the input is not dense, so it is copied."""
    module, x = make(fastrnn, case, 512, 512, dtype=torch.float32), torch.randn(512, 256).t()
    stream = module.stream(256, copy=copy)
    expected = module.stream(256)(x).double()
    for function in (lambda: stream(x), lambda: module.stream(256)(x), lambda: stream.reset() or stream(x)):
        assert torch.equal(torch.from_numpy(in_child(function)), expected)


@pytest.mark.parametrize("case", ["LSTM", "GRUCell"])
def test_computed_weights(case):
    """Their computation comes before the layer's."""
    module = make(fastrnn, case, 512, 512, dtype=torch.float32)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh" if case in CELLS else "weight_hh_l0")
    x = torch.randn(256, 512) if case in CELLS else torch.randn(4, 64, 512)
    with torch.no_grad():
        assert_same_in_child(lambda: module(x), tolerance=1e-6)  # norms, which torch sums in another order


def test_the_parent_goes_on_and_may_fork_again():
    module, x = fastrnn.LSTM(64, 64, bidirectional=True), torch.randn(8, 64, 64)
    expected = module(x)[0]
    for _ in range(2):
        assert_same_in_child(lambda: module(x)[0])
        assert torch.equal(module(x)[0], expected)
        assert torch.get_num_threads() == 2


def test_second_derivatives():
    """They go through torch's operations alone."""
    module, x = fastrnn.GRU(8, 64), torch.randn(4, 256, 8, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), module.weight_hh_l0)

    # Sums of a thousand numbers of size up to 10, by a matrix library that adds in another order on one thread.
    assert_same_in_child(penalty, tolerance=1e-2)


def test_a_child_of_a_child():
    module, x = fastrnn.GRU(64, 64), torch.randn(8, 256, 64)
    expected = module(x)[0].detach().double()

    def grandchild():
        module(x)
        return in_grandchild(lambda: module(x)[0])

    assert torch.equal(torch.from_numpy(in_child(grandchild)), expected)


def in_grandchild(function):
    """The same from inside of a child, which may have no daemons of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"x" if function() is not None else b"-")
        os._exit(0)
    assert os.read(read, 1) == b"x"
    os.waitpid(pid, 0)
    return function()


class Features(torch.utils.data.Dataset):
    """Item i is the output of a module for a sequence of i + 1 steps: computed in the worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(torch.ones(i + 1, 64, dtype=torch.float64))[0]


def test_data_loader_worker():
    module, x = (fastrnn.LSTM(64, 64, dtype=torch.float64), torch.randn(8, 32, 64, dtype=torch.float64))
    module(x)[0].sum().backward()
    features = Features(module)
    loader = torch.utils.data.DataLoader(
        features, batch_size=None, num_workers=2, timeout=TIMEOUT, multiprocessing_context="fork"
    )
    for i, item in enumerate(loader):
        assert torch.equal(item, features[i])
    assert i == 5
