"""gradcheck and gradgradcheck of whole stacks, every cell and row option, in float64."""

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case

from fastrnn import functional, ops, reference
from fastrnn.reference import CELLS, Weights

T, B, INPUTS, H = 3, 2, 3, 4


def make_stack(cell, P, D, L, rows, dtype=torch.float64):
    """`(function, inputs)`: the function of input, states and all weights that a module of L layers computes."""
    first = make_case(cell, T, B, INPUTS, H, P=P, D=D, dtype=dtype, **rows)
    layers = [first] + [make_case(cell, T, B, D * (P or H), H, P=P, D=D, dtype=dtype, seed=i) for i in range(1, L)]
    has_cell = CELLS[cell].carried > 0
    h0 = torch.cat([layer.tensors[1] for layer in layers])
    c0 = torch.cat([layer.tensors[2] for layer in layers]) if has_cell else None
    masks = None if first.masks is None else [layer.masks for layer in layers]
    flat = [t for layer in layers for t in layer.tensors[3:]]
    present = [t for t in (first.tensors[0], h0, c0, *flat) if t is not None]

    def function(*given):
        given = iter(given)
        x, h, c, *weights = (None if t is None else next(given) for t in (first.tensors[0], h0, c0, *flat))
        groups = [Weights(*weights[i : i + 6]) for i in range(0, len(weights), 6)]
        stack = [groups[i : i + D] for i in range(0, len(groups), D)]
        outputs = functional.rnn(cell, x, h, c, stack, lengths=first.lengths, resets=first.resets, masks=masks)
        return outputs if has_cell else outputs[:2]

    return function, tuple(t.requires_grad_() for t in present)


STACKS = pytest.mark.parametrize("L", [1, 2], ids=["1-layer", "2-layers"])
DIRECTIONS = pytest.mark.parametrize("D", [1, 2], ids=["forward", "both-ways"])
ROW_OPTIONS = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
CELL_VARIANTS = pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)


@CELL_VARIANTS
@ROW_OPTIONS
@DIRECTIONS
@STACKS
def test_gradcheck(cell, P, rows, D, L):
    function, inputs = make_stack(cell, P, D, L, rows)
    assert torch.autograd.gradcheck(function, inputs)


@CELL_VARIANTS
@ROW_OPTIONS
@DIRECTIONS
@STACKS
def test_gradgradcheck(cell, P, rows, D, L):
    function, inputs = make_stack(cell, P, D, L, rows)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@CELL_VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_order_agrees_with_first_at_every_dtype(cell, P, dtype):
    """create_graph=True gives the gradients of the kernels, rounding aside, and they can be differentiated."""
    function, inputs = make_stack(cell, P, 2, 1, {"lengths": True}, dtype)
    tolerance = 100 * torch.finfo(dtype).eps  # gradients of size up to 10
    first = torch.autograd.grad(function(*inputs)[0].sum(), inputs, allow_unused=True)
    again = torch.autograd.grad(function(*inputs)[0].sum(), inputs, create_graph=True, allow_unused=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in again), inputs)
    assert all(g.dtype == dtype and g.isfinite().all() for g in second)


def test_tied_inputs_are_not_counted_twice():
    """One tensor as w_ih and w_hh: its gradient is the sum of both, in first and in second order."""
    torch.manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: ops.layer("rnn_tanh", x, None, None, [Weights(w, w)])[:2], (w,))
    assert torch.autograd.gradgradcheck(lambda w: ops.layer("rnn_tanh", x, None, None, [Weights(w, w)])[:2], (w,))


@CELL_VARIANTS
def test_only_what_is_asked_for(cell, P):
    """Each input alone: the gradient is the one that it has among all."""
    case = make_case(cell, 4, 3, 5, 6, P=P and 5, D=2)
    together = case.to(torch.float64, requires_grad=True)
    expected = iter(together.outputs_and_grads(ops.layer)[1])
    generator = torch.Generator().manual_seed(1)
    for index, tensor in enumerate(case.tensors):
        if tensor is None:
            continue
        tensors = [t if t is None else t.clone().requires_grad_(i == index) for i, t in enumerate(case.tensors)]
        outputs = case.run(ops.layer, tensors)
        generator.manual_seed(1)
        upstream = [torch.rand(o.shape, generator=generator, dtype=torch.float64) - 0.5 for o in outputs]
        (found,) = torch.autograd.grad(outputs, tensors[index], upstream)
        torch.testing.assert_close(found, next(expected), rtol=0, atol=0)


@CELL_VARIANTS
def test_upstream_gradients_that_are_not_dense(cell, P):
    """They are copied, and the copies are there for as long as the kernels read them."""
    function, inputs = make_stack(cell, P, 2, 1, {})
    outputs = function(*inputs)
    strided = [torch.randn(*o.shape, 2, dtype=o.dtype)[..., 0] for o in outputs]
    expanded = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
    for grads in (strided, expanded):
        found = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
        expected = torch.autograd.grad(outputs, inputs, [g.contiguous() for g in grads], retain_graph=True)
        assert all(map(torch.equal, found, expected))


@CELL_VARIANTS
@ROW_OPTIONS
@DIRECTIONS
@pytest.mark.parametrize("T", [1, 3])
def test_any_subset_of_gradients(cell, P, rows, D, T):
    """Each alone is what it is among all: what nobody asks for is not computed."""
    case = make_case(cell, T, B, INPUTS, H, P=P, D=D, **rows).to(torch.float64, requires_grad=True)
    _, expected = case.outputs_and_grads(reference.layer)
    present = [index for index, tensor in enumerate(case.tensors) if tensor is not None]
    for index, wanted in zip(present, expected, strict=True):
        alone = case.to(torch.float64)
        alone.tensors[index].requires_grad_()
        outputs = alone.run(ops.layer)
        loss = sum((o * u).sum() for o, u in zip(outputs, case.upstream(outputs), strict=True))
        (found,) = torch.autograd.grad(loss, [alone.tensors[index]], materialize_grads=True)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@CELL_VARIANTS
@pytest.mark.parametrize(("T", "B"), [(3, 0), (0, 2), (0, 0)])
def test_gradients_without_steps_or_rows(cell, P, T, B):
    """The last states are the first ones, and so are their gradients; nothing else has any."""
    case = make_case(cell, T, B, INPUTS, H, P=P, D=2, lengths=True).to(torch.float64, requires_grad=True)
    outputs, grads = case.outputs_and_grads(ops.layer)
    states = [t for t in case.tensors[1:3] if t is not None]
    of_states = case.upstream(outputs)[1:]
    assert all(map(torch.equal, outputs[1:], states))
    assert all(map(torch.equal, grads[1 : 1 + len(states)], of_states))
    assert not any(grad.any() for grad in (grads[0], *grads[1 + len(states) :]))
