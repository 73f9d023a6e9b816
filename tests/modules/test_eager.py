"""The short way past the dispatcher: taken by plain inference calls, by no others, with the same results."""

import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, layers, modules, ops, recurrent

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def flatten(result):
    return [result] if isinstance(result, torch.Tensor | str) else [t for part in result for t in flatten(part)]


def without(monkeypatch, call):
    """The same call, made the long way from its beginning."""
    with monkeypatch.context() as patch:
        patch.setattr(ops.PackedLayers, "run_eagerly", lambda *args: None)
        patch.setattr(layers.Layers, "_forward_eagerly", lambda *args: None)
        for module in (modules, recurrent):
            patch.setattr(module, "step_eagerly", lambda *args: None)
        return flatten(call())


def eager(x, weights, h0=None, *, cell="gru", layers=1, directions=1, dropout=0.0, lengths=None, resets=None):
    return _C.eager_forward(cell, None, False, {}, layers, x, h0, None, weights, directions, dropout, lengths, resets)


def must_not_be_called(*args, **kwargs):
    raise AssertionError("the long way")


def message(module, *args):
    """Of the error, in a list."""
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)) as error:
        module(*args)
    return [str(error.value)]


def rows_of(batch_first):
    """Lengths and resets of three rows of four steps, or of four of three."""
    resets = torch.tensor([[False, True, False], [True, False, False], [False, True, False], [False, False, True]])
    return {"lengths": torch.tensor([3, 1, 0, 2] if batch_first else [4, 2, 0]), "resets": resets}


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}, {"num_layers": 3, "bidirectional": True}],
    ids=str,
)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_sequences(name, options, dtype, with_state, with_rows, monkeypatch):
    module = getattr(fastrnn, name)(5, 7, **options, dtype=dtype)
    states = module.num_layers * (2 if module.bidirectional else 1)
    x, h = torch.randn(4, 3, 5, dtype=dtype), torch.randn(states, 4 if module.batch_first else 3, 7, dtype=dtype)
    hx = None if not with_state else (h, h * 2) if name == "LSTM" else h
    rows = rows_of(module.batch_first) if with_rows else {}
    with torch.no_grad():
        expected = without(monkeypatch, lambda: module(x, hx, **rows))
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        assert all(map(torch.equal, flatten(module(x, hx, **rows)), expected))


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "SLSTM"])
def test_unbatched(name, options, with_state, with_rows, monkeypatch):
    module = getattr(fastrnn, name)(5, 7, **options)
    x = torch.randn(4, 5)
    states = tuple(torch.randn(module.num_layers * (1 + module.bidirectional), 7) for _ in range(1 + module._carried))
    hx = None if not with_state else states if module._carried else states[0]
    rows = {"lengths": torch.tensor(3), "resets": torch.arange(4) == 2} if with_rows else {}
    with torch.no_grad():
        expected = without(monkeypatch, lambda: module(x, hx, **rows))
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        found = flatten(module(x, hx, **rows))
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_several_states(with_state, is_cell, monkeypatch):
    module = fastrnn.RecurrentCell("slstm", 5, 7) if is_cell else fastrnn.Recurrent("slstm", 5, 7, num_layers=2)
    x, shape = (torch.randn(3, 5), (3, 7)) if is_cell else (torch.randn(4, 3, 5), (2, 3, 7))
    hx = tuple(torch.randn(shape) for _ in range(4))
    with torch.no_grad():
        changed = (hx[3][..., :6], hx[3].double(), hx[3].to("meta"), hx[3].to_sparse(), torch.tensor(0.0), None, 1)
        for states in (hx[:3], (None, *hx[1:]), (torch.tensor(0.0),) * 4, *((*hx[:3], last) for last in changed)):
            assert message(module, x, states) == without(monkeypatch, lambda states=states: message(module, x, states))
        assert [str(node.target) for node in make_fx(module)(x, hx).graph.nodes] == without(
            monkeypatch, lambda: [str(node.target) for node in make_fx(module)(x, hx).graph.nodes]
        )
        hx = hx if with_state else None
        expected = without(monkeypatch, lambda: module(x, hx))
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        assert all(map(torch.equal, flatten(module(x, hx)), expected))


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
        assert eager(x, flat) is None


