"""torch's switches that allow products of bfloat16 in float32 layers. On a CPU without the instruction these tests
prove that the switches are read and change no bit; the products are tested where there is AVX512_BF16 alone (and
there on every instruction set that has them, in test_isa.py)."""

import pytest
import torch
from cases import VARIANT_IDS, VARIANTS, make_case
from torch.backends import mkldnn

import fastrnn
from fastrnn import ops, reference

HAS_INSTRUCTION = fastrnn._C.build_info()["bfloat16_products"]
MODULES = ["LSTM", "GRU", "RNN"]


@pytest.fixture(autouse=True)
def switches():
    """As they were, after each test."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = mkldnn.fp32_precision = "none"
    mkldnn.rnn.fp32_precision = mkldnn.matmul.fp32_precision = "none"


def allow(value="bf16"):
    mkldnn.rnn.fp32_precision = value


def is_allowed():
    layer, x = fastrnn.GRU(8, 16), torch.randn(9, 4, 8)
    return "bfloat16" in fastrnn.explain(layer, x)


def set_all(value):
    torch.backends.fp32_precision = value


def set_backend(value):
    mkldnn.fp32_precision = value


def test_off_by_default():
    assert not is_allowed()


@pytest.mark.parametrize("switch", [allow, set_backend, set_all])
def test_every_level_of_the_switch(switch):
    switch("bf16")
    assert is_allowed()
    switch("ieee")
    assert not is_allowed()


def test_medium_precision_of_products():
    torch.set_float32_matmul_precision("medium")
    assert is_allowed()
    allow("ieee")
    assert not is_allowed(), "a switch of the recurrent layers' own counts more"
    allow("none")
    torch.set_float32_matmul_precision("high")
    assert not is_allowed()


def test_switch_of_products_alone_is_not_one_of_layers():
    mkldnn.matmul.fp32_precision = "bf16"
    assert not is_allowed()


def test_explain_says_what_happens():
    allow()
    text = fastrnn.explain(fastrnn.LSTM(8, 16), torch.randn(9, 4, 8))
    expected = (
        "products of numbers rounded to bfloat16" if HAS_INSTRUCTION else "exact products: only avx512bf16 and amx"
    )
    assert expected in text
    few = fastrnn.explain(fastrnn.LSTM(8, 16), torch.randn(1, 4, 8))
    assert "bfloat16" not in few, "where weights are read in place, it would save nothing"


def rounded(tensor):
    return tensor.bfloat16().to(tensor.dtype)


def rounded_linear(x, w, b=None):
    return torch.nn.functional.linear(rounded(x), rounded(w), b)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_forward_is_that_of_rounded_operands(monkeypatch, cell, P, D):
    """Without the instruction the switch changes no bit. With it, the reference with rounded operands is as close as
    the operands that round the other way, half an ulp of bfloat16 of a number below 1, allow."""
    case = make_case(cell, 7, 5, 20, 40, P=P, D=D, lengths=True, resets=True, dtype=torch.float32)
    exact = case.run(ops.layer)
    allow()
    outputs = case.run(ops.layer)
    if not HAS_INSTRUCTION:
        assert all(map(torch.equal, outputs, exact))
        return
    monkeypatch.setattr(reference, "linear", rounded_linear)
    for actual, expected, other in zip(outputs, case.run(reference.layer), exact, strict=True):
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, other)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_error_against_that_of_bfloat16_modules(name, recompute):
    """Of outputs and gradients, relative to float64: at most that of torch's own module in bfloat16, which rounds what
    it keeps and sums, too."""
    torch.manual_seed(0)
    exact = getattr(torch.nn, name)(48, 64).double()
    x, upstream = torch.randn(20, 8, 48), torch.randn(20, 8, 64)

    def results(module, dtype):
        given = x.to(dtype).requires_grad_()
        y, _ = module(given)
        grads = torch.autograd.grad(y, [given, *module.parameters()], upstream.to(dtype))
        return [t.detach().double() for t in (y, *grads)]

    ours = getattr(fastrnn, name)(48, 64, recompute=recompute)
    ours.load_state_dict(exact.state_dict())
    theirs = getattr(torch.nn, name)(48, 64)
    theirs.load_state_dict(exact.state_dict())
    expected, half = results(exact, torch.float64), results(theirs.bfloat16(), torch.bfloat16)
    without = results(ours, torch.float32)
    allow()
    found = results(ours, torch.float32)
    for value, before, true, other in zip(found, without, expected, half, strict=True):
        error, limit = (value - true).norm(), (other - true).norm()
        assert error <= limit
        assert torch.equal(value, before) == (not HAS_INSTRUCTION)


@pytest.mark.parametrize("name", MODULES)
def test_threads_streams_and_packs_agree(name):
    torch.manual_seed(0)
    layer = getattr(fastrnn, name)(70, 300)
    x = torch.randn(9, 3, 70)
    threads = torch.get_num_threads()
    allow()
    with torch.no_grad():
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [layer(x)[0], layer(x)[0]]  # the second one from kept packs
        stream = layer.stream(3)
        results.append(torch.stack([stream(frame).clone() for frame in x]))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", MODULES)
def test_switching_between_calls(name):
    """Kept packs are of one way to multiply; a backward pass may go another way than its forward pass."""
    torch.manual_seed(0)
    layer, x = getattr(fastrnn, name)(70, 300), torch.randn(5, 2, 70)
    with torch.no_grad():
        before = layer(x)[0]
        allow()
        layer(x)
        allow("none")
        assert torch.equal(layer(x)[0], before)
    y, _ = layer(x)
    allow()
    y.sum().backward()
    found = layer.weight_hh_l0.grad.clone()
    allow("none")
    layer.zero_grad()
    layer(x)[0].sum().backward()
    torch.testing.assert_close(found, layer.weight_hh_l0.grad, rtol=0, atol=0.02 * found.abs().max().item())


def test_other_dtypes_do_not_change():
    for dtype in (torch.float64, torch.float16):
        layer, x = fastrnn.GRU(8, 24, dtype=dtype), torch.randn(5, 2, 8, dtype=dtype)
        before = layer(x)[0]
        allow()
        assert torch.equal(layer(x)[0], before)
        allow("none")
