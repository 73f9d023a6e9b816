"""`return_states=True`: the states and gates of every step, against a loop over steps in float64."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from own_cells import OWN
from torch.func import jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn import reference, states
from fastrnn.cells import CELLS

T, B, I, H = 5, 3, 4, 6
BUILT_IN = [name for name, cell in CELLS.items() if name == cell.equation.__name__]
sigmoid, tanh = torch.sigmoid, torch.tanh


def of_sum(function):
    return lambda x, u, h, g, v: function(getattr(x, g) + getattr(u, g)(h))


# What stands for a gate where the equation has no variable of its name: by the products of x and h, and the variables.
BY_HAND = {
    **{(f"{kind}{name}", "n"): of_sum(f) for kind in ("rnn_", "leaky_")
       for name, f in (("tanh", tanh), ("relu", torch.relu), ("sigmoid", sigmoid))},
    ("lstm_peephole", "g"): of_sum(tanh),
    ("spiking", "n"): of_sum(lambda products: products),
    ("ctrnn", "n"): of_sum(lambda products: products),
    ("jordan", "n"): of_sum(tanh),
    ("jordan", "y"): lambda x, u, h, g, v: sigmoid(u.y(tanh(x.n + u.n(h)))),
    ("indrnn", "n"): lambda x, u, h, g, v: torch.relu(x.n + v.w * h),
    ("sru", "n"): lambda x, u, h, g, v: x.n,
    ("sru", "p"): lambda x, u, h, g, v: x.p,
    ("qrnn", "z"): lambda x, u, h, g, v: tanh(x.z),
    ("qrnn", "o"): lambda x, u, h, g, v: sigmoid(x.o),
    ("diagonal", "p"): lambda x, u, h, g, v: x.p,
    ("diagonal", "q"): lambda x, u, h, g, v: x.q,
    ("mingru", "n"): lambda x, u, h, g, v: x.n,
    ("minlstm", "i"): lambda x, u, h, g, v: torch.nn.functional.logsigmoid(x.i),
    ("minlstm", "n"): lambda x, u, h, g, v: x.n,
    ("two_states", "d"): of_sum(tanh),
    ("two_stages", "s"): lambda x, u, h, g, v: tanh(x.s + u.s(v.operand)),
    ("two_stages", "t"): lambda x, u, h, g, v: sigmoid(x.t + u.t(v.operand)),
    ("given_much", "n"): of_sum(tanh),
}  # fmt: skip


def step(cell, x, before, w, masks):
    """One step of the reference, and the gates: the equation's variables when it returns."""
    found = {}

    def note(frame, event, _):
        if event == "return" and frame.f_code is cell.equation.__code__:
            found.update(frame.f_locals)

    sys.setprofile(note)
    try:
        after = reference.step(cell, x, before, w, masks)
    finally:
        sys.setprofile(None)
    v, x, u, name = SimpleNamespace(**found), found["x"], found["u"], cell.equation.__name__
    gates = {g: found[g] if g in found else BY_HAND[name, g](x, u, before[0], g, v) for g in cell.gates}
    return after, gates


def by_steps(cell, x, hx, w, lengths, resets, masks, is_reverse):
    """One direction, row by row: a dict of `[T, B, H]`."""
    rows = []
    for b in range(B):
        of_row = [None] * T
        now = [state[b : b + 1] for state in hx]
        times = range(int(lengths[b]))
        for t in reversed(times) if is_reverse else times:
            if resets[t + is_reverse, b] if t + is_reverse < lengths[b] else False:
                now = [torch.zeros_like(state) for state in now]
            now, gates = step(cell, x[t, b : b + 1], tuple(now), w, tuple(mask[t, b : b + 1] for mask in masks))
            of_row[t] = {
                **{f"state {n}": s[0] for n, s in zip(cell.states, now, strict=True)},
                **{f"gate {g}": v[0] for g, v in gates.items()},
            }
        rows.append(of_row)
    names = next(found for row in rows for found in row if found)
    return {
        name: torch.stack(
            [torch.stack([row[t][name] if row[t] else torch.zeros_like(names[name]) for row in rows]) for t in range(T)]
        )
        for name in names
    }


def expected_of(layer, cell, x, hx, lengths, resets, masks):
    """By layer, the states and gates of both directions side by side."""
    found = []
    for k, directions in enumerate(layer._weights()):
        parts = []
        for d, w in enumerate(directions):
            own = [state[2 * k + d] for state in hx]
            of_masks = [mask[2 * k + d] for mask in masks.values()]
            parts.append(by_steps(cell, x, own, w, lengths, resets, of_masks, d))
        together = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
        x = together[f"state {cell.states[0]}"]
        found.append(together)
    return found


