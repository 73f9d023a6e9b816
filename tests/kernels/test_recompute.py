"""recompute=True: only the states are kept, and the gradients are those of the usual way."""

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case

import fastrnn
from fastrnn import ops


def recompute(*args):
    return ops.layer(*args, recompute=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(7, 5, 6, 11), (90, 33, 20, 37), (700, 4, 5, 6)], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_same_bits(cell, P, size, dtype, D, rows):
    """The sums run in the same order. 90 x 33 and 700 x 4 rows are several chunks and blocks of the backward pass."""
    case = make_case(cell, *size, P=P, D=D, **ROWS[rows]).to(dtype, requires_grad=True)
    for kept, again in zip(case.outputs_and_grads(ops.layer), case.outputs_and_grads(recompute), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 6, 11), (3, 1, 6, 11), (1, 11, 300, 40), (1, 97, 30, 40)], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_few_rows(cell, P, size, dtype, states):
    """Forward reads the weights of these as they lie, but for the last, and adds up in another order."""
    case = make_case(cell, *size, P=P, states=states, bias=states).to(dtype, requires_grad=True)
    for kept, again in zip(case.outputs_and_grads(ops.layer), case.outputs_and_grads(recompute), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_16_bit(cell, P, D, dtype):
    """The gates start from the rounded h: some units in the last place. ReLU has an edge, where a unit may switch."""
    case = make_case(cell, 20, 7, 12, 21, P=P, D=D, lengths=True, resets=True).to(dtype, requires_grad=True)
    (_, kept), (_, again) = (case.outputs_and_grads(layer) for layer in (ops.layer, recompute))
    allowed = (16 if cell == "rnn_relu" else 2) * torch.finfo(dtype).eps
    for a, b in zip(kept, again, strict=True):
        assert (a.double() - b.double()).norm() <= allowed * a.double().norm()


@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("D", [1, 2])
def test_gradcheck(cell, P, D):
    case = make_case(cell, 4, 3, 3, 4, P=P, D=D, lengths=True, resets=True).to(torch.float64, requires_grad=True)
    given = [t for t in case.tensors if t is not None]

    def call(*tensors):
        rest = iter(tensors)
        return case.run(recompute, [t if t is None else next(rest) for t in case.tensors])

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize(
    ("cls", "vectors"), [(fastrnn.LSTM, 1), (fastrnn.GRU, 0), (fastrnn.RNN, 0)], ids=["LSTM", "GRU", "RNN"]
)
def test_keeps_the_states_alone(cls, vectors):
    """Beyond the input, the output and the parameters the graph holds c of every step, and nothing else that grows."""
    T, B, H = 50, 4, 32

    def kept(**options):
        torch.manual_seed(0)
        module, x = cls(H, H, **options), torch.randn(T, B, H, requires_grad=True)
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y, _ = module(x)
        outside = {t.untyped_storage().data_ptr() for t in (x, y, *module.parameters())}
        return sum(size for address, size in sizes.items() if address not in outside)

    assert kept(recompute=True) == vectors * T * B * H * 4
    assert kept() > kept(recompute=True)


def test_modules_options_and_compile():
    module, plain = (fastrnn.LSTM(6, 11, 2, bidirectional=True, recompute=flag) for flag in (True, False))
    plain.load_state_dict(module.state_dict())
    x = torch.randn(9, 3, 6)
    expected = torch.autograd.grad(plain(x)[0].sum(), list(plain.parameters()))
    assert "recompute=True" in repr(module)
    for call in (module, torch.compile(module, fullgraph=True)):
        found = torch.autograd.grad(call(x)[0].sum(), list(module.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        fastrnn.LSTM(6, 11, recompute=1)


@pytest.mark.parametrize("D", [1, 2])
def test_opcheck(D):
    case = make_case("lstm", 5, 3, 4, 6, D=D, dtype=torch.float32)
    arguments = (*case.op_inputs(), case.lengths, case.resets, case.masks, case.cell, True, True)
    torch.library.opcheck(torch.ops.fastrnn.layer_forward, arguments)
