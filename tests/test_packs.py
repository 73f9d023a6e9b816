"""Packed weights that modules keep between inference calls: always those of the module, however it was changed."""

import copy
import pickle

import pytest
import torch
from cases import make_case

import fastrnn
from fastrnn import ops, reference
from fastrnn.reference import Weights

MODULES = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN}
SIZES = (8, 256)  # inputs, units: enough weights to be worth keeping
OPTIONS = [None, "bf16"]


def changes():
    def one_element_through_data(p):
        p.data[3, 5] += 1

    def signs_through_data(p):
        p.data.neg_()

    def order_through_data(p):
        p.data.copy_(p.data.flip(0))

    def last_bit_through_numpy(p):
        array = p.detach().numpy()
        array[-1, -1] *= 1 + 2**-23

    def in_place(p):
        with torch.no_grad():
            p[0, 0] += 1

    def by_optimizer(p):
        p.grad = torch.ones_like(p)
        torch.optim.SGD([p], lr=0.1).step()

    return [
        one_element_through_data,
        signs_through_data,
        order_through_data,
        last_bit_through_numpy,
        in_place,
        by_optimizer,
    ]


def kept(module):
    return {index: packed.data_ptr() for index, packed in module._packed_layers._kept.items()}


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", MODULES)
def test_sees_changed_weights(name, option, change):
    module = MODULES[name](*SIZES, weights=option)
    x = torch.randn(5, 2, SIZES[0])
    with torch.no_grad():
        module(x)
    before = kept(module)
    fingerprint = module._packed_layers._kept[0][:8].clone()
    change(module.weight_hh_l0)
    fresh = MODULES[name](*SIZES, weights=option)
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(module(x)[0], fresh(x)[0])
    assert before
    assert not torch.equal(module._packed_layers._kept[0][:8], fingerprint)


@pytest.mark.parametrize("option", OPTIONS)
def test_sees_load_state_dict_and_replaced_parameters(option):
    module, other = (fastrnn.LSTM(*SIZES, weights=option) for _ in range(2))
    x = torch.randn(5, 2, SIZES[0])
    with torch.no_grad():
        module(x)
        module.load_state_dict(other.state_dict())
        assert torch.equal(module(x)[0], other(x)[0])
        other.weight_hh_l0 = torch.nn.Parameter(torch.zeros_like(other.weight_hh_l0))
        module.weight_hh_l0.zero_()
        assert torch.equal(module(x)[0], other(x)[0])
        module.double()
        assert torch.equal(module(x.double())[0], other.double()(x.double())[0])


@pytest.mark.parametrize("option", OPTIONS)
def test_sees_changed_strided_computed_and_inference_weights(option):
    x = torch.randn(5, 2, SIZES[0])

    def check(module, change):
        with torch.no_grad():
            for step in range(8):
                change(step)
                fresh = fastrnn.GRU(*SIZES)
                for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                    value = getattr(module, name)
                    getattr(fresh, name).copy_(value.bfloat16() if option and "weight" in name else value)
                torch.testing.assert_close(module(x)[0], fresh(x)[0], rtol=0, atol=2e-6)  # roundings of float32

    strided = fastrnn.GRU(*SIZES, weights=option)
    strided.weight_hh_l0 = torch.nn.Parameter(torch.randn(SIZES[1], 3 * SIZES[1]).t() / 16)
    check(strided, lambda step: strided.weight_hh_l0.data.mul_(0.9))
    computed = torch.nn.utils.parametrizations.weight_norm(fastrnn.GRU(*SIZES, weights=option), "weight_hh_l0")
    original = computed.parametrizations.weight_hh_l0.original1
    check(computed, lambda step: original[7, 3 + step].add_(1))
    with torch.inference_mode():
        inference = fastrnn.GRU(*SIZES, weights=option)
        check(inference, lambda step: inference.weight_hh_l0[7, 3].add_(1))


