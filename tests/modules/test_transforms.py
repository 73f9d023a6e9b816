"""torch.func's transforms of whole modules, against torch.nn's, which are made of operations that have rules."""

import copy
from itertools import product

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves
from twins import CELLS, LAYERS, arguments, assert_same, twins

import fastrnn


def loss_of(module):
    def loss(parameters, *args):
        return sum(output.square().sum() for output in tree_leaves(functional_call(module, parameters, args)))

    return loss


def first_output(module):
    return lambda x, *others: tree_leaves(module(x, *others))[0]


def batched(values, members=3):
    """`members` of each, with other numbers."""
    return torch.utils._pytree.tree_map(lambda t: torch.stack([t.detach() * (1 + i) for i in range(members)]), values)


def per_sample(module, args):
    return vmap(grad(loss_of(module)), in_dims=(None, 0, 0))(dict(module.named_parameters()), *batched(args))


def forward_mode(module, args):
    x = args[0].detach()
    with torch.autograd.forward_ad.dual_level():
        output = first_output(module)(torch.autograd.forward_ad.make_dual(x, x.sin()))
        return torch.autograd.forward_ad.unpack_dual(output).tangent


def batched_gradient(module, args):
    x = args[0]
    y = first_output(module)(x)
    return torch.autograd.grad(y, [x, *module.parameters()], torch.stack([y, y.cos()]).detach(), is_grads_batched=True)


def gradient_penalty(module, args):
    x = args[0]
    (of_x,) = torch.autograd.grad(first_output(module)(x).sum(), x, create_graph=True)
    return torch.autograd.grad((of_x.norm() - 1).square(), [x, *module.parameters()], materialize_grads=True)


USES = {
    "gradients of a call with parameters": lambda m, a: grad(loss_of(m))(dict(m.named_parameters()), *a),
    "per-sample gradients": per_sample,
    "jvp": lambda m, a: jvp(first_output(m), (a[0],), (a[0].sin(),)),
    "jacrev": lambda m, a: jacrev(lambda x: first_output(m)(x).sum(-1))(a[0]),
    "jacfwd": lambda m, a: jacfwd(lambda x: first_output(m)(x).sum(-1))(a[0]),
    "hessian": lambda m, a: hessian(lambda x: first_output(m)(x).sum())(a[0]),
    "forward mode": forward_mode,
    "batched gradients": batched_gradient,
    "vectorized jacobian": lambda m, a: torch.autograd.functional.jacobian(first_output(m), a[0], vectorize=True),
    "gradient penalty": gradient_penalty,
    "hessian-vector product": lambda m, a: torch.autograd.functional.hvp(
        lambda x: first_output(m)(x).square().sum(), a[0], a[0].cos()
    ),
}


@pytest.mark.parametrize("case", LAYERS | CELLS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_as_torch_nn(case, use):
    options = {"num_layers": 2, "bidirectional": True} if case in LAYERS else {}
    ours, theirs = twins(case, 5, 4, **options)
    args = arguments(ours)
    assert_same(*(tree_leaves(use(module, args)) for module in (ours, theirs)))


@pytest.mark.parametrize("case", LAYERS | CELLS)
def test_ensemble(case):
    """Members with weights of their own; those of torch.nn one by one, since its layers have no rule for them."""
    ours, theirs = twins(case, 5, 4)
    args, members = arguments(ours), ([ours], [theirs])
    for i, group in product((2, 3), members):
        member = copy.deepcopy(group[0])
        member.load_state_dict({name: tensor * i for name, tensor in group[0].state_dict().items()})
        group.append(member)
    found = vmap(lambda *state: functional_call(ours, state, args))(*stack_module_state(members[0]))
    expected = [tree_leaves(member(*args)) for member in members[1]]
    assert_same(tree_leaves(found), [torch.stack(column) for column in zip(*expected, strict=True)])


@pytest.mark.parametrize("case", LAYERS | CELLS)
def test_training_of_an_ensemble(case):
    """Gradients by `backward()` outside of vmap, of what requires them inside of it alone."""
    ours, theirs = twins(case, 5, 4)
    args = arguments(ours)
    parameters = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in ours.named_parameters()}
    parameters = {name: p.requires_grad_() for name, p in parameters.items()}
    plain = tuple(torch.utils._pytree.tree_map(torch.Tensor.detach, args))
    outputs = vmap(lambda p: functional_call(ours, p, plain))(parameters)
    sum(output.sin().sum() for output in tree_leaves(outputs)).backward()
    for i in range(2):
        for name, p in theirs.named_parameters():
            p.data.copy_(parameters[name][i])
        theirs.zero_grad()
        sum(output.sin().sum() for output in tree_leaves(theirs(*plain))).backward()
        assert_same([p.grad[i] for p in parameters.values()], [p.grad for p in theirs.parameters()])


