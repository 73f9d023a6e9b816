"""The cells that torch.nn does not have, built in and of one's own: kernels against the equations, these against the
papers."""

import re

import numpy as np
import pytest
import torch
from cases import ROWS, make_case, ops, packing, reference
from own_cells import OWN
from test_gradients import make_stack

import fastrnn
from fastrnn import codegen
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


@pytest.mark.parametrize("name", [name for name in NAMES if not ops.SIZES[name]["is_normalized"]])
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
            found = case.run(packing(packs))
            assert all(map(torch.equal, found, case.run(ops.layer)))


@EACH
def test_meta_tensors_have_the_shapes_of_real_ones(name):
    case = make_case(name, 3, 2, 5, 4, D=2)
    arguments = *case.op_inputs(), None, None, case.masks, name, True
    assert ops.prepare(name, torch.float64)
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
    others = *case.op_inputs(), None, None, case.masks, OWN[2].name, y, saved, saved_c, wanted
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
    elsewhere = {"LayerNormGRU", "LayerNormLSTM"}  # test_layer_norm.py
    assert {*PAPERS} | elsewhere == {*fastrnn.papers.__all__}


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
    sizes = codegen.description(CELLS[name])
    more = name == "minlstm"  # the share of a gate in the sum of two, beside both
    more += sizes["gains"]  # products before they are normalized
    assert sizes["saved"] <= len(made.inputs) + len(made.products) + more


def test_leak_stays_what_it_is():
    trained = fastrnn.RNN(5, 6, leak=torch.nn.Parameter(torch.full((6,), 0.25)))
    trained.reset_parameters()
    assert (trained.leak_l0 == 0.25).all()
    assert fastrnn.RNN(5, 6, leak=0.1, dtype=torch.float64).leak_l0[0].item() == 0.1
    with pytest.raises(AttributeError, match="leak"):
        trained.leak = 0.5
    with pytest.raises(ValueError, match="leak: expected a finite number, got nan"):
        fastrnn.CTRNN(5, 6, leak=float("nan"))


@pytest.mark.parametrize("bias", [-60.0, -90.0, -120.0, -1e4])
def test_gates_that_never_open(bias):
    """What has been remembered is 0 / 0: the output is 0, and gradients are numbers."""
    layer, x = fastrnn.SLSTM(5, 6), torch.randn(6, 3, 5, requires_grad=True)
    with torch.no_grad():
        layer.bias_ih_l0[:6] = bias
    y, _ = layer(x)
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in layer.parameters())))


def test_stabilizer_keeps_large_gates_finite():
    """Gates of exp(1000) and exp(-1000), forward and backward."""
    layer = fastrnn.SLSTM(1, 4)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
    x = torch.tensor([1000.0, -1000.0, 88.5, -88.5, 0.0, 1000.0]).view(6, 1, 1).requires_grad_()
    y, states = layer(x)
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, *states, x.grad, *(p.grad for p in layer.parameters())))


# sigmoid(b) / (sigmoid(b) + sigmoid(b - 1)) is 0.5 / 0.76894 for b = 0, and e / (e + 1) for b so small that
# sigmoid(b) = exp(b), which is 0 in float32.
@pytest.mark.parametrize(("bias", "expected"), [(0.0, 0.6502446), (-100.0, 0.7310586), (-1e4, 0.7310586)])
def test_closed_gates_of_minlstm_keep_their_ratio(bias, expected):
    layer, x = fastrnn.MinLSTM(1, 4), torch.ones(1, 1, 1, requires_grad=True)
    with torch.no_grad():
        layer.weight_ih_l0.zero_(), layer.bias_ih_l0.zero_()
        layer.bias_ih_l0[:4], layer.bias_ih_l0[4:8] = bias, bias - 1
    y, h_n = layer(x, torch.ones(1, 1, 4))
    torch.testing.assert_close(h_n, torch.full((1, 1, 4), expected), rtol=1e-5, atol=0)
    y.sum().backward()
    assert all(t.isfinite().all() for t in (x.grad, *(p.grad for p in layer.parameters())))


