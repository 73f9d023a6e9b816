"""Layer normalization: against the papers' equations in NumPy, and where statistics of a row could go wrong."""

import copy

import numpy as np
import pytest
import torch
from cases import make_case, ops, reference
from torch.func import functional_call, grad, hessian, vmap

import fastrnn
from fastrnn import autograd
from fastrnn.cells import CELLS, normalized, sigmoid, tanh
from fastrnn.read import How, Read
from fastrnn.schema import flatten

NAMES = [name for name, cell in CELLS.items() if cell.normalized and name == cell.equation.__name__]
LAYERS = {
    "lstm": fastrnn.LayerNormLSTM,
    "lstm-carried": lambda *args, **options: fastrnn.LayerNormLSTM(*args, carries_normalized=True, **options),
    "gru": fastrnn.LayerNormGRU,
    "gru-joint": lambda *args, **options: fastrnn.LayerNormGRU(*args, joint=True, **options),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@fastrnn.cell(gates="a b d", states="h c", normalized="a d; b")
def groups_of_some(x, u, h, c):
    """A gate without a recurrent product, one without an input's, and the largest of two states."""
    a, d = sigmoid(x.a), tanh(x.d + u.d(h))
    c = a * c + (1 - a) * d
    return tanh(c) * sigmoid(u.b(h)), c


@fastrnn.cell(gates="a", states="h c", unit_weights="p", masks="m")
def value_alone(x, u, h, c, p, m):
    """No product is normalized, but a value that is neither a state nor saved for another reason."""
    c = m * c + tanh(x.a + u.a(h))
    return p * normalized(c * c + h) + c, c


@fastrnn.cell(gates="n", states="h", unit_weights="leak beta", normalized="n")
def leaks(x, u, h, leak, beta):
    """A unit weight of the name that an RNN's has, and another one, beside gains."""
    return leak * h + beta * tanh(x.n + u.n(h))


@fastrnn.cell(gates="z n", states="h", normalized="z n")
def without_products(x, u, h):
    """No recurrent product at all."""
    z = sigmoid(x.z)
    return (1 - z) * h + z * x.n


OWN = [groups_of_some.name, value_alone.name, leaks.name, without_products.name]


# ---- the papers


def np_sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(values, gain, bias):
    mean, variance = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
    return (values - mean) / np.sqrt(variance + 1e-5) * gain + bias


def products(p, kind, operand, groups):
    """LN(W operand), as many values as there are gates; `groups` are slices of the gates' numbers."""
    H = p["gain_hh"].size // (4 if "gain_c" in p else 3)
    raw = operand @ p[f"weight_{kind}"].T
    bias = p.get(f"bias_{kind}", np.zeros(raw.shape[-1]))
    parts = [slice(group.start * H, group.stop * H) for group in groups]
    together = np.concatenate([layer_norm(raw[:, s], p[f"gain_{kind}"][s], bias[s]) for s in parts], axis=-1)
    return np.split(together, together.shape[-1] // H, axis=-1)


def lstm(p, x, h, c, carried=False):
    of_x, of_h = (products(p, kind, v, [slice(0, 4)]) for kind, v in (("ih", x), ("hh", h)))
    i, f, g, o = (a + b for a, b in zip(of_x, of_h, strict=True))
    c = np_sigmoid(f) * c + np_sigmoid(i) * np.tanh(g)
    out = layer_norm(c, p["gain_c"], p["bias_c"])
    return np_sigmoid(o) * np.tanh(out), out if carried else c


def gru(p, x, h, groups=(slice(0, 2), slice(2, 3))):
    of_x, of_h = (products(p, kind, v, groups) for kind, v in (("ih", x), ("hh", h)))
    r, z = np_sigmoid(of_x[0] + of_h[0]), np_sigmoid(of_x[1] + of_h[1])
    n = np.tanh(of_x[2] + r * of_h[2])
    return ((1 - z) * n + z * h,)


EQUATIONS = {
    "lstm": lstm,
    "lstm-carried": lambda *args: lstm(*args, carried=True),
    "gru": gru,
    "gru-joint": lambda *args: gru(*args, groups=[slice(0, 3)]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_what_the_paper_says(name, bias):
    """Ten steps in float64: a few roundings each."""
    torch.manual_seed(0)
    I, H, B = 5, 6, 4
    layer = LAYERS[name](I, H, bias=bias, dtype=torch.float64)
    assert all((p == 1).all() for key, p in layer.named_parameters() if key.startswith("gain"))
    assert all((p == 0).all() for key, p in layer.named_parameters() if key.startswith("bias"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    p = {key.removesuffix("_l0"): value.detach().numpy() for key, value in layer.named_parameters()}
    x = torch.randn(10, B, I, dtype=torch.float64)
    y, final = layer(x)
    states = [np.zeros((B, H)) for _ in layer.cell.states]
    for t in range(10):
        states = EQUATIONS[name](p, x[t].numpy(), *states)
        np.testing.assert_allclose(y[t].detach().numpy(), states[0], rtol=1e-11, atol=1e-12)
    for found, expected in zip(final if isinstance(final, tuple) else (final,), states, strict=True):
        np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def test_normalized_is_torch_s_layer_norm():
    values = 3 + torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(normalized(values), torch.nn.functional.layer_norm(values, (7,)), rtol=1e-12, atol=1e-12)


# ---- kernels


@pytest.mark.parametrize("name", OWN, ids=lambda name: CELLS[name].equation.__name__)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", [(7, 3, 5, 9), (4, 1, 3, 130), (5, 37, 20, 33)], ids=str)
def test_cells_of_ones_own(name, D, size):
    """Of a few hundred numbers, in float64: some 1e-13."""
    case = make_case(name, *size, D=D, lengths=True, resets=True).to(torch.float64, True)
    expected = case.outputs_and_grads(reference.layer)
    for found, exact in zip(case.outputs_and_grads(ops.layer), expected, strict=True):
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, *OWN], ids=lambda name: CELLS[name].equation.__name__)
@pytest.mark.parametrize("size", [(6, 1, 300, 500), (6, 37, 20, 65)], ids=["team", "rows"])
def test_the_same_bits_on_any_number_of_threads(name, size):
    case = make_case(name, *size).to(torch.float32, True)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outputs, grads = case.outputs_and_grads(ops.layer)
            with torch.no_grad():
                found.append([*outputs, *grads, *case.run(ops.layer)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in NAMES), ("layer_norm_lstm_carried", torch.float16)],
    ids=str,
)
def test_16_bit_types(name, dtype):
    """Not further from the truth than twice what the equation is in that type's own arithmetic."""
    case = make_case(name, 9, 5, 20, 33)
    exact = case.to(torch.float64, True).outputs_and_grads(reference.layer)
    ours = case.to(dtype, True).outputs_and_grads(ops.layer)
    theirs = case.to(dtype, True).outputs_and_grads(reference.layer)
    for found, other, truth in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], [*exact[0], *exact[1]], strict=True):
        error, bound = ((t.double() - truth).norm() for t in (found, other))
        assert error <= 2 * bound + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_mean_far_from_zero(name):
    """Products of about 1000 that differ by about 1: the error is that of the products, which torch's layer_norm of
    the same float32 products has too. Not further from the truth than twice torch's."""
    case = make_case(name, 5, 6, 8, 40, states=False)
    case.tensors[3] += 200  # w_ih: each row of products is 200 * sum(x) and a little
    exact = case.to(torch.float64, True).outputs_and_grads(reference.layer)
    ours = case.to(torch.float32, True).outputs_and_grads(ops.layer)
    theirs = case.to(torch.float32, True).outputs_and_grads(reference.layer)
    for found, other, truth in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], [*exact[0], *exact[1]], strict=True):
        error, bound = ((t.double() - truth).norm() for t in (found, other))
        assert error <= 2 * bound + 1e-6 * truth.norm()


