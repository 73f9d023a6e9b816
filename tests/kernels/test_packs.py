"""Packed weights that modules keep between inference calls: always those of the module, however it was changed."""

import copy
import pickle
import threading
import time

import pytest
import torch
from cases import make_case, packing

import fastrnn
from fastrnn import codegen, ops, reference
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


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sees_signs_whose_differences_could_cancel(dtype, block):
    """The fingerprint reads whole vectors in blocks; signs of neighbouring blocks must not undo each other."""
    module = fastrnn.LSTM(256, 256, dtype=dtype)
    x = torch.randn(4, 4, 256, dtype=dtype)
    flat = module.weight_hh_l0.data.view(-1)
    per_word = max(1, 8 // flat.element_size())
    with torch.no_grad():
        module(x)
        for start in range(per_word):
            for first in range(block // 2, block // 2 + 4):
                flips = [first * per_word + start, *((first + block) * per_word + lane for lane in range(per_word))]
                before = module._packed_layers._kept[0][:8].clone()
                flat[flips] *= -1
                module(x)
                assert not torch.equal(module._packed_layers._kept[0][:8], before)
        before = module(x)[0]
        half = module.weight_hh_l0.data
        half[:, 1:128:2] *= -1
        half[:, 128:] *= -1
        assert not torch.equal(module(x)[0], before)


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
        assert not any("_packed_layers" in vars(other) for other in copies)
        module.weight_hh_l0.zero_()
        assert all(torch.equal(other(x)[0], y) for other in copies)
        reverted = fastrnn.revert(module)
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


def test_writes_during_a_call_leave_nothing_stale():
    """Whatever a call in another thread reads, once the writing is over results are those of the weights."""
    module = fastrnn.LSTM(512, 512).requires_grad_(False)
    x = torch.randn(4, 4, 512)
    states = [{name: value.clone() for name, value in module.state_dict().items()} for _ in range(2)]
    for value in states[1].values():
        value.mul_(-0.5)
    module.load_state_dict(states[0])
    expected = module(x)[0]
    done = threading.Event()

    def read():
        while not done.is_set():
            module(x)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(60):
        module.load_state_dict(states[1])
        time.sleep(0.002)
        module.load_state_dict(states[0])
        time.sleep(0.002)
    done.set()
    reader.join()
    assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize(
    ("sizes", "T"), [((8, 16), 5), (SIZES, 2), (SIZES, 600)], ids=["few weights", "few rows", "many rows"]
)
def test_keeps_nothing_where_it_would_not_help(sizes, T):
    module = fastrnn.LSTM(*sizes)
    with torch.no_grad():
        module(torch.randn(T, 2, sizes[0]))
    assert not kept(module)


def cells_of(dtype):
    """All that are built in, and in bfloat16, whose panels are packed in pairs, the first of those that keep and read
    packs in the same places: packs know nothing of a cell's maths, and to compile all cells in all types takes minutes.
    """
    found = {}
    for name, cell in reference.CELLS.items():
        sizes = codegen.description(cell)
        counts = [min(sizes[key], 2) for key in ("first_gates", "second_gates", "carried", "unit_weights", "masks")]
        is_built_in = dtype == torch.float32 or cell.has_all_kernels
        if is_built_in or dtype == torch.bfloat16:
            found.setdefault(name if is_built_in else (*counts, bool(cell.normalized)), name)
    return found.values()


TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "cell"), [(dtype, cell) for dtype in TYPES for cell in cells_of(dtype)])
def test_kept_weights_give_the_same_bits(cell, dtype):
    case = make_case(cell, 5, 3, SIZES[0], SIZES[1], D=2, dtype=dtype)
    packs = ops.PackedLayers()
    expected = case.run(ops.layer)
    for _ in range(2):
        for actual, wanted in zip(case.run(packing(packs)), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert packs._kept


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("option", OPTIONS)
def test_only_ordinary_tensors_are_kept(option):
    """Nor are kept ones handed to others: neither outcome depends on what was called before."""
    module = fastrnn.LSTM(*SIZES, weights=option).requires_grad_(False)
    x = torch.randn(5, 2, SIZES[0])
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    for _ in range(2):
        assert type(module(x.as_subclass(Subclass))[0]) is Subclass
        weights = {name: fake.from_tensor(p) for name, p in module.named_parameters()}
        called = torch.func.functional_call(module, weights, (fake.from_tensor(x),))
        assert isinstance(called[0], torch._subclasses.FakeTensor)
        assert type(module(x)[0]) is torch.Tensor
        assert all(type(packed) is torch.Tensor for packed in module._packed_layers._kept.values())


def test_traced_module_reads_its_weights():
    """What is kept is not baked into a trace."""
    module = fastrnn.LSTM(*SIZES)
    x = torch.randn(5, 2, SIZES[0])
    with torch.no_grad():
        module(x)
        traced = torch.jit.trace(module, x)
        module.weight_hh_l0.zero_()
        assert torch.equal(traced(x)[0], module(x)[0])


@pytest.mark.parametrize("rounded", [None, "bf16", "int8"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("steps", [(5, 3), (1, 8), (1, 40)], ids=str)
def test_opcheck(D, steps, rounded):
    case = make_case("gru_reset_before", *steps, 4, 256, D=D, dtype=torch.float32)
    arguments = (*case.op_inputs(), case.lengths, case.resets, case.masks, case.cell, rounded)
    torch.library.opcheck(torch.ops.fastrnn.packed_forward, (*arguments, None))
    packed = torch.ops.fastrnn.packed_forward(*arguments, None)[3]
    torch.library.opcheck(torch.ops.fastrnn.packed_forward, (*arguments, packed))


def test_raw_op_uses_no_packs_but_those_of_the_weights():
    """Whatever it is given, the result is right, and packs of the weights come back."""
    weights = Weights(torch.randn(1024, 8) / 8, torch.randn(1024, 256) / 8, None, None)
    x = torch.randn(5, 2, 8)

    def call(packed, x=x, w_ih=weights.w_ih):
        inputs = x, None, None, [w_ih, weights.w_hh], 1
        return torch.ops.fastrnn.packed_forward(*inputs, None, None, None, "lstm", "bf16", packed)

    y, _, _, packed = call(None)
    assert call(packed)[3].numel() == 0
    others = call(None, w_ih=2 * weights.w_ih)[3]
    unaligned = torch.cat([packed, packed])[4 : 4 + len(packed)].copy_(packed)
    for wrong in (others, packed[:-64], packed[::2], packed.float(), torch.empty(0), unaligned):
        found = call(wrong)
        assert torch.equal(found[0], y)
        assert torch.equal(found[3], packed)
    with pytest.raises(TypeError, match="x: expected dtype Float"):
        call(packed, x=x.double())
    with pytest.raises(RuntimeError, match="packed: expected device cpu"):
        call(packed.to("meta"))