# ---- options of the built-in layers


@pytest.mark.parametrize("D", [1, 2])
def test_peepholes_as_onnx_has_them(D):
    """Against ONNX's reference evaluator, in float32 as the standard has no more: ten steps."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    I, H, T, B = 5, 6, 10, 3
    lstm = fastrnn.LSTM(I, H, bidirectional=D == 2, peephole=True)
    x, h0, c0 = torch.randn(T, B, I), torch.randn(D, B, H), torch.randn(D, B, H)
    suffixes = ["_l0", "_l0_reverse"][:D]

    def of_onnx(name, order):  # the order of its gates is i o f c
        parts = [getattr(lstm, name + suffix).detach().view(len(order), H, -1) for suffix in suffixes]
        blocks = torch.stack([part[order].flatten(0, 1) for part in parts])
        return (blocks if "weight" in name else blocks[..., 0]).numpy()

    gates = [0, 3, 1, 2]
    bias = np.concatenate([of_onnx("bias_ih", gates), of_onnx("bias_hh", gates)], axis=1)
    given = {"X": x.numpy(), "W": of_onnx("weight_ih", gates), "R": of_onnx("weight_hh", gates), "B": bias}
    given |= {"h0": h0.numpy(), "c0": c0.numpy(), "P": of_onnx("peephole", [0, 2, 1])}
    names = ["X", "W", "R", "B", "", "h0", "c0", "P"]
    direction = "bidirectional" if D == 2 else "forward"
    node = onnx.helper.make_node("LSTM", names, ["Y", "Yh", "Yc"], hidden_size=H, direction=direction)
    types = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in given]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("Y", "Yh", "Yc")]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "peepholes", types, outputs))
    expected, h_n, c_n = ReferenceEvaluator(model).run(None, given)
    y, states = lstm(x, (h0, c0))
    expected = torch.from_numpy(expected).permute(0, 2, 1, 3).flatten(2)  # [T, D, B, H]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states, (torch.from_numpy(h_n), torch.from_numpy(c_n)), rtol=1e-5, atol=1e-6)


def test_peephole_is_an_option_like_others():
    torch.manual_seed(0)
    lstm = fastrnn.LSTM(5, 6, 2, bidirectional=True, proj_size=3, peephole=True)
    assert lstm.peephole_l1_reverse.shape == (3, 6)
    assert lstm.peephole_l0.abs().max() <= 6**-0.5
    assert "peephole=True" in repr(lstm)
    plain = fastrnn.LSTM(5, 6, 2, bidirectional=True, proj_size=3)
    plain.load_state_dict({k: v for k, v in lstm.state_dict().items() if "peephole" not in k})
    x = torch.randn(7, 3, 5)
    assert not torch.allclose(lstm(x)[0], plain(x)[0])
    with torch.no_grad():
        for suffix in lstm._suffixes():
            getattr(lstm, f"peephole{suffix}").zero_()
    torch.testing.assert_close(lstm(x)[0], plain(x)[0])
    lstm(x)[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())
    with torch.no_grad():
        torch.testing.assert_close(lstm(x)[0], plain(x)[0])
    assert type(fastrnn.revert(lstm)) is fastrnn.LSTM
    with pytest.raises(TypeError, match="peephole should be of type bool"):
        fastrnn.LSTM(5, 6, peephole=1)
    with pytest.raises(AttributeError, match="peephole"):
        plain.peephole = True


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"weights": "bf16"}, torch.float32), ({"weights": "int8"}, torch.float32), ({}, torch.bfloat16)],
)
def test_first_call_of_all_is_one_of_inference(options, dtype):
    """Which takes the shortest way; it has to compile its kernels nevertheless."""
    torch.manual_seed(0)
    lstm = fastrnn.LSTM(5, 6, peephole=True, **options)
    exact = fastrnn.LSTM(5, 6, peephole=True)
    exact.load_state_dict(lstm.state_dict())
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        found = lstm.to(dtype)(x.to(dtype))[0]
        torch.testing.assert_close(found.float(), exact(x)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("leak", [0.25, torch.linspace(0, 1, 6), torch.nn.Parameter(torch.linspace(0, 1, 6))])
def test_leak(leak, nonlinearity):
    """A leak of 1 is no leak; others mix the old state in."""
    torch.manual_seed(0)
    rnn = fastrnn.RNN(5, 6, 1, nonlinearity, leak=leak)
    is_trained = isinstance(leak, torch.nn.Parameter)
    assert ("leak_l0" in dict(rnn.named_parameters())) == is_trained
    assert ("leak_l0" in dict(rnn.named_buffers())) != is_trained
    x, h = torch.randn(4, 3, 5), torch.zeros(3, 6)
    y, _ = rnn(x)
    for t in range(4):
        new = x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
        h = (1 - rnn.leak_l0) * h + rnn.leak_l0 * getattr(torch, nonlinearity)(new)
        torch.testing.assert_close(y[t], h)
    y.sum().backward()
    assert (rnn.leak_l0.grad is not None) == is_trained
    assert "leak=" in repr(rnn)
    assert type(fastrnn.revert(rnn)) is fastrnn.RNN
    with torch.no_grad():
        assert torch.equal(rnn(x)[0], y)


@pytest.mark.parametrize(
    ("leak", "error", "text"),
    [
        ("half", TypeError, "leak: expected a number, a tensor or a Parameter, got str"),
        (torch.ones(5), ValueError, r"leak: expected shape \(6,\), got \(5,\)"),
        (float("nan"), ValueError, "leak: expected finite numbers, got nan"),
        (torch.ones(6, requires_grad=True), ValueError, "leak: expected a Parameter where it is to be trained"),
    ],
)
def test_bad_leak(leak, error, text):
    with pytest.raises(error, match=text):
        fastrnn.RNN(5, 6, leak=leak)


def test_logistic_elman_network():
    """torch.nn has no such option: nothing that reads the module as torch.nn's takes it for a tanh."""
    rnn, cell = fastrnn.RNN(5, 6, 2, "sigmoid", bidirectional=True), fastrnn.RNNCell(5, 6, nonlinearity="sigmoid")
    x, h = torch.randn(4, 3, 5), torch.randn(3, 6)
    y = x
    for layer in range(2):
        outputs = []
        for suffix in (f"_l{layer}", f"_l{layer}_reverse"):
            w_ih, w_hh, b_ih, b_hh = (getattr(rnn, name + suffix) for name in WEIGHTS)
            order, state, found = (range(4) if "reverse" not in suffix else range(3, -1, -1)), torch.zeros(3, 6), {}
            for t in order:
                found[t] = state = torch.sigmoid(y[t] @ w_ih.T + b_ih + state @ w_hh.T + b_hh)
            outputs.append(torch.stack([found[t] for t in range(4)]))
        y = torch.cat(outputs, dim=-1)
    torch.testing.assert_close(rnn(x)[0], y)
    w_ih, w_hh, b_ih, b_hh = (getattr(cell, name) for name in WEIGHTS)
    torch.testing.assert_close(cell(x[0], h), torch.sigmoid(x[0] @ w_ih.T + b_ih + h @ w_hh.T + b_hh))
    for module in (rnn, cell):
        assert "sigmoid" in repr(module)
        assert type(fastrnn.revert(module)) is type(module)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        fastrnn.RNN(5, 6, nonlinearity="gelu")


WEIGHTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
NOT_TORCH_S = {
    "peephole=True": lambda: fastrnn.LSTM(5, 6, peephole=True),
    "leak=0.5": lambda: fastrnn.RNN(5, 6, leak=0.5),
    "nonlinearity='sigmoid'": lambda: fastrnn.RNN(5, 6, nonlinearity="sigmoid"),
}


@pytest.mark.parametrize(("option", "make"), NOT_TORCH_S.items(), ids=NOT_TORCH_S)
def test_options_that_torch_lacks_are_no_surprise_to_onnx(option, make):
    with pytest.raises(Exception, match=re.escape(option)):
        torch.onnx.export(make(), (torch.randn(3, 2, 5),), "/dev/null", dynamo=False)
