"""`fastrnn.Recurrent` and `RecurrentCell`: layers of any cell, with what the built-in layers have."""

import copy
import pickle

import pytest
import torch
from own_cells import given_much, name_of, two_stages, two_states
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import Recurrent, RecurrentCell, reference
from fastrnn.equation import EquationError

I, H, T, B = 5, 6, 7, 3


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def masks_of(layer, *sizes):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    return {name: torch.rand(rows, *sizes, layer.hidden_size) for name in layer.cell.masks}


def by_reference(layer, x, masks=None, states=None):
    """Layer by layer, for x [T, B, I]; masks by layer."""
    for k, directions in enumerate(layer._weights()):
        h0, c0 = states[k] if states else (None, None)
        own = None if masks is None else masks[k]
        x, *final = reference.layer(layer._cell, x, h0, c0, directions, None, None, own)
    return x, final


@pytest.mark.parametrize("cell", [two_states, two_stages, "slstm", "indrnn"], ids=name_of)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_is_the_equation(cell, options):
    layer, x = Recurrent(cell, I, H, **options), noise(T, B, I)
    y, states = layer(x)
    torch.testing.assert_close(y, by_reference(layer, x)[0])
    assert isinstance(states, tuple) == (len(layer.cell.states) > 1)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], y)


def test_layouts_of_input_and_states():
    layer, x = Recurrent(two_states, I, H, 2, bidirectional=True), noise(T, B, I)
    states = noise(4, B, H), noise(4, B, H + 0)
    y, final = layer(x, states)
    first = copy.deepcopy(layer)
    first.batch_first = True
    torch.testing.assert_close(first(x.transpose(0, 1), states)[0].transpose(0, 1), y)
    alone, (h, c) = layer(x[:, 1], tuple(state[:, 1] for state in states))
    torch.testing.assert_close(alone, y[:, 1])
    torch.testing.assert_close(h, final[0][:, 1])
    torch.testing.assert_close(c, final[1][:, 1])


def test_state_continues_a_sequence():
    for cell in (two_states, two_stages, "slstm", "ctrnn"):
        layer, x = Recurrent(cell, I, H, 2), noise(T, B, I)
        y, final = layer(x)
        head, states = layer(x[:3])
        tail, again = layer(x[3:], states)
        torch.testing.assert_close(torch.cat([head, tail]), y)
        torch.testing.assert_close(again, final)


def test_lengths_resets_and_packed_sequences():
    layer, x, lengths = Recurrent(two_states, I, H, bidirectional=True), noise(T, B, I), torch.tensor([7, 2, 5])
    y, states = layer(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, final = layer(packed)
    assert isinstance(output, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(output)[0], y)
    torch.testing.assert_close(final, states)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4] = True
    torch.testing.assert_close(layer(x, resets=resets)[0][4:], layer(x[4:])[0])


def test_masks_of_all_steps_and_of_each():
    layer, x = Recurrent(given_much, I, H, 2, bidirectional=True), noise(T, B, I)
    fixed, moving = masks_of(layer, B), masks_of(layer, T, B)
    mixed = {"keep": fixed["keep"], "drop": moving["drop"]}
    as_given = {"keep": fixed["keep"][:, None].expand(-1, T, -1, -1), "drop": moving["drop"]}
    together = torch.cat([as_given[name] for name in layer.cell.masks], dim=-1).unflatten(0, (2, 2))
    y, _ = layer(x, masks=mixed)
    torch.testing.assert_close(y, by_reference(layer, x, list(together))[0])
    layer.batch_first = True
    other = {"keep": fixed["keep"], "drop": moving["drop"].transpose(1, 2)}
    torch.testing.assert_close(layer(x.transpose(0, 1), masks=other)[0].transpose(0, 1), y)
    alone = {name: mask[..., 1, :] for name, mask in mixed.items()}
    torch.testing.assert_close(layer(x[:, 1], masks=alone)[0], y[:, 1])


def test_bad_masks():
    layer, x = Recurrent(given_much, I, H), noise(T, B, I)
    good = masks_of(layer, B)
    for masks, error, text in (
        (None, TypeError, "masks: expected tensors by the names keep, drop, got NoneType"),
        ({"keep": good["keep"]}, TypeError, r"got \['keep'\]"),
        (good | {"keep": 1.0}, TypeError, "keep: expected a tensor"),
        (good | {"drop": torch.ones(B, H)}, ValueError, r"drop: expected shape \(1, 3, 6\) or \(1, 7, 3, 6\)"),
    ):
        with pytest.raises(error, match=text):
            layer(x, masks=masks)
    with pytest.raises(ValueError, match="masks: cell slstm has none"):
        Recurrent("slstm", I, H)(x, masks=good)
    with pytest.raises(ValueError, match="masks: expected None with a PackedSequence"):
        layer(pack_padded_sequence(x, torch.tensor([7, 5, 2])), masks=good)
    with pytest.raises(NotImplementedError, match=r"stream: cell given_much_.* has masks"):
        layer.stream()


