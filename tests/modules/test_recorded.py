"""Plain calls that record gradients: the node of autograd's graph that is in C++ against the one in Python."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import autograd, ops
from fastrnn.cells import CELLS

I, H, T, B = 5, 7, 4, 3


def with_rows(module):
    """A layer whose calls have lengths and resets."""
    resets = torch.tensor([[False, True, False], [True, False, False], [False, True, False], [False, False, True]])
    module.rows = {"lengths": torch.tensor([4, 2, 0]), "resets": resets.T if module.batch_first else resets}
    return module


def unbatched(module, **rows):
    """A layer whose calls have a single sequence."""
    module.is_unbatched, module.rows = True, rows
    return module


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # kernels of other cells are compiled: of two
LAYERS = {
    "RNN": lambda **o: fastrnn.RNN(I, H, **o),
    "LSTM": lambda **o: fastrnn.LSTM(I, H, **o),
    "GRU": lambda **o: fastrnn.GRU(I, H, **o),
    "GRU, reset before": lambda **o: fastrnn.GRU(I, H, reset_after=False, **o),
    "LSTM, both ways": lambda **o: fastrnn.LSTM(I, H, bidirectional=True, **o),
    "LSTM, projection": lambda **o: fastrnn.LSTM(I, H, proj_size=3, **o),
    "LSTM, peephole": lambda **o: fastrnn.LSTM(I, H, peephole=True, **o),
    "GRU, no bias": lambda **o: fastrnn.GRU(I, H, bias=False, **o),
    "LSTM, three layers": lambda **o: fastrnn.LSTM(I, H, num_layers=3, **o),
    "GRU, two layers both ways": lambda **o: with_rows(fastrnn.GRU(I, H, num_layers=2, bidirectional=True, **o)),
    "LSTM, recompute": lambda **o: fastrnn.LSTM(I, H, recompute=True, **o),
    "GRU, batch_first": lambda **o: fastrnn.GRU(I, H, batch_first=True, **o),
    "LSTM, rows": lambda **o: with_rows(fastrnn.LSTM(I, H, **o)),
    "GRU, rows, both ways": lambda **o: with_rows(fastrnn.GRU(I, H, bidirectional=True, batch_first=True, **o)),
    "LSTM, rows, recompute": lambda **o: with_rows(fastrnn.LSTM(I, H, recompute=True, **o)),
    "GRU, two layers, unbatched": lambda **o: unbatched(fastrnn.GRU(I, H, num_layers=2, batch_first=True, **o)),
    "LSTM, rows, unbatched": lambda **o: unbatched(
        fastrnn.LSTM(I, H, bidirectional=True, **o), lengths=torch.tensor(3), resets=torch.arange(T) == 2
    ),
    "Recurrent, rows": lambda **o: with_rows(fastrnn.Recurrent("mgu", I, H, **o)),
    "Recurrent": lambda **o: fastrnn.Recurrent("mgu", I, H, **o),
    "Recurrent, four states": lambda **o: with_rows(fastrnn.Recurrent("slstm", I, H, num_layers=2, **o)),
    "Recurrent, LSTM": lambda **o: fastrnn.Recurrent("lstm_peephole", I, H, **o),
    "RecurrentCell": lambda **o: fastrnn.RecurrentCell("mgu", I, H, **o),
    "RecurrentCell, four states": lambda **o: fastrnn.RecurrentCell("slstm", I, H, **o),
    "RNNCell": lambda **o: fastrnn.RNNCell(I, H, **o),
    "LSTMCell": lambda **o: fastrnn.LSTMCell(I, H, **o),
    "GRUCell": lambda **o: fastrnn.GRUCell(I, H, **o),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def flatten(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flatten(part)]


def must_not_be_called(*args, **kwargs):
    raise AssertionError("the long way")


def arguments(name, module, dtype=torch.float64, with_state=True):
    """Input and states, which require gradients."""
    P = getattr(module, "proj_size", 0) or H
    x, shape = (B, I), (B,)
    if "Cell" not in name:
        x, shape = (B, T, I) if module.batch_first else (T, B, I), (module.num_layers * (1 + module.bidirectional), B)
    if getattr(module, "is_unbatched", False):
        x, shape = (T, I), shape[:1]
    carried = CELLS[module._cell].carried
    draw = torch.randn if carried < 2 else torch.rand  # an sLSTM divides by one of its states
    states = [draw(*shape, P, dtype=dtype), *(draw(*shape, H, dtype=dtype) for _ in range(carried))]
    given = (torch.randn(x, dtype=dtype), *(state + (carried > 1) for state in states if with_state))
    return tuple(tensor.requires_grad_() for tensor in given)


def call(module, x, *states):
    hx = None if not states else states[0] if len(states) == 1 else states
    return flatten(module(x, hx, **getattr(module, "rows", {})))


@contextlib.contextmanager
def in_python():
    """Calls go the long way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.PackedLayers, "run_eagerly", lambda *args: None)
        yield


