"""Gradients of a layer's parameters by row, as clipping and noise for differential privacy need them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import autograd, layers
from fastrnn.members import MemberGradients


def per_sample_gradients(layer: torch.nn.Module, input: Tensor, grad_output: Tensor, hx=None, **options) -> dict:
    """The gradients of a layer's parameters for each row: one forward and one backward pass over all rows, then one
    product of gate gradients with inputs and states for each weight.

    Args:
        layer: an `LSTM`, `GRU`, `RNN`, `Recurrent` or layer of a paper, not training or without dropout between layers.
        input, hx, lengths, resets: as of the layer's call; batched.
        grad_output: dL/d(output), as the layer's output.
        grad_state: dL/d(final states), in their form; zeros if None.

    Returns:
        By the parameter's name `[B, ...]`, the sum over which is the gradient.

    Raises:
        TypeError, ValueError: an argument is wrong, or the layer's weights are computed of other parameters.
        NotImplementedError: the layer has a projection.
    """
    return {name: made() for name, (made, _) in _by_name(layer, input, grad_output, hx, **options).items()}


def per_sample_norms(layer: torch.nn.Module, input: Tensor, grad_output: Tensor, hx=None, **options) -> dict:
    """The 2-norms `[B]` of `per_sample_gradients`, by the parameter's name; arguments and errors are the same.

    Where it costs less than the gradients, they come of Gram matrices (Goodfellow 2015; Li et al. 2022, "ghost norms"):
    the squared norm of a^T b is the sum of (a a^T) * (b b^T).
    """
    return {name: made() for name, (_, made) in _by_name(layer, input, grad_output, hx, **options).items()}


def _by_name(layer, input, grad_output, hx, *, lengths=None, resets=None, grad_state=None) -> dict:
    """By the parameter's name functions that give its gradients, and their norms."""
    _check(layer, input)
    with torch.enable_grad(), autograd.recorded() as calls:
        output, state = layer._call(input.detach(), hx, lengths, resets)
    states, grad_states = (value if isinstance(value, tuple) else (value,) for value in (state, grad_state))
    outputs = [output, *(states if grad_state is not None else ())]
    grads = [grad_output, *(grad_states if grad_state is not None else ())]
    for name, grad, out in zip(("grad_output", *["grad_state"] * len(states)), grads, outputs, strict=False):
        if not isinstance(grad, Tensor) or grad.shape != out.shape:
            given = tuple(grad.shape) if isinstance(grad, Tensor) else type(grad).__name__
            raise ValueError(f"{name}: expected shape {tuple(out.shape)}, got {given}")
    steps = torch.autograd.grad(outputs, [call.read.steps for call in calls], grads)
    D, suffixes = 2 if layer.bidirectional else 1, [s if isinstance(s, str) else s[1] for s in layer._suffixes()]
    found = {}
    for index, (call, of_steps) in enumerate(zip(calls, steps, strict=True)):
        y, _, _, of_states = (out.detach() for out in call.outputs)
        read = call.read._replace(weights=[w.detach() for w in call.read.weights])
        members = MemberGradients(call.how, read, y, of_states, of_steps, input.shape[0 if layer.batch_first else 1])
        for d, name in members.names():
            found |= _of_weight(layer, members, d, name, suffixes[index * D + d])
    return found


def _check(layer, input) -> None:
    if not isinstance(layer, layers.Layers) or not hasattr(layer, "_suffixes"):
        raise TypeError(f"layer: expected an LSTM, GRU, RNN or Recurrent of fastrnn, got {type(layer).__name__}")
    if not isinstance(input, Tensor) or input.dim() != 3:
        raise ValueError(f"input: expected a tensor of 3 dimensions, got {type(input).__name__}")
    if layer.training and layer.dropout and layer.num_layers > 1:
        raise ValueError("layer: expected no dropout between layers, which another pass draws anew")
    if layer.weights:
        raise ValueError(f"layer: expected one without weights={layer.weights!r}, which is for inference")
    if layer.proj_size:
        raise NotImplementedError("layer: expected one without proj_size, got a projection")


_NAMES = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}


def _of_weight(layer, members: MemberGradients, d: int, name: str, suffix: str) -> dict:
    if name in _NAMES:
        return {_NAMES[name] + suffix: (lambda: members.gradient(d, name), lambda: members.norm(d, name))}
    own = layer.cell.unit_weights if hasattr(layer, "cell") else None
    rows = {f"{unit}{suffix}": i for i, unit in enumerate(own)} if own else {f"peephole{suffix}": slice(None)}
    if f"leak{suffix}" in dict(layer.named_parameters()):
        rows = {f"leak{suffix}": 0}

    def gradient(which):
        return members.gradient(d, name).unflatten(1, (-1, layer.hidden_size))[:, which]

    names = dict(layer.named_parameters())
    return {
        key: (lambda which=which: gradient(which), lambda which=which: gradient(which).flatten(1).norm(dim=1))
        for key, which in rows.items()
        if key in names
    }
