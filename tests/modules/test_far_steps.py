"""`fastrnn.Skip` and `fastrnn.Dilated` against a loop over steps that keeps the outputs and states of all of them."""

import copy
import pickle

import pytest
import torch

import fastrnn

T, B, I, H = 11, 4, 3, 5
ROWS = {
    "plain": (False, False),
    "lengths": (True, False),
    "resets": (False, True),
    "lengths+resets": (True, True),
}
each_row = pytest.mark.parametrize(("with_lengths", "with_resets"), ROWS.values(), ids=ROWS)
each_layer = pytest.mark.parametrize("kind", [fastrnn.GRU, fastrnn.SLSTM])


def rows_of(with_lengths, with_resets):
    lengths = torch.tensor([T, 4, 0, 7]) if with_lengths else None
    resets = torch.rand(T, B) < 0.2 if with_resets else None
    return lengths, resets


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def step(layer, x, state):
    """One step of one row: x [I], the states [H] each or None."""
    hx = None if state is None else tuple(s[None, None] for s in state)
    y, after = layer(x[None, None], hx if hx is None or len(hx) > 1 else hx[0])
    return y[0, 0], tuple(s[0, 0] for s in as_tuple(after))


def zero(state):
    return None if state is None else tuple(torch.zeros_like(s) for s in state)


def skip_by_steps(layer, d, x, lengths, resets):
    outputs = torch.zeros(T, B, H, dtype=x.dtype)
    for b in range(B):
        begin, state, past = 0, None, {}
        for t in range(T if lengths is None else int(lengths[b])):
            if resets is not None and resets[t, b]:
                begin, state = t, zero(state)
            before = past[t - d] if t - d >= begin else torch.zeros(H, dtype=x.dtype)
            past[t], state = step(layer, torch.cat([x[t, b], before]), state)
            outputs[t, b] = past[t]
    return outputs


def dilated_by_steps(layer, d, x, lengths, resets):
    outputs = torch.zeros(T, B, H, dtype=x.dtype)
    for b in range(B):
        begin, states = 0, {}
        for t in range(T if lengths is None else int(lengths[b])):
            if resets is not None and resets[t, b]:
                begin = t
            outputs[t, b], states[t] = step(layer, x[t, b], states[t - d] if t - d >= begin else None)
    return outputs


@each_row
@each_layer
@pytest.mark.parametrize("d", [1, 4, 20])
def test_skip(kind, d, with_lengths, with_resets):
    layer = kind(I + H, H, dtype=torch.float64)
    lengths, resets = rows_of(with_lengths, with_resets)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found, _ = fastrnn.Skip(layer, d)(x, lengths=lengths, resets=resets)
    with torch.no_grad():
        torch.testing.assert_close(found, skip_by_steps(layer, d, x, lengths, resets), rtol=1e-11, atol=1e-12)


