"""The cells that torch.nn does not have, built in and of one's own: kernels against the equations, these against the
papers."""

import numpy as np
import pytest
import torch
from cases import ROWS, make_case, ops, reference
from own_cells import OWN
from test_gradients import make_stack

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.equation import record

BUILT_IN = [name for name, cell in CELLS.items() if not cell.has_all_kernels and name == cell.equation.__name__]
NAMES = BUILT_IN + [cell.name for cell in OWN]
EACH = pytest.mark.parametrize("name", NAMES, ids=lambda name: CELLS[name].equation.__name__)

# Units: less than a vector, more than one, several panels; rows: one, a team's, shared among threads.
SIZES = {"small": (7, 3, 5, 9), "one row": (4, 1, 3, 70), "many rows": (9, 37, 20, 33)}


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        largest = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * largest)


@EACH
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_kernels_compute_the_equation(name, size, rows, D):
    """In float32; sums of up to 70 products of numbers below 1 round by some 1e-6."""
    case = make_case(name, *size, D=D, **rows)
    expected = case.to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    for found, exact in zip(case.to(torch.float32, True).outputs_and_grads(ops.layer), expected, strict=True):
        assert_close(found, exact, 1e-5)


@EACH
def test_no_steps(name):
    case = make_case(name, 0, 3, 5, 9, D=2)
    for found, exact in zip(case.to(torch.float32).run(ops.layer), case.run(reference.layer), strict=True):
        assert_close([found], [exact], 1e-6)