def flat(layers):
    return [
        {**{f"state {n}": s for n, s in of.states.items()}, **{f"gate {g}": s for g, s in of.gates.items()}}
        for of in layers
    ]


def loss_of(layers):
    """A fixed random sum of everything."""
    generator = torch.Generator().manual_seed(3)
    by_name = [of[name] for of in layers for name in sorted(of)]
    return sum((t * torch.rand(t.shape, dtype=t.dtype, generator=generator)).sum() for t in by_name)


@pytest.mark.parametrize("cell", [*BUILT_IN, *OWN], ids=lambda cell: getattr(cell, "name", cell))
def test_of_every_cell(cell):
    """Two layers, two directions, lengths, resets, states and gradients of all; the same sums in another order: some
    1e-15 of the largest numbers."""
    layer = fastrnn.Recurrent(cell, I, H, 2, bidirectional=True).double()
    of = layer.cell
    x, lengths = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0, 3])
    resets = torch.rand(T, B) < 0.3
    hx = tuple((torch.rand(4, B, H, dtype=torch.float64) + 0.1).requires_grad_() for _ in of.states)
    masks = {name: torch.rand(4, T, B, H, dtype=torch.float64) for name in of.masks}
    moving = [x, *hx, *layer.parameters()]
    options = {"masks": masks} if masks else {}
    output, state, found = layer(x, hx if of.carried else hx[0], lengths, resets, return_states=True, **options)
    expected = expected_of(layer, of, x, hx, lengths, resets, masks)
    torch.testing.assert_close(flat(found), expected, rtol=1e-11, atol=1e-12)
    assert [list(own.states) for own in found] == [list(of.states)] * 2
    assert [list(own.gates) for own in found] == [list(of.gates)] * 2
    assert torch.equal(found[1].states[of.states[0]], output)
    ours, exact = (torch.autograd.grad(loss_of(f), moving, materialize_grads=True) for f in (flat(found), expected))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    plain = layer(x, hx if of.carried else hx[0], lengths, resets, **options)
    torch.testing.assert_close((output, state), plain, rtol=0, atol=0)