@each_layer
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
def test_rows_that_are_all_the_same_or_huge(make, scale):
    """A variance of 0, or one whose root is beyond all others: numbers, and their gradients too."""
    layer = make(3, 7)
    x = (torch.ones(4, 2, 3) * scale).requires_grad_()
    y = layer(x)[0]
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    one_unit = make(3, 1)
    assert one_unit(torch.randn(4, 2, 3))[0].isfinite().all()


# ---- uses


@each_layer
def test_a_stream_is_the_layer(make):
    layer, x = make(5, 70, num_layers=2), torch.randn(9, 3, 5)
    step = layer.stream(batch=3, copy=True)
    torch.testing.assert_close(torch.stack([step(row) for row in x]), layer(x)[0], rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights(make, weights):
    """Outputs are below 1; a weight that is rounded by a 127th of the largest moves them by less than a tenth."""
    torch.manual_seed(1)
    layer, x = make(20, 70), torch.randn(9, 3, 20)
    rounded = make(20, 70, weights=weights)
    rounded.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rounded(x)[0], layer(x)[0], rtol=0, atol=0.1)


@each_layer
def test_states_of_every_step_without_gradients(make):
    layer, x = make(4, 5), torch.randn(6, 3, 4)
    expected = layer(x, return_states=True)[2]
    with torch.no_grad():
        found = layer(x, return_states=True)[2]
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, return_states=True)[2], expected)


