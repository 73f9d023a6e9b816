"""weights="bf16": float32 modules whose products read rounded weights; test_packs.py has how those are kept."""

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case, packing

import fastrnn
from fastrnn import ops, reference

MODULES = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN}


def rounded(case):
    """The same call with every weight matrix rounded, in float64: what the kernels should compute."""
    x, h0, c0, *flat = case.to(torch.float64).tensors
    matrix = (0, 1, 4)  # w_ih, w_hh, w_hr; biases stay as they are
    flat = [t if t is None or i % 6 not in matrix else t.bfloat16().double() for i, t in enumerate(flat)]
    return case.run(reference.layer, [x, h0, c0, *flat])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", [(5, 3, 4, 6), (3, 17, 33, 37), (9, 1, 20, 40), (1, 1, 7, 300)], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_matches_reference_with_rounded_weights(cell, P, size, D, rows):
    """Only the weights are rounded: the rest is float32, as close to float64 as without the option."""
    case = make_case(cell, *size, P=P, D=D, **ROWS[rows], dtype=torch.float32)
    outputs = case.run(packing(ops.PackedLayers(), "bf16"))
    for actual, expected in zip(outputs, rounded(case), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", MODULES)
def test_error_is_that_of_the_weights(name):
    """Half an ulp of bfloat16 is 2^-9; sums of many such errors partly cancel. It must be there, and small."""
    torch.manual_seed(0)
    module = MODULES[name](64, 64, 2, weights="bf16")
    exact = MODULES[name](64, 64, 2)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(30, 4, 64)
    with torch.no_grad():
        error = (module(x)[0] - exact(x)[0]).abs().max()
    assert 1e-5 < error < 2e-2
    assert "weights='bf16'" in repr(module)


def test_meta_and_fake_tensors():
    module = fastrnn.GRU(8, 24, weights="bf16", device="meta")
    with torch.no_grad():
        assert module(torch.randn(5, 2, 8, device="meta"))[0].shape == (5, 2, 24)
        with torch._subclasses.FakeTensorMode():
            assert fastrnn.GRU(8, 24, weights="bf16")(torch.randn(5, 2, 8))[0].shape == (5, 2, 24)


@pytest.mark.parametrize("name", MODULES)
def test_stream_and_inference_mode(name):
    module = MODULES[name](8, 24, weights="bf16")
    x = torch.randn(5, 1, 8)
    with torch.inference_mode():
        y, _ = module(x)
    stream = module.stream()
    assert torch.equal(torch.stack([stream(frame).clone() for frame in x]), y)


def test_compiles():
    module = fastrnn.LSTM(8, 24, weights="bf16")
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x)[0], module(x)[0])


def test_other_dtypes_are_as_without_the_option():
    for dtype in (torch.float64, torch.bfloat16):
        module, plain = (fastrnn.GRU(8, 24, dtype=dtype, weights=weights) for weights in ("bf16", None))
        plain.load_state_dict(module.state_dict())
        x = torch.randn(5, 2, 8, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(module(x)[0], plain(x)[0])


def test_training_is_an_error():
    with pytest.raises(RuntimeError, match="weights='bf16' is for inference"):
        fastrnn.LSTM(8, 24, weights="bf16")(torch.randn(5, 2, 8))