@EACH
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize(("rows", "D"), [("plain", 2), ("lengths+resets", 1), ("lengths+resets", 2)])
def test_gradcheck(name, rows, D, L):
    function, inputs = make_stack(name, None, D, L, ROWS[rows])
    assert torch.autograd.gradcheck(function, inputs, fast_mode=L == 2)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["slstm", "mgu", OWN[2].name], ids=lambda name: CELLS[name].equation.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_types_err_no_more_than_the_equation_in_that_type(name, dtype):
    """Our largest error against float64 is at most twice that of torch's operations, whose every value is rounded."""
    case = make_case(name, 6, 5, 9, 20, lengths=True, dtype=dtype)
    exact = case.to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    ours, theirs = (case.to(dtype, True).outputs_and_grads(layer) for layer in (ops.layer, reference.layer))
    for found, plain, truth in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], [*exact[0], *exact[1]], strict=True):
        error, other = (found.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 2 * other + torch.finfo(dtype).eps * truth.abs().max()


@EACH
def test_recompute_leaves_the_same_bits(name):
    case = make_case(name, 6, 5, 9, 20, D=2, lengths=True, resets=True).to(torch.float32, True)
    kept = case.outputs_and_grads(ops.layer)
    again = case.outputs_and_grads(lambda *arguments: ops.layer(*arguments, recompute=True))
    for a, b in zip([*kept[0], *kept[1]], [*again[0], *again[1]], strict=True):
        assert torch.equal(a, b)


@EACH
def test_packed_weights_and_those_read_in_place(name):
    """A call that records no gradient takes other ways: kept packs, or for few rows the weights where they lie."""
    for T, B, H in ((3, 1, 9), (1, 3, 20), (40, 3, 130)):
        case = make_case(name, T, B, 7, H).to(torch.float32)
        for found, expected in zip(case.run(ops.layer), case.to(torch.float64).run(reference.layer), strict=True):
            assert_close([found], [expected], 1e-5)
        packs = ops.PackedLayers()
        for _ in range(2):
            found = case.run(lambda *arguments, packs=packs: packs.run(0, *arguments))
            assert all(map(torch.equal, found, case.run(ops.layer)))


@EACH
def test_meta_tensors_have_the_shapes_of_real_ones(name):
    case = make_case(name, 3, 2, 5, 4, D=2)
    arguments = *case.op_inputs(), None, None, case.masks, name, True
    real = torch.ops.fastrnn.layer_forward(*arguments)
    to_meta = lambda value: [t.to("meta") for t in value] if isinstance(value, list) else value  # noqa: E731
    fake = torch.ops.fastrnn.layer_forward(*(a.to("meta") if torch.is_tensor(a) else to_meta(a) for a in arguments))
    assert [t.shape for t in real] == [t.shape for t in fake]


def test_opcheck_with_unit_weights_and_masks():
    case = make_case(OWN[2].name, 3, 2, 5, 4, D=2, dtype=torch.float32)
    arguments = *case.op_inputs(), None, None, case.masks, OWN[2].name, True
    torch.library.opcheck(torch.ops.fastrnn.layer_forward, arguments)
    y, _, c_n, saved, saved_c = torch.ops.fastrnn.layer_forward(*arguments)
    grads = torch.ones_like(y), None, torch.ones_like(c_n)
    wanted = [True] * (3 + len(case.op_inputs()[3]))
    others = *case.op_inputs(), None, None, case.masks, y, saved, saved_c, OWN[2].name, wanted
    torch.library.opcheck(torch.ops.fastrnn.layer_backward, (*grads, *others))


# ---- against the papers, in NumPy: what a layer of the class computes from its own weights


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slstm(x, u, p, h, c, n, m):
    """Beck et al. 2024, equations 8 to 17 with those of the stabilizer, 15 to 17."""
    i, f, z, o = (a + b for a, b in zip(x, u(h), strict=True))
    log_f = -np.log1p(np.exp(-f))
    m_t = np.maximum(log_f + m, i)
    i, f = np.exp(i - m_t), np.exp(log_f + m - m_t)
    c, n = f * c + i * np.tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, m_t


def mgu(x, u, p, h):
    f = sigmoid(x[0] + u(h)[0])
    return ((1 - f) * h + f * np.tanh(x[1] + u(f * h)[1]),)


def light_gru(x, u, p, h):
    z, n = (a + b for a, b in zip(x, u(h), strict=True))
    return (sigmoid(z) * h + (1 - sigmoid(z)) * np.maximum(n, 0),)


def ctrnn(x, u, p, h, v):
    v = v + p["leak"] * (-v + x[0] + u(np.tanh(v))[0])
    return np.tanh(v), v


def jordan(x, u, p, y):
    return (sigmoid(u(np.tanh(x[0] + u(y)[0]))[1]),)


def indrnn(x, u, p, h):
    return (np.maximum(x[0] + p["w"] * h, 0),)


def sru(x, u, p, h, c):
    f, r = sigmoid(x[1] + p["v_f"] * c), sigmoid(x[2] + p["v_r"] * c)
    c = f * c + (1 - f) * x[0]
    return r * c + (1 - r) * x[3], c


def qrnn(x, u, p, h, c):
    z, f, o = np.tanh(x[0]), sigmoid(x[1]), sigmoid(x[2])
    c = f * c + (1 - f) * z
    return o * c, c


def mingru(x, u, p, h):
    z = sigmoid(x[0])
    return ((1 - z) * h + z * x[1],)


def minlstm(x, u, p, h):
    f, i = sigmoid(x[0]), sigmoid(x[1])
    return (f / (f + i) * h + i / (f + i) * x[2],)


PAPERS = {
    "SLSTM": slstm,
    "MGU": mgu,
    "LightGRU": light_gru,
    "CTRNN": ctrnn,
    "JordanRNN": jordan,
    "IndRNN": indrnn,
    "SRU": sru,
    "QRNN": qrnn,
    "MinGRU": mingru,
    "MinLSTM": minlstm,
}


def test_every_class_has_its_paper():
    assert sorted(PAPERS) == sorted(fastrnn.papers.__all__)


@pytest.mark.parametrize("name", PAPERS)
def test_layer_computes_what_the_paper_says(name):
    """Ten steps in float64, from a state of zeros: a few roundings each."""
    torch.manual_seed(0)
    I, H = 5, 6
    layer = getattr(fastrnn, name)(I, H, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    p = {key.removesuffix("_l0"): value.detach().numpy() for key, value in layer.named_parameters()}
    x = torch.randn(10, 4, I, dtype=torch.float64)
    y, final = layer(x)
    states = [np.zeros((4, H)) for _ in layer.cell.states]

    def split(product):
        return np.split(product, product.shape[-1] // H, axis=-1)

    def recurrent(operand):
        return split(operand @ p["weight_hh"].T + p["bias_hh"])

    for t in range(10):
        inputs = split(x[t].numpy() @ p["weight_ih"].T + p["bias_ih"])
        states = PAPERS[name](inputs, recurrent, p, *states)
        np.testing.assert_allclose(y[t].detach().numpy(), states[0], rtol=1e-12, atol=1e-13)
    final = final if isinstance(final, tuple) else (final,)
    for found, expected in zip(final, states, strict=True):
        np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", BUILT_IN)
def test_saves_no_more_than_its_gates_and_products(name):
    made = record(CELLS[name])
    sizes = fastrnn.ops.codegen.description(CELLS[name])
    assert sizes["saved"] <= len(made.inputs) + len(made.products)


def test_stabilizer_keeps_large_gates_finite():
    """Gates of exp(1000) and exp(-1000), forward and backward."""
    layer = fastrnn.SLSTM(1, 4)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
    x = torch.tensor([1000.0, -1000.0, 88.5, -88.5, 0.0, 1000.0]).view(6, 1, 1).requires_grad_()
    y, states = layer(x)
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, *states, x.grad, *(p.grad for p in layer.parameters())))