def test_starting_values_of_a_cell_by_its_name():
    for module in (fastrnn.Recurrent("layer_norm_lstm", 4, 5), fastrnn.RecurrentCell("layer_norm_lstm", 4, 5)):
        named = dict(module.named_parameters())
        assert all((p == 1).all() for name, p in named.items() if name.startswith("gain_"))
        assert all((p == 0).all() for name, p in named.items() if name.startswith("bias_"))


@each_layer
def test_recompute(make):
    """The same bits, with less kept; for torch.func, second derivatives and the states of every step, too."""
    torch.manual_seed(0)
    layers = [
        make(4, 5, num_layers=2, bidirectional=True, dtype=torch.float64, recompute=flag) for flag in (False, True)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([6, 0, 4]), torch.rand(6, 3) < 0.3

    def uses(layer):
        inputs = [x, *layer.parameters()]
        y, _ = layer(x, lengths=lengths, resets=resets)
        yield torch.autograd.grad(y.square().sum(), inputs)
        y, _, states = layer(x, return_states=True)
        yield torch.autograd.grad(
            y.square().sum() + sum(s.square().sum() for s in states[0].states.values()), inputs, allow_unused=True
        )
        (of_x,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        yield torch.autograd.grad(of_x.square().sum(), inputs)
        yield vmap(grad(lambda row: layer(row[:, None])[0].square().sum()), in_dims=1)(x.detach())
        yield hessian(lambda x: layer(x)[0].square().sum())(x[:2, :1].detach())

    for a, b in zip(*map(uses, layers), strict=True):
        assert all((p is None and q is None) or torch.equal(p, q) for p, q in zip(a, b, strict=True))


@each_layer
@pytest.mark.parametrize("asks_for_states", [False, True])
def test_recompute_keeps_y_alone(make, asks_for_states):
    """And the states of every step, if they are asked for."""
    T, B, H = 50, 3, 16
    layer, x, sizes = make(8, H), torch.randn(T, B, 8), []
    read = Read(None, None, x, None, None, None, None, flatten([layer._weights_of("_l0")]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        autograd.call(How(layer._cell, 1, recompute=True), read, states=asks_for_states)
    states = asks_for_states and len(layer.cell.states) > 1
    assert [size for size in sizes if size >= T * B * H] == (1 + states) * [T * B * H]


@each_layer
def test_per_sample_gradients(make):
    layer, x = make(4, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, row):
        return functional_call(layer, parameters, (row,))[0].square().sum()

    found = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(3):
        one = grad(loss)(parameters, x[:, b])
        for name, expected in one.items():
            torch.testing.assert_close(found[name][b], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", [groups_of_some.name, leaks.name, without_products.name], ids=lambda name: name.split(".")[-1]
)
def test_gradients_by_row_of_cells_of_ones_own(name):
    layer = fastrnn.Recurrent(name, 4, 5, dtype=torch.float64)
    x, grad_y = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 5, dtype=torch.float64)
    found = fastrnn.per_sample_gradients(layer, x, grad_y)
    norms = fastrnn.per_sample_norms(layer, x, grad_y)
    parameters = dict(layer.named_parameters())
    assert found.keys() == norms.keys() == parameters.keys()
    for b in range(3):
        own = torch.autograd.grad(layer(x[:, b : b + 1])[0], list(parameters.values()), grad_y[:, b : b + 1])
        for parameter, expected in zip(parameters, own, strict=True):
            torch.testing.assert_close(found[parameter][b], expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(norms[parameter][b], expected.norm(), rtol=1e-10, atol=1e-12)


@each_layer
def test_gradients_by_row_with_a_mean_far_from_zero(make):
    """As above, of the rows' sums: not further from the truth than twice what a backward pass is."""
    layer, x, grad_y = make(8, 40), torch.randn(5, 6, 8), torch.randn(5, 6, 40)
    with torch.no_grad():
        layer.weight_ih_l0 += 200
    exact = copy.deepcopy(layer).double()
    truth = torch.autograd.grad(exact(x.double())[0], list(exact.parameters()), grad_y.double())
    ours = torch.autograd.grad(layer(x)[0], list(layer.parameters()), grad_y)
    found = fastrnn.per_sample_gradients(layer, x, grad_y)
    for (name, _), of_all, of_truth in zip(layer.named_parameters(), ours, truth, strict=True):
        error, bound = ((t.double() - of_truth).norm() for t in (found[name].double().sum(0), of_all))
        assert error <= 2 * bound + 1e-5 * of_truth.norm(), name


@pytest.mark.parametrize("make", [LAYERS["lstm"], LAYERS["gru-joint"]], ids=["lstm", "gru-joint"])
def test_compiled_training(make):
    layer, x = make(4, 5), torch.randn(6, 3, 4)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x)[0])
    found = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"zoneout": 0.3}, {"recurrent_dropout": 0.3}, {"weight_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("make", [LAYERS["lstm-carried"], LAYERS["gru"]], ids=["lstm-carried", "gru"])
def test_noise_keeps_the_normalization(make, options):
    """In eval mode, weight and recurrent dropout are off: the layer itself. In training gradients agree with a call
    by the reference, whose noise is the same."""
    layer, x = make(4, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    noisy = fastrnn.Regularized(layer, **options)
    if "zoneout" not in options:
        torch.testing.assert_close(noisy.eval()(x)[0], layer(x)[0])
    y = noisy.train()(x, generator=torch.Generator().manual_seed(0))[0]
    assert (y - layer(x)[0]).abs().max() > 1e-3
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# ---- bad input


@each_layer
def test_what_does_not_go_together(make):
    with pytest.raises(TypeError, match="proj_size"):
        make(4, 5, proj_size=3)


def test_options_that_are_no_bools():
    with pytest.raises(TypeError, match="carries_normalized: expected a bool, got str"):
        fastrnn.LayerNormLSTM(4, 5, carries_normalized="yes")
    with pytest.raises(TypeError, match="joint: expected a bool, got int"):
        fastrnn.LayerNormGRU(4, 5, joint=1)


@pytest.mark.parametrize("name", [*NAMES, *OWN], ids=lambda name: CELLS[name].equation.__name__)
def test_there_are_no_kernels_for_gpus(name):
    """So the reference computes them there, and none is compiled by nvcc that would leave the normalization out."""
    assert not ops.prepare(name, torch.float32, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_ops_refuse_what_kernels_lack(name):
    case = make_case(name, 3, 2, 4, 5).to(torch.float32, True)
    own = *case.op_inputs(), None, None, None, name
    with pytest.raises(NotImplementedError, match=f"recompute: expected false with cell {name}, which has layer norm"):
        torch.ops.fastrnn.layer_forward(*own, True, True)
    y, _, _, saved, saved_c = torch.ops.fastrnn.layer_forward(*own, True)
    arguments = torch.ones_like(y), None, None, *own, y, saved, saved_c, [False] * (3 + len(own[3]))
    steps = torch.ops.fastrnn.layer_backward(*arguments, None, True)[-1]
    with pytest.raises(NotImplementedError, match=f"grad_values: expected none with cell {name}, which has layer norm"):
        torch.ops.fastrnn.layer_backward(*arguments, None, False, steps)


BAD = {
    "a gate is missing": ("a", "a b", r"normalized: expected groups of all the gates, each once, got \(\('a',\),\)"),
    "a gate twice": ("a b; a", "a b", "normalized: expected groups of all the gates, each once"),
    "no such gate": ("a b e", "a b", "normalized: expected groups of all the gates, each once"),
}


@pytest.mark.parametrize(("groups", "gates", "text"), BAD.values(), ids=BAD)
def test_bad_groups(groups, gates, text):
    def equation(x, u, h):
        return tanh(x.a + u.a(h)) * sigmoid(x.b + u.b(h))

    with pytest.raises(TypeError, match=text):
        fastrnn.cell(gates=gates, states="h", normalized=groups)(equation)


def test_bad_equations():
    def second_product(x, u, h):
        return tanh(x.a + u.a(h) + u.b(h * h))

    def two_values(x, u, h):
        return normalized(x.a + u.a(h)) + normalized(x.b * u.b(h))

    def of_a_number(x, u, h):
        return normalized(3.0) * x.a * x.b * u.a(h)

    def of_itself(x, u, h):
        return normalized(normalized(x.a + u.a(h)) * x.b)

    for equation, options, text in (
        (second_product, {"normalized": "a b"}, "u.b: with normalization, expected all products to be of h"),
        (of_a_number, {}, "normalized: expected a value of the step, got 3.0"),
        (two_values, {}, "two values are normalized; a step has at most one"),
        (of_itself, {}, "two values are normalized; a step has at most one"),
    ):
        with pytest.raises(TypeError, match=text):
            fastrnn.cell(gates="a b", states="h", **options)(equation)
