"""The short way past the dispatcher: taken by plain inference calls, by no others, with the same results."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def flatten(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flatten(part)]


def without(monkeypatch, call):
    """The same call, made the long way."""
    with monkeypatch.context() as patch:
        patch.setattr(ops.PackedLayers, "run_eagerly", lambda *args: None)
        return flatten(call())


def must_not_be_called(*args, **kwargs):
    raise AssertionError("the long way")


def rows_of(batch_first):
    """Lengths and resets of three rows of four steps, or of four of three."""
    resets = torch.tensor([[False, True, False], [True, False, False], [False, True, False], [False, False, True]])
    return {"lengths": torch.tensor([3, 1, 0, 2] if batch_first else [4, 2, 0]), "resets": resets}


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_sequences(name, options, dtype, with_state, with_rows, monkeypatch):
    module = getattr(fastrnn, name)(5, 7, **options, dtype=dtype)
    D = 2 if module.bidirectional else 1
    x, h = torch.randn(4, 3, 5, dtype=dtype), torch.randn(D, 4 if module.batch_first else 3, 7, dtype=dtype)
    hx = None if not with_state else (h, h * 2) if name == "LSTM" else h
    rows = rows_of(module.batch_first) if with_rows else {}
    with torch.no_grad():
        expected = without(monkeypatch, lambda: module(x, hx, **rows))
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        assert all(map(torch.equal, flatten(module(x, hx, **rows)), expected))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_single_steps(name, B, dtype, with_state, monkeypatch):
    module = getattr(fastrnn, name)(5, 7, dtype=dtype)
    x, h = torch.randn(B, 5, dtype=dtype), torch.randn(B, 7, dtype=dtype)
    hx = None if not with_state else (h, h * 2) if name == "LSTMCell" else h
    with torch.no_grad():
        expected = without(monkeypatch, lambda: module(x, hx))
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        found = flatten(module(x, hx))
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert all(map(torch.equal, found, expected))


def test_inference_mode_and_frozen_parameters():
    module = fastrnn.GRU(5, 7).requires_grad_(False)
    x = torch.randn(4, 3, 5)
    y = module(x)[0]
    assert not y.requires_grad
    with torch.inference_mode():
        assert module(x)[0].is_inference()
        assert torch.equal(module(x)[0], y)


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (DispatchMode, None),
        (FunctionMode, None),
        (torch._subclasses.FakeTensorMode, None),
        (lambda: torch.autocast("cpu"), None),
        (contextlib.nullcontext, lambda x: x.as_subclass(Subclass)),
        (contextlib.nullcontext, lambda x: x.to("meta")),
        (contextlib.nullcontext, lambda x: x.to_sparse()),
        (contextlib.nullcontext, torch._neg_view),
        (contextlib.nullcontext, lambda x: x.long()),
        (contextlib.nullcontext, lambda x: x.double()),
        (contextlib.nullcontext, lambda x: x[:, :, :4]),
        (contextlib.nullcontext, lambda x: x[:0]),
        (contextlib.nullcontext, lambda x: x[0, 0]),
        (contextlib.nullcontext, lambda x: x.numpy()),
        (contextlib.nullcontext, lambda x: None),
    ],
)
def test_others_do_not_take_it(mode, change):
    module = fastrnn.GRU(5, 7).requires_grad_(False)
    x = torch.randn(4, 3, 5)
    x = change(x) if change else x
    flat = module._eager_weights()
    with mode():
        assert _C.eager_forward("gru", None, False, None, x, None, None, flat, 1, None, None) is None


def test_transforms_do_not_take_it():
    module = fastrnn.GRU(5, 7).requires_grad_(False)

    def call(x):
        assert _C.eager_forward("gru", None, False, None, x, None, None, module._eager_weights(), 1, None, None) is None
        return x

    torch.vmap(call)(torch.randn(2, 4, 3, 5))
    torch.func.jvp(call, (torch.randn(4, 3, 5),), (torch.randn(4, 3, 5),))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_half_a_state_is_an_error(name):
    """As in torch.nn, whether or not gradients are recorded."""
    for record in (False, True):
        module, plain = (getattr(space, name)(5, 7).requires_grad_(record) for space in (fastrnn, torch.nn))
        x = torch.randn(3, 5) if name.endswith("Cell") else torch.randn(4, 3, 5)
        h = torch.zeros(3, 7) if name.endswith("Cell") else torch.zeros(1, 3, 7)
        for hx in ((None, None), (h, None), (None, h)):
            for each in (module, plain):
                with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
                    each(x, hx)


def test_bad_arguments():
    weights = fastrnn.GRU(5, 7).requires_grad_(False)._eager_weights()
    x = torch.randn(4, 3, 5)
    for h0 in (torch.randn(1, 3, 8), torch.randn(3, 7), torch.randn(1, 3, 7).double(), 3, "h"):
        assert _C.eager_forward("gru", None, False, None, x, h0, None, weights, 1, None, None) is None
    for flat in ((), weights[:1], (None,) * 5, (3, *weights[1:]), weights[:2] * 5):
        assert _C.eager_forward("gru", None, False, None, x, None, None, flat, 1, None, None) is None
    assert _C.eager_forward("gru", None, False, None, x[0], torch.randn(1, 3, 7), None, weights, 1, None, None) is None
    assert _C.eager_forward("tree", None, False, None, x, None, None, weights, 1, None, None) is None
    for lengths in (torch.tensor([1, 2, 5]), torch.tensor([-1, 2, 3]), torch.ones(4).long(), torch.ones(3), [1, 2, 3]):
        assert _C.eager_forward("gru", None, False, None, x, None, None, weights, 1, lengths, None) is None
    for resets in (torch.ones(3, 4).bool(), torch.ones(4, 3), torch.ones(4).bool(), True):
        assert _C.eager_forward("gru", None, False, None, x, None, None, weights, 1, None, resets) is None
    for rows in ((torch.ones(3).long(), None), (None, torch.ones(4, 3).bool())):
        assert _C.eager_forward("gru", None, False, None, x[0], None, None, weights, 1, *rows) is None
    for directions in (0, -1, 3):
        assert _C.eager_forward("gru", None, False, None, x, None, None, weights, directions, None, None) is None
    inputs, rows = (None, False, None, x, None, None), (None, None)
    for wrong in (
        ("gru",),
        ("gru", *inputs, weights, 1),
        (3, *inputs, weights, 1, *rows),
        ("gru", *inputs, [*weights], 1, *rows),
        ("gru", *inputs, weights, 1.0, *rows),
    ):
        with pytest.raises(TypeError, match="eager_forward: expected cell"):
            _C.eager_forward(*wrong)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_profiler_shows_it(name):
    module = getattr(fastrnn, name)(5, 7)
    x = torch.randn(3, 5) if name.endswith("Cell") else torch.randn(4, 3, 5)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        module(x)
    events = {event.name: event for event in profile.events()}
    assert events["fastrnn::packed_forward"].input_shapes[0] == list(x.shape)