def test_no_members():
    with pytest.raises(ValueError, match="vmap: expected members to map over, got a dimension of size 0"):
        vmap(fastrnn.GRU(5, 4))(torch.randn(0, 6, 2, 5))


def test_batch_first_lengths_and_resets_of_each_member():
    lstm = fastrnn.LSTM(5, 4, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    lengths, resets = torch.randint(0, 7, (3, 2)), torch.rand(3, 2, 6) < 0.3
    found = vmap(lambda x, n, marks: lstm(x, lengths=n, resets=marks))(x, lengths, resets)
    expected = [lstm(x[i], lengths=lengths[i], resets=resets[i]) for i in range(3)]
    assert_same(tree_leaves(found), [torch.stack(column) for column in zip(*map(tree_leaves, expected), strict=True)])


def test_unbatched_calls_of_each_member():
    gru = fastrnn.GRU(5, 4, dtype=torch.float64)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    output, state = gru(x.transpose(0, 1))
    assert_same(tree_leaves(vmap(gru)(x)), [output.transpose(0, 1), state.transpose(0, 1)])


def test_dropout_takes_vmap_s_randomness():
    gru = fastrnn.GRU(5, 4, num_layers=2, dropout=0.5)
    x = torch.randn(6, 2, 5)
    twice = torch.stack([x, x])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(gru)(twice)
    for randomness, is_same in (("same", True), ("different", False)):
        a, b = vmap(gru, randomness=randomness)(twice)[0]
        assert torch.equal(a, b) == is_same


def test_rounded_weights_are_refused():
    gru = fastrnn.GRU(5, 4, weights="int8").requires_grad_(False)
    with pytest.raises(
        NotImplementedError, match=r"weights='int8': expected a call outside of torch\.func's transforms"
    ):
        vmap(gru)(torch.randn(3, 6, 2, 5))


def test_other_modules():
    """Those that are composed of layers."""
    x = torch.randn(12, 2, 5, dtype=torch.float64)
    for module in (
        fastrnn.Stack(fastrnn.GRU(5, 4), fastrnn.LSTM(4, 4), residual=True),
        fastrnn.Skip(fastrnn.GRU(5 + 4, 4), steps=3),
        fastrnn.Dilated(fastrnn.LSTM(5, 4), steps=3),
        fastrnn.LMU(5, 4, 6, 8),
        fastrnn.DiagonalSSM(5, 4),
        fastrnn.LegendreMemory(6, 8),
        fastrnn.Recurrent("slstm", 5, 4),
    ):
        module.double()
        given = x[:, :, :1] if isinstance(module, fastrnn.LegendreMemory) else x
        direction = given.cos()

        def run(x, module=module):
            return first_output(module)(x)

        tangent = jvp(run, (given,), (direction,))[1]
        step = 1e-6
        numeric = (run(given + step * direction) - run(given - step * direction)) / (2 * step)
        torch.testing.assert_close(tangent, numeric, rtol=0, atol=1e-8)
        two = torch.stack([given, given.sin()])
        torch.testing.assert_close(vmap(run)(two), torch.stack([run(part) for part in two]), rtol=1e-11, atol=1e-12)
