"""Parameters that users share, replace, compute or change: gradients and outputs are torch.nn's."""

import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves
from twins import CELLS, LAYERS, arguments, assert_same, make, noise, results, twins

import fastrnn

each_case = pytest.mark.parametrize("case", LAYERS | CELLS)


def recurrent_weight(case):
    return "weight_hh" if case in CELLS else "weight_hh_l0"


# ---- shared


@pytest.mark.parametrize("case", LAYERS)
def test_one_parameter_in_two_layers(case):
    """Its gradient is the sum over both places."""
    ours, theirs = twins(case, 5, 7, num_layers=2)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.bias_hh_l0 = module.bias_ih_l0
    x = noise(4, 2, 5)
    found = results(ours, x)
    assert_same(found, results(theirs, x))
    assert "gradient of weight_hh_l1" not in found
    assert "gradient of bias_hh_l0" not in found


@pytest.mark.parametrize("case", ["RNN-tanh", "RNN-relu", "LSTM", "GRU"])
def test_one_parameter_as_both_weights(case):
    """With I = H the input and recurrent weights of both directions may be one tensor."""
    ours, theirs = twins(case, 7, 7, bidirectional=True)
    for module in (ours, theirs):
        module.weight_hh_l0 = module.weight_ih_l0_reverse = module.weight_hh_l0_reverse = module.weight_ih_l0
    assert_same(results(ours, x := noise(4, 2, 7)), results(theirs, x))


@pytest.mark.parametrize("case", LAYERS)
def test_one_module_called_twice(case):
    """Stacked by hand on its own output."""
    size = 3 if case == "LSTM-projected" else 7
    ours, theirs = twins(case, size, 7)
    x = noise(4, 2, size)
    outputs = [torch.autograd.grad(m(m(x)[0])[0].sum(), [x, *m.parameters()]) for m in (ours, theirs)]
    assert_same(*outputs)


# ---- computed


def with_weight_norm_hook(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, still widely used
        return torch.nn.utils.weight_norm(module, name)


COMPUTED = {
    "weight_norm-hook": (with_weight_norm_hook, ("weight_hh{}_g", "weight_hh{}_v")),
    "weight_norm": (
        parametrizations.weight_norm,
        ("parametrizations.weight_hh{}.original0", "parametrizations.weight_hh{}.original1"),
    ),
    "spectral_norm": (parametrizations.spectral_norm, ("parametrizations.weight_hh{}.original",)),
    "pruned": (lambda module, name: prune.l1_unstructured(module, name, 0.5), ("weight_hh{}_orig",)),
}


@each_case
@pytest.mark.parametrize(("compute", "sources"), COMPUTED.values(), ids=COMPUTED)
def test_computed_weight(case, compute, sources):
    """Gradients reach what the weight is computed from, and a step on it is seen by the next call."""
    ours, theirs = twins(case, 5, 7)
    args = arguments(ours)
    for module in (ours, theirs):
        torch.manual_seed(2)
        compute(
            module, recurrent_weight(case)
        ).eval()  # spectral_norm draws, and in training changes, a vector of its own
    for _ in range(2):
        found, expected = results(ours, *args), results(theirs, *args)
        assert_same(found, expected)
        for source in sources:
            name = source.format("" if case in CELLS else "_l0")
            assert found[f"gradient of {name}"].any()
            for module in (ours, theirs):
                with torch.no_grad():
                    module.get_parameter(name).mul_(1.5)


# ---- replaced


@each_case
def test_deleted_and_assigned_again(case):
    ours, theirs = twins(case, 5, 7)
    name, args = recurrent_weight(case), arguments(ours)
    value = torch.randn_like(getattr(ours, name))
    for module in (ours, theirs):
        delattr(module, name)
        setattr(module, name, torch.nn.Parameter(value.clone()))
    found = results(ours, *args)
    assert_same(found, results(theirs, *args))
    assert f"gradient of {name}" in found


@each_case
def test_plain_tensor_as_weight(case):
    """A weight that another network has put out: its gradient goes on into that network."""
    ours, theirs = twins(case, 5, 7)
    name, args = recurrent_weight(case), arguments(ours)
    source = noise(*getattr(ours, name).shape)
    grads = []
    for module in (ours, theirs):
        delattr(module, name)
        setattr(module, name, source.tanh())
        output = tree_leaves(module(*args))[0]
        grads.append(torch.autograd.grad(output.square().sum(), source)[0])
    assert_same(*grads)


@each_case
def test_functional_call(case):
    """Other weights for one call: gradients go to them, and the module's own stay as they were."""
    ours, theirs = twins(case, 5, 7)
    args = arguments(ours)
    own = results(ours, *args)
    others = {name: noise(*weight.shape) for name, weight in ours.named_parameters()}
    found = []
    for module in (ours, theirs):
        output = tree_leaves(torch.func.functional_call(module, others, args))[0]
        found.append((output, torch.autograd.grad(output.square().sum(), list(others.values()))))
    assert_same(*found)
    assert_same(results(ours, *args), own)


@each_case
def test_data_replaced(case):
    """`parameter.data = other` is seen by the next call."""
    ours, theirs = twins(case, 5, 7)
    args = arguments(ours)
    results(ours, *args)
    for weight, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        weight.data = torch.randn_like(weight)
        expected.data = weight.data.clone()
    assert_same(results(ours, *args), results(theirs, *args))


# ---- trained


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
@each_case
def test_training_steps(case, optimizer):
    """Five steps of an optimiser, which writes the weights in place, end at the same weights."""
    ours, theirs = twins(case, 5, 7)
    args = arguments(ours)
    for module in (ours, theirs):
        steps = optimizer(module.parameters(), lr=0.1)
        for _ in range(5):
            steps.zero_grad()
            tree_leaves(module(*args))[0].square().sum().backward()
            steps.step()
    # Adam divides by the root of a squared gradient, which makes rounding errors of small gradients larger.
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-8, atol=1e-9)
    assert not torch.equal(
        ours.state_dict()[recurrent_weight(case)], make(fastrnn, case, 5, 7).state_dict()[recurrent_weight(case)]
    )


@each_case
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_frozen_parameters(case, frozen):
    """A parameter that asks for no gradient gets none, and the others' stay what they are."""
    ours, theirs = twins(case, 5, 7)
    args = arguments(ours)
    name = frozen if case in CELLS else f"{frozen}_l0"
    for module in (ours, theirs):
        module.get_parameter(name).requires_grad_(False)
    found = results(ours, *args)
    assert_same(found, results(theirs, *args))
    assert f"gradient of {name}" not in found


@pytest.mark.parametrize("case", LAYERS)
def test_one_frozen_direction(case):
    ours, theirs = twins(case, 5, 7, bidirectional=True)
    for module in (ours, theirs):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("reverse" not in name)
    for x in (noise(4, 2, 5), torch.randn(4, 2, 5, dtype=torch.float64)):
        assert_same(results(ours, x), results(theirs, x))
