"""Streaming: a sequence fed step by step is the sequence at once, and the state is the user's to reset and to set."""

import copy
import threading

import pytest
import torch

import fastrnn

MODULES = {
    "LSTM": lambda **kw: fastrnn.LSTM(5, 21, **kw),
    "LSTM-projected": lambda **kw: fastrnn.LSTM(5, 21, proj_size=6, **kw),
    "GRU": lambda **kw: fastrnn.GRU(5, 21, **kw),
    "GRU-reset-before": lambda **kw: fastrnn.GRU(5, 21, reset_after=False, **kw),
    "RNN": lambda **kw: fastrnn.RNN(5, 21, **kw),
}
# A stream keeps its state between steps in the module's dtype: 16-bit types round it once more per step.
TOLERANCE = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 3e-2, torch.float16: 3e-3}
each_module = pytest.mark.parametrize("name", MODULES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def steps(stream, x):
    return torch.stack([stream(frame).clone() for frame in x])


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


@each_module
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"bias": False}], ids=["one", "stack", "no-bias"])
@pytest.mark.parametrize("batch", [1, 7])
def test_is_the_whole_sequence(name, dtype, options, batch):
    """The same kernels in the same order: the same bits where the state is not rounded."""
    module = MODULES[name](**options).to(dtype)
    x = torch.randn(6, batch, 5).to(dtype)
    stream = module.stream(batch=batch)
    with torch.no_grad():
        y, hx = module(x)
    found = steps(stream, x)
    for actual, expected in zip((found, *as_tuple(stream.state)), (y, *as_tuple(hx)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


@each_module
@pytest.mark.parametrize("size", [300, 520])
def test_wide_layers_on_two_threads(name, size):
    """Large enough for threads to share a step: the input product by columns."""
    module = {
        "LSTM": lambda: fastrnn.LSTM(size, size),
        "LSTM-projected": lambda: fastrnn.LSTM(size, size, proj_size=7),
        "GRU": lambda: fastrnn.GRU(size, size),
        "GRU-reset-before": lambda: fastrnn.GRU(size, size, reset_after=False),
        "RNN": lambda: fastrnn.RNN(size, size),
    }[name]()
    x = torch.randn(6, 1, size)  # longer than what is multiplied unpacked, in another order
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(steps(module.stream(), x))
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        y, _ = module(x)
    assert torch.equal(found[0], y)
    assert torch.equal(found[1], y)


@each_module
def test_reset_of_all_and_of_some_rows(name):
    module = MODULES[name](num_layers=2)
    x = torch.randn(4, 3, 5)
    stream = module.stream(batch=3)
    fresh = steps(stream, x)
    stream.reset()
    assert torch.equal(steps(stream, x), fresh)
    kept = [state.clone() for state in as_tuple(stream.state)]
    stream.reset(torch.tensor([True, False, True]))
    for state, before in zip(as_tuple(stream.state), kept, strict=True):
        assert not state[:, [0, 2]].any()
        assert torch.equal(state[:, 1], before[:, 1])
    again = stream(x[0]).clone()
    assert torch.equal(again[[0, 2]], fresh[0][[0, 2]])
    assert not torch.equal(again[1], fresh[0][1])


def test_continues_from_a_state_that_was_written():
    module = MODULES["LSTM"]()
    x = torch.randn(8, 2, 5)
    with torch.no_grad():
        y, _ = module(x)
        _, (h, c) = module(x[:5])
    stream = module.stream(batch=2)
    stream.state[0].copy_(h)
    stream.state[1].copy_(c)
    assert torch.equal(steps(stream, x[5:]), y[5:])


def test_output_is_one_tensor_and_weights_are_a_copy():
    module = MODULES["GRU"]()
    stream = module.stream()
    first = stream(torch.ones(1, 5))
    before = first.clone()
    stream.reset()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert stream(torch.ones(1, 5)) is first
    assert torch.equal(first, before)
    assert not first.requires_grad


def test_survives_its_module():
    stream = MODULES["LSTM"](num_layers=2).stream()
    expected = steps(stream, torch.ones(3, 1, 5))
    stream.reset()
    junk = [torch.randn(100, 100) for _ in range(50)]
    assert torch.equal(steps(stream, torch.ones(3, 1, 5)), expected)
    assert junk


def test_strided_input_and_computed_weights():
    module = torch.nn.utils.parametrizations.weight_norm(MODULES["LSTM"](), "weight_hh_l0")
    x = torch.randn(5, 2, 3).permute(2, 1, 0)
    with torch.no_grad():
        y, _ = module(x)
    assert torch.equal(steps(module.stream(batch=2), x), y)


def test_memory_is_about_that_of_the_weights():
    """Panels are padded to whole vectors; besides there are one step's buffers."""
    module = fastrnn.GRU(256, 256)
    weights = sum(p.nbytes for p in module.parameters())
    assert weights < module.stream().nbytes < 1.1 * weights
    assert module.to(torch.bfloat16).stream().nbytes < 0.6 * weights


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(1, 4), ValueError, r"x: expected shape \(1, 5\), got \(1, 4\)"),
        (torch.zeros(5), ValueError, r"x: expected shape \(1, 5\), got \(5,\)"),
        (torch.zeros(1, 5, dtype=torch.float64), TypeError, "x: expected dtype torch.float32, got torch.float64"),
        (torch.zeros(1, 5, device="meta"), RuntimeError, "x: expected device cpu, got meta"),
    ],
    ids=["size", "dimensions", "dtype", "device"],
)
def test_bad_input(x, error, text):
    with pytest.raises(error, match=text):
        MODULES["LSTM"]().stream()(x)


@pytest.mark.parametrize("batch", [0, -1, 1.5, None])
def test_bad_batch(batch):
    with pytest.raises(ValueError, match="batch: expected an integer of at least 1"):
        MODULES["LSTM"]().stream(batch=batch)


def test_bad_module():
    with pytest.raises(ValueError, match="expected one direction"):
        MODULES["LSTM"](bidirectional=True).stream()
    with pytest.raises(NotImplementedError, match="expected weights on the CPU"):
        MODULES["LSTM"](device="meta").stream()
    with pytest.raises(TypeError):
        copy.deepcopy(MODULES["LSTM"]().stream())


def test_threads_each_with_their_own_stream():
    module = MODULES["LSTM"](num_layers=2)
    x = torch.randn(50, 1, 5)
    expected = steps(module.stream(), x)
    found = [None] * 4

    def work(i):
        found[i] = steps(module.stream(), x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for y in found)