@pytest.mark.parametrize("option", OPTIONS)
def test_copies_keep_no_packed_weights(option):
    module = fastrnn.GRU(*SIZES, weights=option)
    x = torch.randn(5, 2, SIZES[0])
    with torch.no_grad():
        y = module(x)[0]
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        assert all(not kept(other) for other in copies)
        module.weight_hh_l0.zero_()
        assert all(torch.equal(other(x)[0], y) for other in copies)
        reverted = fastrnn.revert(module) and module
    assert "_packed_layers" not in vars(reverted)


@pytest.mark.parametrize("option", OPTIONS)
def test_keeps_what_it_packed_until_it_is_trained(option):
    """A second call does not pack again: the kept memory is the same. A call that records gradients frees it."""
    module = fastrnn.LSTM(*SIZES, 2, weights=option)
    x = torch.randn(5, 2, SIZES[0])
    with torch.no_grad():
        module(x)
        first = kept(module)
        module(x)
    assert kept(module) == first
    assert len(first) == 2
    if option is None:
        module(x)
        assert not kept(module)


@pytest.mark.parametrize(
    ("sizes", "T"), [((8, 16), 5), (SIZES, 2), (SIZES, 600)], ids=["few weights", "few rows", "many rows"]
)
def test_keeps_nothing_where_it_would_not_help(sizes, T):
    module = fastrnn.LSTM(*sizes)
    with torch.no_grad():
        module(torch.randn(T, 2, sizes[0]))
    assert not kept(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_kept_weights_give_the_same_bits(cell, dtype):
    case = make_case(cell, 5, 3, SIZES[0], SIZES[1], D=2, dtype=dtype)
    packs = ops.PackedLayers()
    expected = case.run(ops.layer)
    for _ in range(2):
        for actual, wanted in zip(case.run(lambda *args: packs.run(0, *args)), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert packs._kept


def test_traced_module_reads_its_weights():
    """What is kept is not baked into a trace."""
    module = fastrnn.LSTM(*SIZES)
    x = torch.randn(5, 2, SIZES[0])
    with torch.no_grad():
        module(x)
        traced = torch.jit.trace(module, x)
        module.weight_hh_l0.zero_()
        assert torch.equal(traced(x)[0], module(x)[0])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("D", [1, 2])
def test_opcheck(D, narrow):
    case = make_case("gru_reset_before", 5, 3, 4, 256, D=D, dtype=torch.float32)
    x, h0, c0, *flat = case.tensors
    arguments = (x, h0, c0, *ops._lists(flat), case.lengths, case.resets, case.cell, narrow)
    torch.library.opcheck(torch.ops.fastrnn.packed_forward, (*arguments, None))
    packed = torch.ops.fastrnn.packed_forward(*arguments, None)[3]
    torch.library.opcheck(torch.ops.fastrnn.packed_forward, (*arguments, packed))


def test_raw_op_uses_no_packs_but_those_of_the_weights():
    """Whatever it is given, the result is right, and packs of the weights come back."""
    weights = Weights(torch.randn(1024, 8) / 8, torch.randn(1024, 256) / 8, None, None)
    lists = [[weights.w_ih], [weights.w_hh], [], [], []]
    x = torch.randn(5, 2, 8)

    def call(packed, x=x, lists=lists):
        return torch.ops.fastrnn.packed_forward(x, None, None, *lists, None, None, "lstm", True, packed)

    y, _, _, packed = call(None)
    assert call(packed)[3].numel() == 0
    others = call(None, lists=[[2 * weights.w_ih], *lists[1:]])[3]
    unaligned = torch.cat([packed, packed])[4 : 4 + len(packed)].copy_(packed)
    for wrong in (others, packed[:-64], packed[::2], packed.float(), torch.empty(0), unaligned):
        found = call(wrong)
        assert torch.equal(found[0], y)
        assert torch.equal(found[3], packed)
    with pytest.raises(TypeError, match="x: expected dtype Float"):
        call(packed, x=x.double())
    with pytest.raises(RuntimeError, match="packed: expected device cpu"):
        call(packed.to("meta"))
