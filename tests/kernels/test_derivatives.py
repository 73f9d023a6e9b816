"""Derivatives of every kind, and torch.func's transforms in any nesting: kernels against the equations, in float64."""

import pytest
import torch
from cases import ROWS, VARIANTS, make_case, ops, reference
from own_cells import OWN
from test_gradients import make_stack
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import fallback
from fastrnn.cells import CELLS, step
from fastrnn.reference import Weights

NAMES = [name for name, cell in CELLS.items() if name == cell.equation.__name__] + [cell.name for cell in OWN]
EACH = pytest.mark.parametrize(("name", "P"), [*((name, None) for name in NAMES), ("lstm", 3)])
# With every rule for rows at once, and with none: each rule by itself is tested with plain gradients.
LAYOUTS = {"plain": (1, {}), "two-way-lengths-resets": (2, {"lengths": True, "resets": True})}
MEMBERS = 2


class Problem:
    """A layer as a function of all that it differentiates, and a random direction in that."""

    def __init__(self, layer, case):
        self.case, self.layer = case, layer
        self.places = [i for i, t in enumerate(case.tensors) if t is not None]
        self.inputs = tuple(case.tensors[i] for i in self.places)
        generator = torch.Generator().manual_seed(2)
        self.direction = tuple(
            torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) - 0.5 for t in self.inputs
        )
        self.upstream = case.upstream([out.detach() for out in case.run(reference.layer)])
        self.all = tuple(range(len(self.inputs)))
        # x and the states of each member, the weights for all.
        self.rows = tuple(0 if place < 3 else None for place in self.places)

    def outputs(self, *inputs):
        tensors = list(self.case.tensors)
        for place, tensor in zip(self.places, inputs, strict=True):
            tensors[place] = tensor
        return self.case.run(self.layer, tensors)

    def loss(self, *inputs):
        """Depends on the outputs in second order."""
        return sum(
            (u * out + 0.5 * out * out).sum() for u, out in zip(self.upstream, self.outputs(*inputs), strict=True)
        )

    def gradients(self, *inputs):
        return grad(self.loss, argnums=self.all)(*inputs)

    def along(self, *inputs):
        """The gradients' product with the direction."""
        return sum((g * v).sum() for g, v in zip(self.gradients(*inputs), self.direction, strict=True))

    def members(self, which):
        pairs = zip(self.inputs, which, strict=True)
        return tuple(t if dim is None else torch.stack([t, 0.5 * t]) for t, dim in pairs)

    def per_member(self, *inputs):
        return vmap(self.gradients, in_dims=self.rows)(*inputs)


def of_eager_autograd(p):
    inputs = [t.clone().requires_grad_() for t in p.inputs]
    grads = torch.autograd.grad(p.loss(*inputs), inputs, create_graph=True, materialize_grads=True)
    along = sum((g * v).sum() for g, v in zip(grads, p.direction, strict=True))
    return torch.autograd.grad(along, inputs, materialize_grads=True)


def of_forward_mode(p):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, v) for t, v in zip(p.inputs, p.direction, strict=True)]
        return [torch.autograd.forward_ad.unpack_dual(out).tangent for out in p.outputs(*duals)]


def of_third(p):
    return jvp(grad(p.along, argnums=p.all), p.inputs, p.direction)[1]


