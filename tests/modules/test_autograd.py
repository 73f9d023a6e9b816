"""What a user does around backward: parts of the outputs, several backwards, no gradient at all, changed tensors."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from twins import CELLS, LAYERS, arguments, assert_same, initial_state, noise, results, twins

each_layer = pytest.mark.parametrize("case", LAYERS)
each_case = pytest.mark.parametrize("case", LAYERS | CELLS)


PARTS = [(case, part) for case in LAYERS for part in ("y", "h_n", "c_n") if part != "c_n" or "LSTM" in case]


@pytest.mark.parametrize(("case", "part"), PARTS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
def test_loss_of_one_output(case, part, bidirectional):
    """y, h_n or c_n alone; what the loss does not use adds nothing."""
    ours, theirs = twins(case, 5, 7, num_layers=2, bidirectional=bidirectional)
    x, hx = noise(4, 2, 5), initial_state(ours, 2)
    grads = []
    for module in (ours, theirs):
        outputs = dict(zip(("y", "h_n", "c_n"), tree_leaves(module(x, hx)), strict=False))
        loss = outputs[part].square().sum()
        grads.append(torch.autograd.grad(loss, [x, *tree_leaves(hx), *module.parameters()], allow_unused=True))
    assert_same(*grads)


@pytest.mark.parametrize("case", ["LSTM", "LSTM-projected", "LSTMCell"])
@pytest.mark.parametrize("asks", [(True, False), (False, True)], ids=["h0", "c0"])
def test_gradient_of_one_state(case, asks):
    """Only h_0, or only c_0, asks for a gradient."""
    ours, theirs = twins(case, 5, 7)
    x, hx = arguments(ours)
    hx = tuple(state.detach().requires_grad_(ask) for state, ask in zip(hx, asks, strict=True))
    assert_same(results(ours, x, hx), results(theirs, x, hx))


@each_layer
def test_only_the_state_asks(case):
    """Neither input nor parameters ask for a gradient, as when an initial state is learned."""
    ours, theirs = twins(case, 5, 7)
    args = (torch.randn(4, 2, 5, dtype=torch.float64), initial_state(ours, 2))
    for module in (ours, theirs):
        module.requires_grad_(False)
    found = results(ours, *args)
    assert_same(found, results(theirs, *args))
    assert "gradient of argument 1" in found


@each_layer
def test_state_carried_over(case):
    """Truncated backpropagation: the final state starts the next piece, detached or not."""
    ours, theirs = twins(case, 5, 7)
    x = noise(6, 2, 5)
    found = []
    for module in (ours, theirs):
        first, state = module(x[:2])
        second, state = module(x[2:4], state)
        detached = state.detach() if isinstance(state, torch.Tensor) else tuple(s.detach() for s in state)
        third, state = module(x[4:], detached)
        loss = sum(t.square().sum() for t in (first, second, third, *tree_leaves(state)))
        found.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    assert_same(*found)


@each_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, mode):
    ours, theirs = twins(case, 5, 7)
    args = arguments(ours)
    with mode():
        outputs = tree_leaves(ours(*args))
        assert_same(outputs, tree_leaves(theirs(*args)))
    assert not any(output.requires_grad for output in outputs)
    assert all(output.is_inference() == (mode is torch.inference_mode) for output in outputs)


@each_case
def test_backward_twice(case):
    """With `retain_graph` gradients add up; without, torch's error says what happened."""
    ours, _ = twins(case, 5, 7)
    args = arguments(ours)
    leaves = [*tree_leaves(args), *ours.parameters()]
    loss = tree_leaves(ours(*args))[0].square().sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    assert_same([leaf.grad for leaf in leaves], [2 * grad for grad in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@each_case
@pytest.mark.parametrize("changed", ["input", "weight_ih", "weight_hh"])
def test_changed_between_forward_and_backward(case, changed):
    """Writing in place to what backward reads is torch's version error, not a wrong gradient."""
    ours, _ = twins(case, 5, 7)
    x, hx = arguments(ours)
    output = tree_leaves(ours(x, hx))[0]
    with torch.no_grad():
        (x if changed == "input" else ours.get_parameter(changed if case in CELLS else f"{changed}_l0")).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_layer
@pytest.mark.parametrize("changed", ["output", "lengths", "resets", "hx"])
def test_other_tensors_changed_between(case, changed):
    ours, _ = twins(case, 5, 7)
    tensors = {"lengths": torch.tensor([4, 2]), "resets": torch.zeros(4, 2, dtype=torch.bool)}
    hx = initial_state(ours, 2)
    output, _ = ours(noise(4, 2, 5), hx, **tensors)
    with torch.no_grad():
        (tensors | {"output": output, "hx": tree_leaves(hx)[0]})[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_layer
def test_in_place_step_on_a_copy_of_the_output(case):
    """Backward reads the output, so an in-place step needs a copy of it; then gradients are right."""
    ours, theirs = twins(case, 5, 7)
    x = noise(4, 2, 5)
    found = [torch.autograd.grad(module(x)[0].clone().relu_().sum(), x)[0] for module in (ours, theirs)]
    assert_same(*found)


@each_layer
def test_backward_into_named_inputs(case):
    """`backward(inputs=...)` fills only what is named."""
    ours, theirs = twins(case, 5, 7)
    x = noise(4, 2, 5)
    for module in (ours, theirs):
        module(x)[0].sum().backward(inputs=[module.bias_hh_l0])
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert x.grad is None


@each_layer
def test_hooks_see_each_call(case):
    """Forward and full backward hooks get what torch.nn's get."""
    ours, theirs = twins(case, 5, 7)
    x, seen = noise(4, 2, 5), {ours: [], theirs: []}
    for module, log in seen.items():
        module.register_forward_hook(lambda _, args, out, log=log: log.extend(tree_leaves((args, out))))
        module.register_full_backward_hook(
            lambda _, inputs, outputs, log=log: log.extend(tree_leaves((inputs, outputs)))
        )
        module(x)[0].square().sum().backward()
    assert_same(seen[ours], seen[theirs])


@each_case
def test_requires_grad_of_outputs(case):
    """An output asks for a gradient if the input, the state or a parameter does."""
    ours, _ = twins(case, 5, 7)
    x, hx = arguments(ours)
    detached = tuple(t.detach() for t in hx) if isinstance(hx, tuple) else hx.detach()
    assert all(t.requires_grad for t in tree_leaves(ours(x.detach(), detached)))
    ours.requires_grad_(False)
    assert all(t.requires_grad for t in tree_leaves(ours(x, detached)))
    assert all(t.requires_grad for t in tree_leaves(ours(x.detach(), hx)))
    assert not any(t.requires_grad for t in tree_leaves(ours(x.detach(), detached)))
