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


def test_output_is_overwritten_and_weights_are_a_copy():
    module = MODULES["GRU"]()
    stream = module.stream()
    first = stream(torch.ones(1, 5))
    before = first.clone()
    stream.reset()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert stream(torch.ones(1, 5)).data_ptr() == first.data_ptr()
    assert torch.equal(first, before)
    assert not first.requires_grad


@each_module
def test_copied_outputs_are_kept(name):
    """What everybody writes: a list of all outputs."""
    module, x = MODULES[name](), torch.randn(6, 2, 5)
    with torch.no_grad():
        expected = module(x)[0]
    stream = module.stream(2, copy=True)
    assert torch.equal(torch.stack([stream(frame) for frame in x]), expected)
    shared = module.stream(2)
    outputs = [shared(frame) for frame in x]
    assert all(y.data_ptr() == outputs[0].data_ptr() for y in outputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_refused():
    """It would hold one output as a constant."""
    stream = fastrnn.LSTM(5, 7).stream()
    with pytest.raises(RuntimeError, match="Stream: cannot be traced"):
        torch.jit.trace(stream.__call__, torch.randn(1, 5))


def test_copy_must_be_bool():
    with pytest.raises(TypeError, match="copy should be of type bool, got: int"):
        fastrnn.LSTM(5, 7).stream(copy=1)


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
        (torch.zeros(1, 5, device="meta"), RuntimeError, "x: expected a dense tensor on the CPU, got device meta"),
        ([[0.0] * 5], TypeError, "x: expected a tensor, got list"),
        (torch.zeros(1, 5).to_sparse(), RuntimeError, "x: expected a dense tensor on the CPU"),
    ],
    ids=["size", "dimensions", "dtype", "device", "list", "sparse"],
)
def test_bad_input(x, error, text):
    with pytest.raises(error, match=text):
        MODULES["LSTM"]().stream()(x)


@pytest.mark.parametrize("batch", [0, -1, 1.5, None, True, 2**70])
def test_bad_batch(batch):
    with pytest.raises(ValueError, match="batch: expected an integer of at least 1"):
        MODULES["LSTM"]().stream(batch=batch)


def test_bad_module():
    with pytest.raises(ValueError, match="expected one direction"):
        MODULES["LSTM"](bidirectional=True).stream()
    with pytest.raises(NotImplementedError, match="expected weights on the CPU"):
        MODULES["LSTM"](device="meta").stream()
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied"):
            copied(MODULES["LSTM"]().stream())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("weight_hh_l0", torch.zeros(63, 21, dtype=torch.float64), TypeError),
        ("bias_ih_l0", torch.zeros(3), ValueError),
        ("weight_ih_l1", torch.zeros(3, 3), ValueError),
        ("weight_hh_l0", torch.zeros(63, 1), ValueError),
        ("weight_hh_l0", torch.zeros(63), ValueError),
        ("weight_hh_l1", torch.empty(63, 21, device="meta"), RuntimeError),
    ],
    ids=["dtype", "bias", "second-layer", "outputs", "dimensions", "meta"],
)
def test_bad_weights(name, value, error):
    """They are read by address: all of them are checked."""
    module = MODULES["GRU"](num_layers=2)
    setattr(module, name, torch.nn.Parameter(value))
    with pytest.raises(error, match=f"{name[0]}_[ih]h of layer|expected shape"):
        module.stream()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_only_traced_tensors_are_an_error():
    stream = MODULES["GRU"]().stream()
    with torch._subclasses.FakeTensorMode():
        fake = torch.randn(1, 5)
        with pytest.raises(RuntimeError, match="only traced"):
            MODULES["GRU"]().stream()
    with pytest.raises(RuntimeError, match="only traced"):
        stream(fake)


def test_its_memory_cannot_be_taken_away():
    stream = MODULES["GRU"]().stream()
    y = stream(torch.zeros(1, 5))
    for tensor in (y.detach(), stream.state):
        with pytest.raises(RuntimeError, match="resiz"):
            tensor.resize_(100, 100, 100)
    stream.state.data = torch.ones(1, 1, 21)
    stream.state.share_memory_()
    y.unsqueeze_(0).requires_grad_()
    again = stream(torch.zeros(1, 5))
    assert again.shape == (1, 21)
    assert again.isfinite().all()
    assert not again.requires_grad


def test_overwritten_output_is_an_error_in_backward():
    stream, linear = MODULES["GRU"]().stream(), torch.nn.Linear(21, 1)
    loss = linear(stream(torch.ones(1, 5))).sum()
    stream(torch.ones(1, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_negated_views():
    module, x = MODULES["GRU"](), torch.randn(1, 5)
    assert torch.equal(module.stream()(torch._neg_view(x)), module.stream()(-x))
    module.weight_hh_l0 = torch.nn.Parameter(torch._neg_view(module.weight_hh_l0.detach()))
    stream = module.stream()
    with torch.no_grad():
        y, _ = module(torch.stack([x] * 6))
    assert torch.equal(steps(stream, [x] * 6), y)


def test_made_under_inference_mode():
    with torch.inference_mode():
        stream = MODULES["LSTM"]().stream()
        stream(torch.randn(1, 5))
    stream.reset()
    stream.state[0].copy_(torch.ones(1, 1, 21))
    assert not stream(torch.randn(1, 5)).is_inference()


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (torch.tensor([1, 0, 1]), TypeError),
        ([True, False, True], TypeError),
        (torch.ones(3, 21, dtype=torch.bool), ValueError),
        (torch.tensor(True), ValueError),
        (torch.ones(3, dtype=torch.bool, device="meta"), RuntimeError),
    ],
    ids=["integers", "list", "elements", "scalar", "meta"],
)
def test_bad_rows(rows, error):
    with pytest.raises(error, match="rows: expected"):
        MODULES["LSTM"]().stream(batch=3).reset(rows)


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