TRANSFORMS = {
    "grad": lambda p: p.gradients(*p.inputs),
    "vjp": lambda p: vjp(p.outputs, *p.inputs)[1](p.outputs(*p.inputs)),
    "jvp": lambda p: jvp(p.outputs, p.inputs, p.direction)[1],
    "vjp of vjp": lambda p: vjp(vjp(p.outputs, *p.inputs)[1], tuple(p.upstream))[1](p.direction)[0],
    "forward mode": of_forward_mode,
    "backward of backward": of_eager_autograd,
    "grad of grad": lambda p: grad(p.along, argnums=p.all)(*p.inputs),
    "jvp of grad": lambda p: jvp(p.gradients, p.inputs, p.direction)[1],
    "grad of jvp": lambda p: grad(
        lambda *inputs: sum(t.square().sum() for t in jvp(p.outputs, inputs, p.direction)[1]), argnums=p.all
    )(*p.inputs),
    "jvp of jvp": lambda p: jvp(
        lambda *inputs: jvp(p.outputs, inputs, p.direction)[1], p.inputs, tuple(t.cos() for t in p.inputs)
    )[1],
    "Hessian by a weight": lambda p: jacfwd(jacrev(lambda w: p.loss(*p.inputs[:-1], w)))(p.inputs[-1]),
    "several tangents of gradients": lambda p: vmap(
        lambda s: jvp(p.gradients, p.inputs, tuple(v * s for v in p.direction))[1]
    )(torch.ones(2, dtype=torch.float64).cumsum(0)),
    "vmap": lambda p: vmap(p.outputs, in_dims=p.rows)(*p.members(p.rows)),
    "vmap of jvp": lambda p: vmap(lambda *inputs: jvp(p.outputs, inputs, p.direction)[1], in_dims=p.rows)(
        *p.members(p.rows)
    ),
    "jvp of vmap": lambda p: jvp(
        vmap(p.outputs, in_dims=p.rows), p.members(p.rows), tuple(t.cos() for t in p.members(p.rows))
    )[1],
    "vmap of grad": lambda p: p.per_member(*p.members(p.rows)),
    "vmap of grad of grad": lambda p: vmap(grad(p.along, argnums=p.all), in_dims=p.rows)(*p.members(p.rows)),
    "vmap of vmap of grad": lambda p: vmap(p.per_member, in_dims=p.rows)(
        *(t if dim is None else torch.stack([t, 1 - t]) for t, dim in zip(p.members(p.rows), p.rows, strict=True))
    ),
    "ensemble": lambda p: vmap(p.gradients)(*p.members([0] * len(p.inputs))),
    "jacrev": lambda p: jacrev(lambda x: p.outputs(x, *p.inputs[1:])[0].sum((0, 1)))(p.inputs[0]),
    "jacfwd of jacrev": lambda p: jacfwd(jacrev(lambda x: p.outputs(x, *p.inputs[1:])[0].sum((0, 2))))(p.inputs[0]),
    "jacrev of jacfwd": lambda p: jacrev(jacfwd(lambda x: p.outputs(x, *p.inputs[1:])[0].sum((0, 2))))(p.inputs[0]),
}


@EACH
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_transforms(name, P, layout):
    """The same sums in another order: some 1e-15 of the largest numbers."""
    D, rows = layout
    case = make_case(name, 4, 3, 5, 4, P, D=D, **rows)
    for transform, apply in TRANSFORMS.items():
        found, expected = (apply(Problem(layer, case)) for layer in (ops.layer, reference.layer))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-10, msg=lambda text, transform=transform: f"{transform}: {text}"
            )


def flat_operand(x, u, h):
    """The second product's operand has no tangent."""
    z = torch.sigmoid(x.z + u.z(h))
    n = torch.tanh(x.n + u.n(step(x.z)))
    return n + z * (h - n)


def reads_one_alone(x, u, h):
    """Both products have one gradient, though the step is no function of their sum."""
    return torch.tanh(x.z + u.z(h) + 0.5 * step(x.z))


@pytest.mark.parametrize(("equation", "gates"), [(flat_operand, "z n"), (reads_one_alone, "z")])
def test_steps_that_are_flat_in_an_operand(equation, gates):
    case = make_case(fastrnn.cell(gates=gates, states="h")(equation).name, 3, 2, 3, 2)
    for transform in (TRANSFORMS["jvp"], TRANSFORMS["jacfwd of jacrev"], of_third):
        found, expected = (transform(Problem(layer, case)) for layer in (ops.layer, reference.layer))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["gru", "lstm", OWN[2].name])
def test_without_kernels_for_tangents(name, transform, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(fallback, "has_tangent_kernels", lambda how, read: False)
    case = make_case(name, 3, 2, 4, 3, D=2, lengths=True, resets=True)
    found, expected = (TRANSFORMS[transform](Problem(layer, case)) for layer in (ops.layer, reference.layer))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["gru", "lstm", "gru_reset_before"])
def test_per_member_gradients_are_differentiable(name):
    """Of shared weights, by all that they depend on: the gate gradients, the states, an operand within a step."""
    case = make_case(name, 4, 3, 5, 4, D=2, lengths=True, resets=True)
    found, expected = (
        grad(lambda *inputs, p=p: sum(g.square().sum() for g in p.per_member(*inputs)), argnums=p.all)(
            *p.members(p.rows)
        )
        for p in (Problem(layer, case) for layer in (ops.layer, reference.layer))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_third_derivatives(name):
    case = make_case(name, 3, 2, 3, 2, lengths=True)
    found, expected = (of_third(Problem(layer, case)) for layer in (ops.layer, reference.layer))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "P"), VARIANTS)