LAYERS = {
    "LSTM": lambda **o: fastrnn.LSTM(I, H, **o),
    "LSTM-projected": lambda **o: fastrnn.LSTM(I, H, proj_size=2, **o),
    "GRU": lambda **o: fastrnn.GRU(I, H, **o),
    "GRU-reset-before": lambda **o: fastrnn.GRU(I, H, reset_after=False, **o),
    "RNN": lambda **o: fastrnn.RNN(I, H, leak=0.3, **o),
    "SLSTM": lambda **o: fastrnn.SLSTM(I, H, **o),
    "no-bias": lambda **o: fastrnn.LSTM(I, H, bias=False, **o),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def test_projection():
    """The hidden vector before the projection, and what becomes of it."""
    layer = fastrnn.LSTM(I, H, proj_size=2).double()
    output, _, (found,) = layer(torch.randn(T, B, I, dtype=torch.float64), return_states=True)
    assert list(found.states) == ["h", "c", "unprojected"]
    hidden = found.gates["o"] * found.states["c"].tanh()
    torch.testing.assert_close(found.states["unprojected"], hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden @ layer.weight_hr_l0.t(), output, rtol=1e-12, atol=1e-12)


@each_layer
def test_layouts(kind):
    """The same numbers, as the output lies."""
    layer = LAYERS[kind](num_layers=2, bidirectional=True).double()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([5, 3, 1])
    expected = layer(x, lengths=lengths, return_states=True)[2]
    layer.batch_first = True
    found = layer(x.transpose(0, 1), lengths=lengths, return_states=True)[2]
    torch.testing.assert_close(tree_map(lambda t: t.transpose(0, 1), found), expected, rtol=0, atol=0)
    row = layer(x[:, 0], return_states=True)[2]
    torch.testing.assert_close(row, tree_map(lambda t: t[:, 0], expected), rtol=1e-12, atol=1e-12)
    packed = layer(pack_padded_sequence(x, lengths), return_states=True)[2]
    leaves = [t for of in packed for part in of for t in part.values()]
    padded = [pad_packed_sequence(t)[0] for t in leaves]
    torch.testing.assert_close(padded, tree_leaves(expected), rtol=0, atol=0)


@each_layer
def test_without_gradients_and_with_recompute(kind):
    layer, x = LAYERS[kind](num_layers=2), torch.randn(T, B, I)
    expected = layer(x, return_states=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, return_states=True), expected)
        assert not any(t.requires_grad for t in tree_leaves(layer(x, return_states=True)))
    layer.recompute = True
    torch.testing.assert_close(layer(x, return_states=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["LSTM-projected", "GRU-reset-before", "RNN"])
def test_compiled_and_exported(kind):
    """Of any T and B, with gradients; float32 within what another order of sums makes of it."""
    torch._dynamo.reset()
    layer = LAYERS[kind](num_layers=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((T, B, I), (T + 2, B + 1, I)):
        x = torch.randn(shape, requires_grad=True)
        ours, exact = compiled(x, return_states=True), layer(x, return_states=True)
        torch.testing.assert_close(ours, exact)
        grads = [torch.autograd.grad(loss_of(flat(found[2])), [x, *layer.parameters()]) for found in (ours, exact)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        shapes = {"input": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}, "return_states": None}
        exported = torch.export.export(layer, (x,), {"return_states": True}, dynamic_shapes=shapes)
        torch.export.save(exported, file := io.BytesIO())
        exported = torch.export.load(file)
        torch.testing.assert_close(exported.module()(x[1:], return_states=True), layer(x[1:], return_states=True))


@each_layer
def test_transforms(kind):
    """vmap and forward mode, float64, against rows one by one and differences of a step of 1e-6."""
    layer = LAYERS[kind]().double().requires_grad_(False)
    x, v = torch.randn(2, T, B, I, dtype=torch.float64)

    def of(x):
        return tree_leaves(layer(x, return_states=True)[2])

    by_row = vmap(lambda row: of(row[:, None]), in_dims=1)(x)
    torch.testing.assert_close([t.squeeze(2).movedim(0, 1) for t in by_row], of(x), rtol=1e-11, atol=1e-12)
    found = jvp(of, (x,), (v,))[1]
    differences = [(b - a) / 2e-6 for a, b in zip(of(x - 1e-6 * v), of(x + 1e-6 * v), strict=True)]
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-8)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: of(x)[-1], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast(dtype):
    """Numbers below 1, rounded: 2^-8 and a few roundings of h before."""
    layer, x = fastrnn.LSTM(I, H, 2), torch.randn(T, B, I)
    expected = layer(x, return_states=True)
    with torch.autocast("cpu", dtype):
        under_autocast = layer(x, return_states=True)
    for found in (under_autocast, layer.to(dtype)(x.to(dtype), return_states=True)):
        assert {t.dtype for t in tree_leaves(found)} == {dtype}
        torch.testing.assert_close(tree_map(torch.Tensor.float, found), expected, rtol=0.03, atol=0.02)


def test_regularized():
    """The gates are those that the steps have used: a step follows from them."""
    lstm = fastrnn.LSTM(I, H, 2, bidirectional=True).double()
    layer = fastrnn.Regularized(lstm, recurrent_dropout=0.4, weight_dropout=0.2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    output, (h_n, c_n), found = layer(x, generator=torch.Generator().manual_seed(1), return_states=True)
    assert torch.equal(found[1].states["h"], output)
    for k, of in enumerate(found):
        i, f, g, o = (of.gates[name] for name in "ifgo")
        h, c = of.states["h"], of.states["c"]
        torch.testing.assert_close(h, o * c.tanh(), rtol=1e-12, atol=1e-12)
        for d, own in enumerate(map(slice, (0, H), (H, 2 * H))):
            order = torch.arange(T) if d == 0 else torch.arange(T).flip(0)
            now, then = order[1:], order[:-1]
            after = f[now][..., own] * c[then][..., own] + i[now][..., own] * g[now][..., own]
            torch.testing.assert_close(c[now][..., own], after, rtol=1e-12, atol=1e-12)
            assert torch.equal(c[order[-1]][..., own], c_n[2 * k + d])
            assert torch.equal(h[order[-1]][..., own], h_n[2 * k + d])
    quiet = layer.eval()(x, return_states=True)
    torch.testing.assert_close(quiet, lstm(x, return_states=True), rtol=0, atol=0)
    zoned = fastrnn.Regularized(fastrnn.GRU(I, H).double(), zoneout=0.5)(x, return_states=True)[2][0]
    _, z, n = zoned.gates.values()
    h = zoned.states["h"]
    moved = (1 - z[1:]) * n[1:] + z[1:] * h[:-1]
    is_kept = h[1:] == h[:-1]
    assert 0 < is_kept.double().mean() < 1
    torch.testing.assert_close(h[1:], torch.where(is_kept, h[:-1], moved), rtol=1e-12, atol=1e-12)


def test_stack_and_learned_state():
    stack = fastrnn.Stack(fastrnn.GRU(I, H), fastrnn.LSTM(H, 3))
    x = torch.randn(T, B, I)
    output, _, (first, second) = stack(x, return_states=True)
    assert list(first[0].gates) == ["r", "z", "n"]
    assert torch.equal(second[0].states["h"], output)
    assert len(stack(x)) == 2
    layer = fastrnn.LearnedState(fastrnn.GRU(I, H))
    assert torch.equal(layer(x, return_states=True)[2][0].states["h"], layer(x)[0])


def test_fx_and_converted():
    model = fastrnn.convert(torch.nn.Sequential(torch.nn.GRU(I, H)))

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model[0]

        def forward(self, x):
            return self.layer(x, return_states=True)

    x = torch.randn(T, B, I)
    torch.testing.assert_close(torch.fx.symbolic_trace(Around())(x), model[0](x, return_states=True))


def test_refused():
    x = torch.randn(T, B, I)
    with pytest.raises(TypeError, match="return_states should be of type bool, got: int"):
        fastrnn.LSTM(I, H)(x, return_states=1)
    with torch.no_grad(), pytest.raises(ValueError, match="return_states, weights='int8': expected one of them"):
        fastrnn.LSTM(I, H, weights="int8")(x, return_states=True)
    for module in (fastrnn.Dilated(fastrnn.GRU(I, H), 2), fastrnn.Stack(torch.nn.GRU(I, H))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'return_states'"):
            module(x, return_states=True)
    assert states.LayerStates._fields == ("states", "gates")


class Gates(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, return_states=True)[2][0].gates


def test_onnx():
    """Gates are products of what the operator puts out; there is none that puts out an LSTM's c of every step."""
    pytest.importorskip("onnxscript")
    x = (torch.randn(T, B, I),)
    model = torch.onnx.export(Gates(fastrnn.GRU(I, H)).eval(), x, dynamo=True, verbose=False).model
    assert [node.op_type for node in model.graph].count("GRU") == 1
    assert len(model.graph.outputs) == 3
    with pytest.raises(Exception, match="return_states=True"):
        torch.onnx.export(Gates(fastrnn.LSTM(I, H)).eval(), x, dynamo=True, verbose=False)
    with pytest.raises(NotImplementedError, match=r"GRU: return_states: expected what torch\.nn's layers"):
        torch.onnx.export(Gates(fastrnn.GRU(I, H)).eval(), x, io.BytesIO(), dynamo=False)


class WithLengths(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fastrnn.LSTM(I, H)

    def forward(self, x, lengths):
        output, _, states = self.layer(x, lengths=lengths, return_states=True)
        return output, states[0].gates["i"]


def test_traces_and_exports_take_other_sizes():
    model = WithLengths().eval()
    example = torch.randn(5, 3, I), torch.tensor([5, 0, 3])
    T_, B_ = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    with torch.no_grad():
        traced = torch.jit.trace(model, example)
        exported = torch.export.export(model, example, dynamic_shapes=({0: T_, 1: B_}, {0: B_})).module()
        x, lengths = torch.randn(9, 2, I), torch.tensor([9, 4])
        expected = model(x, lengths)
        for found in (traced(x, lengths), exported(x, lengths)):
            torch.testing.assert_close(tuple(found), expected)


@pytest.mark.parametrize("kind", ["LSTM", "LayerNormLSTM", "SLSTM", "SRU"])
@pytest.mark.parametrize("is_cast", [False, True])
def test_on_the_meta_device(kind, is_cast):
    """Shapes and dtypes as on the CPU, without and inside of torch.autocast: the meta device has none of its own."""
    layer, x = getattr(fastrnn, kind)(I, H), torch.randn(T, B, I)
    output, state, of_steps = layer(x, return_states=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        found = layer.to("meta")(x.to("meta"), return_states=True)
    for actual, expected in zip(tree_leaves(found), tree_leaves((output, state, of_steps)), strict=True):
        assert (actual.device.type, actual.shape, actual.dtype) == ("meta", expected.shape, expected.dtype)
