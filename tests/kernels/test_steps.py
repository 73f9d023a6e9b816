"""What layer_backward takes and gives for each step: gradients of the states and values in between, gate gradients."""

import pytest
import torch
from cases import VARIANT_IDS, VARIANTS, make_case, ops, reference
from own_cells import OWN

from fastrnn import fallback
from fastrnn.cells import CELLS
from fastrnn.members import MemberGradients
from fastrnn.read import STEPS, How, Read

LAYOUTS = {"plain": (1, {}), "two-way-lengths-resets": (2, {"lengths": True, "resets": True})}
OTHERS = [(name, None) for name in ("slstm", "mgu", "indrnn", "jordan", OWN[0].name, OWN[1].name)]


def call(case, grads, *options, recompute=False):
    """What layer_backward returns; `grads` of y, h_n and c_n."""
    own = *case.op_inputs(), case.lengths, case.resets, case.masks, case.cell
    y, _, _, saved, saved_c = torch.ops.fastrnn.layer_forward(*own, True, recompute)
    wanted = [t is not None for t in case.tensors[:3]] + [True] * len(own[3])
    return torch.ops.fastrnn.layer_backward(*grads, *own, y, saved, saved_c, wanted, *options)


def upstream(case):
    outputs = case.run(reference.layer)
    return [*case.upstream(outputs), None][:3]


@pytest.mark.parametrize(("cell", "P"), VARIANTS + OTHERS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gate_gradients_of_every_step(cell, P, layout, recompute):
    """Summed with what they multiply they are the gradients of the weights, and 0 where a row is finished."""
    D, rows = layout
    case = make_case(cell, 9, 3, 5, 4, P=P, D=D, **rows)
    assert ops.prepare(cell, torch.float64)
    grads = upstream(case)
    plain = call(case, grads, recompute=recompute)
    *found, steps = call(case, grads, None, True, recompute=recompute)
    assert all(map(torch.equal, found, plain))
    if case.lengths is not None:
        finished = torch.arange(9)[:, None] >= case.lengths
        assert (steps[:, finished] == 0).all()
    if P is not None:
        return
    own = *case.op_inputs(), case.lengths, case.resets, case.masks, cell
    y, _, _, _, states = torch.ops.fastrnn.layer_forward(*own, True)
    x, h0, c0, *_ = case.tensors
    read = Read(case.lengths, case.resets, x, h0, c0, case.masks, None, own[3])
    by_weight = MemberGradients(How(cell, D), read, y, states, steps, 1).of_weights([True] * len(own[3]))
    for a, b in zip(by_weight, found[3:], strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "slstm", OWN[1].name])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("B", [1, 3, 40])
def test_gradients_of_the_states_of_every_step(cell, layout, B):
    """As autograd through the equation; one row, a team's, and many rows."""
    D, rows = layout
    case = make_case(cell, 6, B, 5, 70 if B == 1 else 4, D=D, **rows)
    assert ops.prepare(cell, torch.float64)
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors]
    weights = ops.unflatten(cell, case.op_inputs()[3], D)
    x, h0, c0 = tensors[:3]
    *outputs, states = reference.layer_with_states(cell, x, h0, c0, weights, case.lengths, case.resets, case.masks)
    grads = [*case.upstream(outputs), torch.randn_like(states)]
    inputs = [t for t in tensors if t is not None]
    expected = torch.autograd.grad([*outputs, states], inputs, grads, materialize_grads=True)
    with torch.no_grad():
        found = call(case, grads[:3], grads[3])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    if B == 3:  # what a GPU does, which has no kernels for it
        read = Read(case.lengths, case.resets, *case.tensors[:3], case.masks, None, case.op_inputs()[3])
        wanted = [False, False, *(t is not None for t in case.tensors[:3]), False, False, *(True for _ in read.weights)]
        through = fallback.gradients(How(cell, D), read, grads, wanted)
        for a, b in zip([t for t in through if t is not None], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        wanted[STEPS] = True
        with pytest.raises(NotImplementedError, match="per-sample gradients: there are none here"):
            fallback.gradients(How(cell, D), read, grads, wanted)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh", "mgu", "jordan", OWN[1].name])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_values(cell, layout):
    """They add up with those of the outputs, and at a row's last step they are the gate gradients themselves. That they
    are carried on rightly is what second derivatives are tested for (test_derivatives.py)."""
    D, rows = layout
    case = make_case(cell, 4, 3, 5, 4, D=D, **rows)
    assert ops.prepare(cell, torch.float64)
    shape = call(case, upstream(case), None, True)[-1].shape
    values = torch.randn(shape, dtype=torch.float64)
    none = [None, None, None]
    with_values = call(case, upstream(case), None, True, values)
    alone = call(case, upstream(case), None, True)
    only = call(case, [torch.zeros_like(upstream(case)[0]), *none[1:]], None, True, values)
    for both, a, b in zip(with_values, alone, only, strict=True):
        torch.testing.assert_close(both, a + b, rtol=1e-11, atol=1e-12)
    if cell in ("lstm", "gru", "rnn_tanh"):  # those of others have an operand that hands them on within the step
        ends = torch.full((3,), 4) if case.lengths is None else case.lengths
        for b, end in enumerate(ends):
            if end > 0:
                torch.testing.assert_close(only[-1][0, end - 1, b], values[0, end - 1, b], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_other_dtypes_and_threads(cell, P, dtype, threads):
    """Close to float64, and the same bits on any number of threads."""
    case = make_case(cell, 5, 37, 6, 20, P=P, D=2, lengths=True, dtype=dtype)
    exact = case.to(torch.float64)
    grads = upstream(exact)
    accumulator = torch.float32
    with_states = CELLS[cell].carried > 0
    states = torch.randn(2, 5, 37, 20, dtype=torch.float64) if with_states else None
    shape = call(exact, grads, None, True)[-1].shape
    values = torch.randn(shape, dtype=torch.float64)
    expected = call(exact, grads, states, True, values)
    own = [None if g is None else g.to(dtype) for g in grads]
    options = None if states is None else states.to(accumulator), True, values.to(dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(call(case, own, *options))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    if cell == "rnn_relu" and dtype != torch.float32:
        return  # its gradient jumps where a rounding takes a value to the other side of 0
    for a, b in zip(found[0], expected, strict=True):
        if b.numel() == 0:  # c0 of a cell without
            continue
        error, scale = (a.double() - b).abs().max().item(), max(1.0, b.abs().max().item())
        assert error <= 16 * torch.finfo(dtype).eps * scale


def test_wrong_shapes_are_errors():
    case = make_case("lstm", 3, 2, 4, 5)
    grads = upstream(case)
    with pytest.raises(ValueError, match=r"grad_saved_c: expected shape \[1, 3, 2, 5\], got \[1, 3, 2, 4\]"):
        call(case, grads, torch.zeros(1, 3, 2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"grad_values: expected shape \[1, 3, 2, 4, 5\], got \[3\]"):
        call(case, grads, None, False, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="grad_values: expected dtype Double, got Float"):
        call(case, grads, None, False, torch.zeros(1, 3, 2, 4, 5))


def test_fakes_have_the_same_shapes():
    case = make_case("gru", 3, 2, 4, 5, D=2)
    real = call(case, upstream(case), None, True)
    meta = case.to(torch.float64)
    meta.tensors = [None if t is None else t.to("meta") for t in meta.tensors]
    grads = [None if g is None else g.to("meta") for g in upstream(case)]
    assert [t.shape for t in call(meta, grads, None, True)] == [t.shape for t in real]