def test_numbers():
    half, fifth = Recurrent(two_stages, I, H), Recurrent(two_stages, I, H, scale=0.2)
    fifth.load_state_dict(half.state_dict())
    x = noise(T, B, I)
    assert not torch.allclose(half(x)[0], fifth(x)[0])
    torch.testing.assert_close(fifth(x)[0], by_reference(fifth, x)[0])
    assert Recurrent(two_stages, I, H, scale=0.5).cell is two_stages
    with pytest.raises(TypeError, match=r"size: cell two_stages_.* has no such number; expected among scale"):
        Recurrent(two_stages, I, H, size=1)


def test_dropout_and_training():
    layer, x = Recurrent(two_states, I, H, 2, dropout=0.5), noise(T, B, I)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_parameters_have_names_and_are_found_again():
    layer = Recurrent(given_much, I, H, 2, bidirectional=True)
    names = dict(layer.named_parameters())
    assert names["p_l1_reverse"].shape == (H,)
    assert names["weight_ih_l1"].shape == (2 * H, 2 * H)
    assert all(p.abs().max() <= H**-0.5 for p in layer.parameters())
    other = Recurrent(given_much, I, H, 2, bidirectional=True)
    other.load_state_dict(layer.state_dict())
    x, masks = noise(T, B, I), masks_of(layer, B)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.cell is layer.cell
        assert torch.equal(twin(x, masks=masks)[0], layer(x, masks=masks)[0])


def test_pickle_keeps_numbers():
    layer = Recurrent(two_stages, I, H, scale=0.25)
    assert pickle.loads(pickle.dumps(layer)).cell == layer.cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", [two_states, "slstm", "mgu", "indrnn", "sru"], ids=name_of)
def test_stream(cell, dtype):
    """The stream is the first to use the kernels."""
    layer, x = Recurrent(cell, I, H, 2, dtype=dtype), noise(T, B, I).to(dtype)
    stream = layer.stream(B, copy=True)
    y = torch.stack([stream(x_t) for x_t in x])
    torch.testing.assert_close(y, layer(x)[0])
    states = layer(x)[1]
    torch.testing.assert_close(stream.state, states)


@pytest.mark.parametrize("cell", [two_states, "slstm"], ids=name_of)
def test_compile_and_export(cell):
    torch._dynamo.reset()
    layer, x = Recurrent(cell, I, H, 2, bidirectional=True), noise(T, B, I)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], layer(x)[0])
    found = [torch.autograd.grad(f(x)[0].square().sum(), list(layer.parameters())) for f in (compiled, layer)]
    assert all(map(torch.equal, *found))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    assert torch.equal(exported.module()(noise(3, B, I))[0], layer(noise(3, B, I))[0])


def test_script_says_what_to_do():
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script compiles Python code.*use torch\.jit\.trace"):
        torch.jit.script(Recurrent("mgu", I, H))
    traced = torch.jit.trace(Recurrent("mgu", I, H).requires_grad_(False), noise(T, B, I))
    assert traced(noise(3, B, I))[0].shape == (3, B, H)


def test_autocast_and_16_bit_weights():
    layer, x = Recurrent(two_states, I, H), noise(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.02, atol=0.02)  # three digits in 7 steps
    half = copy.deepcopy(layer).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16())[0], y)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights(weights):
    layer, x = Recurrent(two_states, I, H, weights=weights), noise(T, B, I)
    exact = Recurrent(two_states, I, H)
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], exact(x)[0], rtol=0.05, atol=0.02)
    with pytest.raises(RuntimeError, match="is for inference"):
        layer(x)


def test_what_is_told_of_it():
    layer = Recurrent(two_stages, I, H, 2, scale=0.25, recompute=True)
    assert repr(layer) == "Recurrent(two_stages, 5, 6, num_layers=2, recompute=True, scale=0.25)"
    assert repr(fastrnn.MGU(I, H, batch_first=True)) == "MGU(mgu, 5, 6, batch_first=True)"
    assert repr(RecurrentCell("mgu", I, H, bias=False)) == "RecurrentCell(mgu, 5, 6, bias=False)"
    assert "layer 1: two_stages_" in fastrnn.explain(layer, noise(T, B, I))
    assert "direction(s), CPU" in fastrnn.explain(RecurrentCell("mgu", I, H), noise(B, I))