def test_transforms_do_not_take_it():
    module = fastrnn.GRU(5, 7).requires_grad_(False)

    def call(x):
        assert eager(x, module._eager_weights()) is None
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
        assert eager(x, weights, h0) is None
    for flat in ((), weights[:1], (None,) * 5, (3, *weights[1:]), weights[:2] * 5):
        assert eager(x, flat) is None
    assert eager(x[0], weights, torch.randn(1, 3, 7)) is None
    assert eager(x, weights, cell="tree") is None
    for lengths in (torch.tensor([1, 2, 5]), torch.tensor([-1, 2, 3]), torch.ones(4).long(), torch.ones(3), [1, 2, 3]):
        assert eager(x, weights, lengths=lengths) is None
    for resets in (torch.ones(3, 4).bool(), torch.ones(4, 3), torch.ones(4).bool(), True):
        assert eager(x, weights, resets=resets) is None
    assert eager(x[0], weights, lengths=torch.ones(3).long()) is None
    assert eager(x[0], weights, resets=torch.ones(4, 3).bool()) is None
    for directions in (0, -1, 3):
        assert eager(x, weights, directions=directions) is None
    right = ("gru", None, False, {}, 1, x, None, None, weights, 1, 0.0, None, None)
    assert _C.eager_forward(*right) is not None
    others = ((0, 3), (1, 3), (2, None), (3, None), (4, 1.0), (8, [*weights]), (9, 1.0), (10, "0"))
    for wrong in (right[:-1], (*right, None), *((*right[:at], value, *right[at + 1 :]) for at, value in others)):
        with pytest.raises(TypeError, match="eager_forward: expected cell"):
            _C.eager_forward(*wrong)


def test_bad_arguments_of_several_layers():
    weights = fastrnn.GRU(7, 7, num_layers=2).requires_grad_(False)._eager_weights()
    x = torch.randn(4, 3, 7)
    assert eager(x, weights, layers=2) is not None
    for states in (1, 3):
        assert eager(x, weights, torch.randn(states, 3, 7), layers=2) is None
    for flat in (weights[:-1], weights[:4], weights[:6], weights + weights[:2], (*weights[:4], *weights[4:6] * 2)):
        assert eager(x, flat, layers=2) is None
    for dropout in (-0.1, 1.1, float("nan")):
        assert eager(x, weights, layers=2, dropout=dropout) is None
    assert eager(x[0], weights, layers=2) is None
    for count in (-1, 0, 3, 5, 2**62):
        assert eager(x, weights, layers=count) is None
    for wrong in ({"layers": 2**70}, {"directions": 2**70}, {"dropout": 10**400}):
        with pytest.raises(OverflowError):
            eager(x, weights, **{"layers": 2, **wrong})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_dropout_between_layers(name, record, training, monkeypatch):
    """The same numbers are drawn as by torch.nn, and none where none should be."""
    module = getattr(fastrnn, name)(5, 7, num_layers=3, dropout=0.4, dtype=torch.float64).train(training)
    theirs = getattr(torch.nn, name)(5, 7, num_layers=3, dropout=0.4, dtype=torch.float64).train(training)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def call(module):
        torch.manual_seed(3)
        return flatten(module(x))

    with torch.set_grad_enabled(record):
        expected, long = call(theirs), without(monkeypatch, lambda: call(module))
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        found = call(module)
        again = torch.rand(1)
    assert all(map(torch.equal, found, long))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.manual_seed(3)
    assert torch.equal(again, torch.rand(1)) is not training


def test_each_layer_keeps_its_weights(monkeypatch):
    """And the first one goes on keeping them where only the second is trained."""
    module = fastrnn.GRU(256, 256, num_layers=2)
    x = torch.randn(5, 2, 256)
    kept = fastrnn.layers.packs_of(module)._kept
    with torch.no_grad():
        expected = without(monkeypatch, lambda: module(x))
        kept.clear()
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        for _ in range(2):
            assert all(map(torch.equal, flatten(module(x)), expected))
            assert kept.keys() == {0, 1}
            assert not torch.equal(kept[0], kept[1])
    for parameter in (module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0):
        parameter.requires_grad_(False)
    y = module(x)[0]
    assert y.requires_grad
    assert kept.keys() == {0}


@pytest.mark.parametrize("order", [[4, 3, 1], [3, 4, 1]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.4}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_packed_sequences(name, options, record, with_state, order, monkeypatch):
    """All but those that drop between layers: torch.nn draws for the packed elements alone."""
    module = getattr(fastrnn, name)(5, 7, **options)
    states = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(states, 3, 7)
    hx = None if not with_state else (h, h * 2) if name == "LSTM" else h
    packed = pack_padded_sequence(torch.randn(4, 3, 5), order, enforce_sorted=order[0] == 4)

    def call():
        torch.manual_seed(3)
        output, state = module(packed, hx)
        return [output.data, *flatten(state)]

    with torch.set_grad_enabled(record):
        if options:
            dropped = without(monkeypatch, call)
            assert all(map(torch.equal, call(), dropped))
            module.eval()
        expected = without(monkeypatch, call)
        monkeypatch.setattr(ops.PackedLayers, "run", must_not_be_called)
        assert all(map(torch.equal, call(), expected))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_profiler_shows_it(name):
    module = getattr(fastrnn, name)(5, 7)
    x = torch.randn(3, 5) if name.endswith("Cell") else torch.randn(4, 3, 5)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        module(x)
    events = {event.name: event for event in profile.events()}
    assert events["fastrnn::packed_forward"].input_shapes[0] == list(x.shape)