@contextlib.contextmanager
def in_cpp():
    """A call that would go the long way is an error, and so is a backward pass through Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.PackedLayers, "run", must_not_be_called)
        patch.setattr(autograd, "gradients_of_recorded", must_not_be_called)
        yield


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in LAYERS for dtype in (DTYPES[:2] if name.startswith("Recurrent") else DTYPES)],
    ids=str,
)
def test_same_bits(name, dtype, with_state):
    module = LAYERS[name](dtype=dtype)
    given = arguments(name, module, dtype, with_state)
    inputs = [*given, *module.parameters()]

    def outputs_and_grads():
        outputs = call(module, *given)
        upstream = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(dtype) for o in outputs]
        return outputs, torch.autograd.grad(outputs, inputs, upstream)

    with in_python():
        expected = outputs_and_grads()
    with in_cpp():
        found = outputs_and_grads()
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))
        assert [t.requires_grad for t in a] == [t.requires_grad for t in b]


@each_layer
def test_derivatives_of_derivatives(name):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    inputs = (*given, *module.parameters())

    def function(*tensors):
        return tuple(call(module, *tensors[: len(given)]))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@each_layer
def test_batched_gradients(name):
    """`is_grads_batched`, and the Jacobian that torch.autograd.functional makes of it."""
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    y, *_ = call(module, *given)
    upstream = torch.randn(4, *y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, given, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, given, g, retain_graph=True) for g in upstream]
    for a, parts in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(parts), rtol=1e-12, atol=1e-13)


@each_layer
def test_each_gradient_alone(name):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    inputs = [*given, *module.parameters()]
    with in_cpp():
        outputs = call(module, *given)
        together = torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)
        for index, expected in enumerate(together):
            for tensor in inputs:
                tensor.requires_grad_(tensor is inputs[index])
            (found,) = torch.autograd.grad(sum(o.square().sum() for o in call(module, *given)), inputs[index])
            assert torch.equal(found, expected)


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_a_mode_sees_the_backward_pass(name):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    with in_cpp():
        y, *_ = call(module, *given)
    with Counts() as mode:
        found = torch.autograd.grad(y.sum(), given, retain_graph=True)
    assert "layer_backward.default" in mode.names
    assert all(map(torch.equal, found, torch.autograd.grad(y.sum(), given)))


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_errors_are_autograd_s(name):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    y, *_ = call(module, *given)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y, *_ = call(module, *given)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rows", ["lengths", "resets"])
def test_rows_may_not_change_before_the_backward_pass(rows):
    module = LAYERS["LSTM, rows"](dtype=torch.float64)
    given = arguments("LSTM", module)
    with in_cpp():
        y, *_ = call(module, *given)
    module.rows[rows].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_and_hooks_of_what_is_saved(name, use_reentrant):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    expected = torch.autograd.grad(call(module, *given)[0].square().sum(), given)
    y = checkpoint(lambda *tensors: call(module, *tensors)[0], *given, use_reentrant=use_reentrant)
    for tensor in given:
        tensor.grad = None
    y.square().sum().backward()
    assert all(torch.equal(tensor.grad, wanted) for tensor, wanted in zip(given, expected, strict=True))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y, *_ = call(module, *given)
    assert packed
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), given), expected))


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_nothing_is_left(name):
    """Neither of a graph that backward went through, nor of one that was let go."""
    module = LAYERS[name](dtype=torch.float64)
    for goes_back in (True, False):
        x, *states = arguments(name, module)
        y, *others = call(module, x, *states)
        if goes_back:
            y.sum().backward()
        references = [weakref.ref(tensor) for tensor in (x, y, *states, *others)]
        del x, y, states, others
        gc.collect()
        assert all(reference() is None for reference in references)


@pytest.mark.parametrize("name", ["GRU", "LSTM, three layers", "LSTMCell"])
@pytest.mark.parametrize("what", ["inference tensor", "hook"])
def test_nothing_is_left_of_a_call_that_cannot_save(name, what):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    hooks = contextlib.nullcontext()
    if what == "hook":
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: 1 / 0, lambda tensor: tensor)
    else:
        with torch.inference_mode():
            given = [torch.randn(tensor.shape, dtype=torch.float64) for tensor in given]
    weight = next(module.parameters())
    before = weight._use_count()
    for _ in range(3):
        with hooks, pytest.raises((RuntimeError, ZeroDivisionError)):
            call(module, *given)
    gc.collect()
    assert weight._use_count() == before


def test_kept_weights_are_dropped():
    module = fastrnn.GRU(256, 256)
    x = torch.randn(5, 2, 256)
    with torch.no_grad():
        module(x)
    packs = fastrnn.layers.packs_of(module)
    assert packs._kept
    module(x)
    assert not packs._kept


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_profiler_shows_both_passes(name):
    module = LAYERS[name](dtype=torch.float64)
    given = arguments(name, module)
    with torch.profiler.profile(record_shapes=True) as profile:
        call(module, *given)[0].sum().backward()
    shapes = {event.name: event.input_shapes for event in profile.events()}
    assert shapes["fastrnn::layer_forward"][0] == list(given[0].shape)
    assert "fastrnn::layer_backward" in shapes


def test_several_threads():
    """Graphs of their own, through one module."""
    module = fastrnn.LSTMCell(I, H, dtype=torch.float64)
    given = [arguments("LSTMCell", module) for _ in range(4)]
    expected = [torch.autograd.grad(call(module, *each)[0].sum(), each) for each in given]
    found = [None] * len(given)

    def run(index):
        for _ in range(20):
            found[index] = torch.autograd.grad(call(module, *given[index])[0].sum(), given[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))


def test_compiled_autograd():
    module = fastrnn.GRU(I, H, dtype=torch.float64)
    given = arguments("GRU", module)
    y, *_ = call(module, *given)
    expected = torch.autograd.grad(y.square().sum(), given, retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        y.square().sum().backward()
    for tensor, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-12, atol=1e-13)
