"""weights="bf16": float32 modules whose products read the weights rounded to bfloat16, kept packed between calls."""

import copy
import pickle

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case

import fastrnn
from fastrnn import ops, reference
from fastrnn.reference import Weights

MODULES = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN}


def rounded(case):
    """The same call with every weight matrix rounded, in float64: what the kernels should compute."""
    x, h0, c0, *flat = case.to(torch.float64).tensors
    matrix = (0, 1, 4)  # w_ih, w_hh, w_hr; biases stay as they are
    flat = [t if t is None or i % 5 not in matrix else t.bfloat16().double() for i, t in enumerate(flat)]
    return case.run(reference.layer, [x, h0, c0, *flat])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", [(5, 3, 4, 6), (3, 17, 33, 37), (9, 1, 20, 40), (1, 1, 7, 300)], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_matches_reference_with_rounded_weights(cell, P, size, D, rows):
    """Only the weights are rounded: the rest is float32, as close to float64 as without the option."""
    case = make_case(cell, *size, P=P, D=D, **ROWS[rows], dtype=torch.float32)
    packed = ops.PackedLayers()
    outputs = case.run(lambda *args: packed.run(0, *args))
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


def changes():
    def through_data(p):
        p.data.mul_(0.5)

    def in_place(p):
        with torch.no_grad():
            p[0, 0] += 1

    def through_numpy(p):
        p.detach().numpy()[:] *= 0.5

    def by_optimizer(p):
        p.grad = torch.ones_like(p)
        torch.optim.SGD([p], lr=0.1).step()

    return [through_data, in_place, through_numpy, by_optimizer]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_sees_changed_weights(name, change):
    module = MODULES[name](8, 24, weights="bf16")
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        before = module(x)[0]
    change(module.weight_hh_l0)
    fresh = MODULES[name](8, 24, weights="bf16")
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        after = module(x)[0]
        assert torch.equal(after, fresh(x)[0])
    assert not torch.equal(after, before)


def test_sees_load_state_dict_and_replaced_parameters():
    module, other = (fastrnn.LSTM(8, 24, weights="bf16") for _ in range(2))
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        module(x)
        module.load_state_dict(other.state_dict())
        assert torch.equal(module(x)[0], other(x)[0])
        other.weight_hh_l0 = torch.nn.Parameter(torch.zeros_like(other.weight_hh_l0))
        module.weight_hh_l0.zero_()
        assert torch.equal(module(x)[0], other(x)[0])


def test_sees_changed_strided_computed_and_inference_weights():
    x = torch.randn(5, 2, 8)

    def check(module, change):
        with torch.no_grad():
            for step in range(8):
                change(step)
                fresh = fastrnn.GRU(8, 24)
                for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                    value = getattr(module, name)
                    getattr(fresh, name).copy_(value.bfloat16() if "weight" in name else value)
                torch.testing.assert_close(module(x)[0], fresh(x)[0], rtol=0, atol=1e-6)

    strided = fastrnn.GRU(8, 24, weights="bf16")
    strided.weight_hh_l0 = torch.nn.Parameter(torch.randn(24, 72).t() / 5)
    check(strided, lambda step: strided.weight_hh_l0.data.mul_(0.9))
    computed = torch.nn.utils.parametrizations.weight_norm(fastrnn.GRU(8, 24, weights="bf16"), "weight_hh_l0")
    original = computed.parametrizations.weight_hh_l0.original1
    check(computed, lambda step: original[7, 3 + step].add_(1))
    with torch.inference_mode():
        inference = fastrnn.GRU(8, 24, weights="bf16")
        check(inference, lambda step: inference.weight_hh_l0[7, 3].add_(1))


def test_meta_and_fake_tensors():
    module = fastrnn.GRU(8, 24, weights="bf16", device="meta")
    with torch.no_grad():
        assert module(torch.randn(5, 2, 8, device="meta"))[0].shape == (5, 2, 24)
        with torch._subclasses.FakeTensorMode():
            assert fastrnn.GRU(8, 24, weights="bf16")(torch.randn(5, 2, 8))[0].shape == (5, 2, 24)


def test_copies_keep_no_packed_weights():
    module = fastrnn.GRU(8, 24, weights="bf16")
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        y = module(x)[0]
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        module.weight_hh_l0.zero_()
        assert all(torch.equal(other(x)[0], y) for other in copies)


def test_keeps_what_it_packed():
    """A second call does not pack again: the kept memory is the same."""
    module = fastrnn.LSTM(8, 24, 2, weights="bf16")
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        module(x)
        kept = {index: packed.data_ptr() for index, (_, packed, _) in module._packed_layers._kept.items()}
        module(x)
    assert kept == {index: packed.data_ptr() for index, (_, packed, _) in module._packed_layers._kept.items()}
    assert len(kept) == 2


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


def test_bad_option():
    with pytest.raises(ValueError, match="weights: expected None or 'bf16', got 'int8'"):
        fastrnn.LSTM(8, 24, weights="int8")


def test_raw_ops_check_their_arguments():
    weights = Weights(torch.randn(96, 8), torch.randn(96, 24), None, None)
    lists = [[weights.w_ih], [weights.w_hh], [], [], []]
    packed = torch.ops.fastrnn.pack_weights(*lists, "lstm")
    x = torch.randn(5, 2, 8)

    def call(x=x, packed=packed, H=24, P=24, D=1):
        return torch.ops.fastrnn.packed_forward(x, None, None, packed, None, None, "lstm", H, P, D, False)

    call()
    with pytest.raises(ValueError, match="packed: expected shape"):
        call(packed=packed[:-64])
    with pytest.raises(ValueError, match="packed: expected shape"):
        call(H=25, P=25)
    with pytest.raises(ValueError, match="packed: expected shape"):
        call(D=2)
    with pytest.raises(ValueError, match="H, P, D: expected positive sizes"):
        call(D=3)
    with pytest.raises(TypeError, match="x: expected dtype Float"):
        call(x=x.double())
    with pytest.raises(ValueError, match="packed: expected memory aligned"):
        call(packed=torch.cat([packed, packed])[4 : 4 + len(packed)])
    with pytest.raises(TypeError, match="w_ih: expected dtype Float"):
        torch.ops.fastrnn.pack_weights([weights.w_ih.double()], *lists[1:], "lstm")


@pytest.mark.parametrize("D", [1, 2])
def test_opcheck(D):
    case = make_case("gru_reset_before", 5, 3, 4, 6, D=D, dtype=torch.float32)
    x, h0, c0, *flat = case.tensors
    lists = ops._lists(flat)
    torch.library.opcheck(torch.ops.fastrnn.pack_weights, (*lists, case.cell))
    packed = torch.ops.fastrnn.pack_weights(*lists, case.cell)
    arguments = (x, h0, c0, packed, case.lengths, case.resets, case.cell, 6, 6, D, False)
    torch.library.opcheck(torch.ops.fastrnn.packed_forward, arguments)