@pytest.mark.parametrize("cell", [two_states, given_much, "mgu", "sru"], ids=name_of)
def test_one_step(cell):
    layer, step = Recurrent(cell, I, H), RecurrentCell(cell, I, H)
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, count = noise(1, B, I), len(layer.cell.states)
    states = tuple(noise(B + k, H)[:B] for k in range(count))
    masks = {name: torch.rand(B, H) for name in layer.cell.masks}

    def one(values):
        return values if count > 1 else values[0]

    of_layer = {"masks": {name: mask[None] for name, mask in masks.items()}} if masks else {}
    expected = layer(x, one(tuple(state[None] for state in states)), **of_layer)[1]
    found = step(x[0], one(states), masks or None)
    for a, b in zip(found if count > 1 else [found], expected if count > 1 else [expected], strict=True):
        torch.testing.assert_close(a, b[0])
    alone = step(x[0, 1], one(tuple(s[1] for s in states)), {name: m[1] for name, m in masks.items()} or None)
    for a, b in zip(alone if count > 1 else [alone], found if count > 1 else [found], strict=True):
        torch.testing.assert_close(a, b[1])


BAD_CALLS = {
    "input of 4 dimensions": (lambda layer, x: layer(x[None]), ValueError, "Expected input to be 2D or 3D, got 4D"),
    "other features": (lambda layer, x: layer(x[..., 1:]), RuntimeError, "input.size\\(-1\\) must be equal"),
    "another dtype": (lambda layer, x: layer(x.double()), ValueError, "RNN input dtype"),
    "one state": (lambda layer, x: layer(x, noise(1, B, H)), TypeError, r"expected a tuple \(h_0, c_0\), got Tensor"),
    "three states": (lambda layer, x: layer(x, (x, x, x)), RuntimeError, r"expected 2 tensors \(h_0, c_0\), got 3"),
    "a state's shape": (
        lambda layer, x: layer(x, (noise(1, B, H), noise(1, B, I))),
        RuntimeError,
        r"Expected hidden\[1\] size \(1, 3, 6\)",
    ),
    "a state's dimensions": (
        lambda layer, x: layer(x, (noise(B, H), noise(B, H))),
        RuntimeError,
        "should also be 3-D but got",
    ),
    "lengths": (lambda layer, x: layer(x, lengths=torch.tensor([8, 1, 1])), ValueError, r"lengths: expected values"),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        call(Recurrent(two_states, I, H), noise(T, B, I))


BAD_LAYERS = {
    "no cell": (("tree", I, H), {}, TypeError, "cell: expected what fastrnn.cell made, or one of lstm, gru"),
    "a function": ((torch.tanh, I, H), {}, TypeError, "cell: expected what fastrnn.cell made"),
    "no inputs": (("mgu", 0, H), {}, ValueError, "input_size must be greater than zero, got 0"),
    "half a unit": (("mgu", I, 0.5), {}, TypeError, "hidden_size should be of type int, got: float"),
    "dropout": (("mgu", I, H), {"dropout": 2}, ValueError, "dropout: expected a number between 0 and 1, got 2"),
    "weights": (("mgu", I, H), {"weights": "int4"}, ValueError, "weights: expected None, 'bf16' or 'int8'"),
    "a flag": (("mgu", I, H), {"bidirectional": 1}, TypeError, "bidirectional: expected a bool, got int"),
    "a number": (("mgu", I, H), {"alpha": 1}, TypeError, "alpha: cell mgu has no such number; expected none"),
}


@pytest.mark.parametrize(("sizes", "options", "error", "text"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_bad_layers(sizes, options, error, text):
    with pytest.raises(error, match=text):
        Recurrent(*sizes, **options)


def test_bad_steps():
    step, x = RecurrentCell(two_states, I, H), noise(B, I)
    for call, error, text in (
        (lambda: step(noise(T, B, I)), ValueError, "Expected input to be 1D or 2D, got 3D"),
        (lambda: step(x[:, 1:]), RuntimeError, "inconsistent input_size: got 4 expected 5"),
        (lambda: step(x, (x, x)), RuntimeError, r"h: expected shape \(3, 6\), got \(3, 5\)"),
        (lambda: step(x, None, {"m": x}), TypeError, "masks: expected none, got m"),
        (lambda: step(x.double()), ValueError, "expected input of dtype torch.float32, got torch.float64"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_bad_equation_is_an_error_where_it_is_defined():
    with pytest.raises(EquationError, match=r'a step cannot branch on a value.*"return h if x.n else u.n\(h\)"'):

        @fastrnn.cell(gates="n", states="h")
        def branches(x, u, h):
            return h if x.n else u.n(h)


def test_cells_of_one_name_are_two_cells():
    def make(factor):
        @fastrnn.cell(gates="n", states="h")
        def same(x, u, h):
            return factor * torch.tanh(x.n + u.n(h))

        return same

    once, twice = make(1), make(2)
    x = noise(T, B, I)
    first, second = Recurrent(once, I, H), Recurrent(twice, I, H)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(x[:1])[0], 2 * first(x[:1])[0])
    assert make(1).name == once.name != twice.name


def test_equation_that_changes_after_its_definition():
    """All functions of a loop see the last value of its variable."""
    cells = []
    for factor in (0.25, 0.5):

        @fastrnn.cell(gates="n z", states="h")
        def late(x, u, h):
            return torch.tanh(x.n + u.n(h)) + factor * torch.sigmoid(x.z + u.z(h))  # noqa: B023

        cells.append(late)
    x = noise(T, B, I)
    Recurrent(cells[1], I, H)(x)
    with pytest.raises(RuntimeError, match=r"cell late_.*: the equation is not what it was when it was defined"):
        Recurrent(cells[0], I, H)(x)


def test_names_that_modules_have():
    def make(**names):
        @fastrnn.cell(gates="n", states="h", **names)
        def taken(x, u, h, *, dropout=0.5, **others):
            return x.n

    with pytest.raises(EquationError, match=r"number 'dropout': fastrnn\.Recurrent has another argument of that name"):
        make()

    def named(name):
        namespace = {}
        exec(f"def taken(x, u, h, {name}):\n    return {name} * x.n", namespace)
        return fastrnn.cell(gates="n", states="h", unit_weights=name)(namespace["taken"])

    for name in ("weight_ih", "bias", "training", "forward"):
        with pytest.raises(EquationError, match=f"unit weight '{name}': modules have another attribute of that name"):
            named(name)


def test_pickle_says_at_once_what_it_will_not_find():
    @fastrnn.cell(gates="n", states="h")
    def local(x, u, h):
        return torch.tanh(x.n + u.n(h))

    layer = Recurrent(local, I, H)
    assert copy.deepcopy(layer).cell is local
    with pytest.raises(pickle.PicklingError, match=r"expected it to be .*local of module test_recurrent"):
        pickle.dumps(layer)


def test_readers_of_modules_are_told():
    model = torch.nn.Sequential(Recurrent("mgu", I, H))
    traced = torch.fx.symbolic_trace(model)
    x = noise(T, B, I)
    assert torch.equal(traced(x)[0], model(x)[0])
    with pytest.raises(NotImplementedError, match="expected a dense tensor, got a nested one"):
        model(torch.nested.nested_tensor([noise(3, I), noise(4, I)]))


def test_states_that_are_no_tensors():
    x = noise(T, B, I)
    for layer, hx, text in (
        (Recurrent("mgu", I, H), (noise(1, B, H),), "hx: h: expected a tensor, got tuple"),
        (Recurrent("slstm", I, H), (noise(1, B, H), None, None, None), "hx: c: expected a tensor, got NoneType"),
        (RecurrentCell("mgu", I, H), [noise(B, H)], "hx: h: expected a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=text):
            layer(x if isinstance(layer, Recurrent) else x[0], hx)


def test_masks_have_no_gradients():
    layer = Recurrent(given_much, I, H)
    masks = masks_of(layer, B)
    masks["keep"].requires_grad_()
    with pytest.raises(ValueError, match="masks: keep: expected a tensor that requires no gradient"):
        layer(noise(T, B, I), masks=masks)


def test_trains():
    """A cell of one's own learns to add two marked numbers of a sequence: the loss falls to a tenth."""
    torch.manual_seed(0)
    layer, head = Recurrent(two_states, 2, 24), torch.nn.Linear(24, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 1e-2)
    losses = []
    for _ in range(300):
        values, marks = torch.rand(10, 32), torch.zeros(10, 32)
        marks[2], marks[7] = 1, 1
        y = head(layer(torch.stack([values, marks], dim=-1))[0][-1])[:, 0]
        loss = (y - (values * marks).sum(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_second_derivatives_where_a_state_stays_what_it_was():
    @fastrnn.cell(gates="z n", states="h c")
    def keeps_c(x, u, h, c):
        return x.z + 0.25 * u.n(h) + c, c

    layer, x = Recurrent(keeps_c, 3, 4), torch.randn(2, 2, 3, requires_grad=True)
    y, (h_n, c_n) = layer(x)
    loss = (y**2).sum() + h_n.sum() + c_n.sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, x)[0])
    assert first.requires_grad