def test_gradcheck_in_every_mode(name, P):
    function, inputs = make_stack(name, P, 2, 1, ROWS["lengths+resets"])
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


def test_gradgradcheck_with_batched_gradients():
    function, inputs = make_stack("gru", None, 1, 1, ROWS["lengths"])
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", ["jvp", "backward of backward", "vmap of grad"])
def test_other_dtypes(transform, dtype):
    """A few roundings of the dtype: what lies between is kept in float32 at least. Wrong formulas are off by 0.1."""
    case = make_case("lstm", 4, 3, 5, 4, D=2, lengths=True, dtype=dtype)
    found = TRANSFORMS[transform](Problem(ops.layer, case))
    expected = TRANSFORMS[transform](Problem(reference.layer, case.to(torch.float64)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


class Calls(TorchDispatchMode):
    """The arguments of each call of an op of a layer, by its name."""

    def __init__(self):
        super().__init__()
        self.of = {"layer_forward": [], "layer_backward": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastrnn":
            self.of[function.name().split("::")[1]].append(args)
        return function(*args, **(kwargs or {}))


def test_members_share_one_call():
    case = make_case("gru", 4, 3, 5, 4)
    p = Problem(ops.layer, case)
    with Calls() as calls:
        p.per_member(*p.members(p.rows))
    (forward,), (_,) = calls.of.values()
    assert forward[0].shape == (4, MEMBERS * 3, 5)


def test_vmap_alone_keeps_nothing_for_backward():
    p = Problem(ops.layer, make_case("gru", 4, 3, 5, 4))
    with Calls() as calls:
        vmap(p.outputs, in_dims=p.rows)(*p.members(p.rows))
        grad(p.loss)(*p.inputs)
        inputs = [t.clone().requires_grad_() for t in p.members(p.rows)]
        vmap(p.outputs, in_dims=p.rows)(*inputs)[0].sum().backward()
    assert [arguments[9] for arguments in calls.of["layer_forward"]] == [False, True, True]
    assert all(t.grad is not None for t in inputs)


def test_lengths_and_resets_of_each_member():
    case = make_case("lstm", 6, 3, 5, 4, lengths=True, resets=True)
    lengths = torch.stack([case.lengths, case.lengths.flip(0)])
    resets = torch.stack([case.resets, ~case.resets], dim=1)
    for in_dims in ((0, 1), (0, None), (None, 1)):
        given = lengths if in_dims[0] == 0 else case.lengths, resets if in_dims[1] == 1 else case.resets

        def run(lengths, resets, layer):
            case.lengths, case.resets = lengths, resets
            return case.run(layer)

        found, expected = (
            vmap(lambda n, marks, layer=layer: run(n, marks, layer), in_dims=in_dims)(*given)
            for layer in (ops.layer, reference.layer)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_masks_have_no_derivatives():
    """An error, not zeros; their own members they have."""
    case = make_case(OWN[2].name, 4, 3, 5, 4)

    def run(masks):
        return ops.layer(case.cell, *case.tensors[:3], [Weights(*case.tensors[3:9])], masks=masks)[0]

    for transform in (
        lambda: jvp(run, (case.masks,), (case.masks,)),
        lambda: grad(lambda masks: run(masks).sum())(case.masks),
        lambda: run(case.masks.clone().requires_grad_()).sum().backward(),
    ):
        with pytest.raises(ValueError, match="masks: expected tensors without gradients and tangents"):
            transform()
    two = torch.stack([case.masks, 1 - case.masks])
    torch.testing.assert_close(vmap(run)(two), torch.stack([run(masks) for masks in two]), rtol=1e-12, atol=1e-12)


def test_numbers_of_finished_rows_reach_nothing():
    """NaN behind the end of a row, in products over all steps at once."""
    case = make_case("gru", 4, 2, 3, 4)
    case.lengths = torch.tensor([2, 4])
    clean = case.tensors[0]
    dirty = clean.clone()
    dirty[2:, 0] = torch.nan
    for apply in (TRANSFORMS["vmap of grad"], TRANSFORMS["backward of backward"], TRANSFORMS["jvp of grad"]):
        case.tensors[0] = clean
        expected = apply(Problem(ops.layer, case))
        case.tensors[0] = dirty
        for a, b in zip(apply(Problem(ops.layer, case)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