@each_row
@each_layer
@pytest.mark.parametrize("d", [1, 4, 20])
def test_dilated(kind, d, with_lengths, with_resets):
    layer = kind(I, H, dtype=torch.float64)
    lengths, resets = rows_of(with_lengths, with_resets)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found, _ = fastrnn.Dilated(layer, d)(x, lengths=lengths, resets=resets)
    with torch.no_grad():
        torch.testing.assert_close(found, dilated_by_steps(layer, d, x, lengths, resets), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
@pytest.mark.parametrize("layer", [fastrnn.GRU, fastrnn.LSTM])
@pytest.mark.parametrize("cut", [0, 3, 7])
@pytest.mark.parametrize("with_resets", [False, True])
def test_state_continues_a_sequence(kind, layer, cut, with_resets):
    """Cut anywhere, also within a chunk and for each row at another step."""
    inputs = I + H if kind is fastrnn.Skip else I
    module = kind(layer(inputs, H, dtype=torch.float64), 3)
    x = torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.2 if with_resets else None
    whole, final = module(x, resets=resets)
    cuts = torch.tensor([cut, 1, 2, 5])
    first, state = module(x, lengths=cuts, resets=resets)
    rest = torch.stack([x[:, b].roll(-int(c), 0) for b, c in enumerate(cuts)], dim=1)
    marks = None
    if with_resets:
        marks = torch.stack([resets[:, b].roll(-int(c), 0) for b, c in enumerate(cuts)], dim=1)
    second, end = module(rest, state, lengths=T - cuts, resets=marks)
    for b, c in enumerate(cuts.tolist()):
        torch.testing.assert_close(torch.cat([first[:c, b], second[: T - c, b]]), whole[:, b], rtol=1e-11, atol=1e-12)
    flat = torch.utils._pytree.tree_leaves
    for a, e in zip(flat(end), flat(final), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


LAYERS = {
    "GRU": fastrnn.GRU,
    "LSTM": lambda I, H: fastrnn.LSTM(I, H, num_layers=2),
    "LSTM, projection": lambda I, H: fastrnn.LSTM(I, 2 * H, proj_size=H),
    "SLSTM": fastrnn.SLSTM,
    "LMU": lambda I, H: fastrnn.LMU(I, H, order=3, theta=6.0),
    "DiagonalSSM": fastrnn.DiagonalSSM,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("d", [1, 3, 20])
@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_stream(kind, d, make):
    """Step by step from the state after some steps, with rows that begin again, is the whole sequence at once."""
    module = kind(make(I + H if kind is fastrnn.Skip else I, H), d).double()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(T, B) < 0.2
    resets[6] = True
    expected, final = module(x, resets=resets)
    _, state = module(x[:4], resets=resets[:4])
    with torch.inference_mode():
        step = module.stream(B)
    flat = torch.utils._pytree.tree_leaves
    for own, given in zip(flat(step.state), flat(state), strict=True):
        own.copy_(given.detach())
    for t in range(4, T):
        step.reset(None if resets[t].all() else resets[t])
        torch.testing.assert_close(step(x[t]), expected[t].detach(), rtol=1e-11, atol=1e-12)
    for own, given in zip(flat(step.state), flat(final), strict=True):
        torch.testing.assert_close(own, given.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stream_of_other_dtypes_and_in_a_stack(kind, dtype):
    below = kind(fastrnn.GRU(I + H if kind is fastrnn.Skip else I, H), 3)
    stack = fastrnn.Stack(below, fastrnn.GRU(H, H), residual=True).to(dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    with torch.no_grad():
        expected, _ = stack(x)
    step = stack.stream(B, copy=True)
    tolerance = 4 * torch.finfo(dtype).eps  # states are rounded after every step in both
    torch.testing.assert_close(torch.stack([step(now) for now in x]), expected, rtol=tolerance, atol=tolerance)
    for streams in (step, below.to(dtype).stream()):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="Stream: cannot be copied or pickled"):
                copied(streams)


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_stream_of_rounded_weights(kind):
    module = kind(fastrnn.GRU(I + H if kind is fastrnn.Skip else I, H, weights="int8"), 3)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        expected, _ = module(x)
    step = module.stream(B, copy=True)
    torch.testing.assert_close(torch.stack([step(now) for now in x]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_memory_of_a_stream_is_that_of_the_layer_s_and_of_the_steps_before(kind):
    layer, d = fastrnn.LSTM(I + H if kind is fastrnn.Skip else I, H), 100
    own = layer.stream(B).nbytes
    features = H if kind is fastrnn.Skip else 2 * H  # outputs, or h and c
    kept = 2 * d * B * features * 4
    found = kind(layer, d).stream(B).nbytes - own
    assert kept <= found < 1.05 * kept
    assert fastrnn.Stack(kind(layer, d), fastrnn.LSTM(H, H)).stream(B).nbytes > own + found


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_stream_of_bad_input_stays_as_it_was(kind):
    module = kind(fastrnn.GRU(I + H if kind is fastrnn.Skip else I, H), 2)
    x, step = torch.randn(T, B, I), module.stream(B, copy=True)
    with torch.no_grad():
        expected, _ = module(x)
    found = []
    for now in x:
        with pytest.raises(ValueError, match=rf"x: expected shape \({B}, {I}\), got \({B}, {I + 1}\)"):
            step(torch.randn(B, I + 1))
        with pytest.raises(TypeError, match=r"x: expected dtype torch\.float32, got torch\.float64"):
            step(now.double())
        found.append(step(now))
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=rf"rows: expected shape \({B},\), got \(1,\)"):
        step.reset(torch.tensor([True]))


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_gradients(kind):
    inputs = 2 + 3 if kind is fastrnn.Skip else 2
    module = kind(fastrnn.GRU(inputs, 3, dtype=torch.float64), 2, batch_first=True)
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([5, 3]), torch.rand(2, 5) < 0.3
    assert torch.autograd.gradcheck(lambda x, *_: module(x, None, lengths, resets)[0], (x, *module.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x, None, lengths, resets)[0], (x, *module.parameters()))


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_bad_arguments(kind):
    name = kind.__name__
    with pytest.raises(TypeError, match="layer: expected a recurrent layer of fastrnn, got Linear"):
        kind(torch.nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="steps: expected an integer of at least 1, got 0"):
        kind(fastrnn.GRU(9, 4), 0)
    with pytest.raises(ValueError, match=f"batch_first, which is {name}'s own option"):
        kind(fastrnn.GRU(9, 4, batch_first=True), 2)
    with pytest.raises(ValueError, match="expected one direction, got two"):
        kind(fastrnn.GRU(9, 4, bidirectional=True), 2)
    module = kind(fastrnn.GRU(9, 4), 2)
    x = torch.randn(3, 2, module.layer.input_size - (4 if kind is fastrnn.Skip else 0))
    with pytest.raises(ValueError, match=f"{name}: Expected input to be a tensor of 3D, got 2D instead"):
        module(x[0])
    with pytest.raises(TypeError, match="layer: expected a recurrent layer of fastrnn, got LSTMCell"):
        kind(fastrnn.LSTMCell(3, 4), 2)
    with pytest.raises(RuntimeError, match=r"must be equal to input_size. Expected \d, got 2"):
        module(x[:, :, :2])
    with pytest.raises(TypeError, match="batch_first: expected a bool"):
        kind(fastrnn.GRU(9, 4), 2, "no")
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 3\], got 4"):
        module(x, lengths=torch.tensor([1, 4]))
    with pytest.raises(TypeError, match="resets: expected a tensor of dtype"):
        module(x, resets=torch.zeros(3, 2))


def test_skip_needs_room_for_what_it_reads():
    with pytest.raises(ValueError, match="expected an input_size above 4, the size of its output"):
        fastrnn.Skip(fastrnn.GRU(4, 4), 2)
    module = fastrnn.Skip(fastrnn.GRU(9, 4), 2)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 3, 4\), got \[2, 2, 4\]"):
        module(torch.randn(3, 3, 5), (None, torch.zeros(2, 2, 4)))
    with pytest.raises(TypeError, match="hx: expected the layer's state and its outputs"):
        module(torch.randn(3, 3, 5), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("kind", [fastrnn.Skip, fastrnn.Dilated])
def test_autocast_and_no_rows(kind):
    module = kind(fastrnn.GRU(3 + (4 if kind is fastrnn.Skip else 0), 4), 2)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x)[0], rtol=0.05, atol=0.05)
    assert module(x[:, :0])[0].shape == (5, 0, 4)
