"""Gradients of a layer's parameters by row, as clipping and noise for differential privacy need them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastrnn import autograd, layers
from fastrnn.members import MemberGradients
from fastrnn.read import read_of
from fastrnn.reference import products_of
from fastrnn.signatures import Given

Makers: TypeAlias = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # of a gradient, and of its norms

_NAMES = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}


def per_sample_gradients(
    layer: torch.nn.Module, input: Tensor, grad_output: Tensor, hx: Given = None, **options: Any
) -> dict[str, Tensor]:
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


def per_sample_norms(
    layer: torch.nn.Module, input: Tensor, grad_output: Tensor, hx: Given = None, **options: Any
) -> dict[str, Tensor]:
    """The 2-norms `[B]` of `per_sample_gradients`, by the parameter's name; arguments and errors are the same.

    Where it costs less than the gradients, they come of Gram matrices (Goodfellow 2015; Li et al. 2022, "ghost norms"):
    the squared norm of a^T b is the sum of (a a^T) * (b b^T).
    """
    return {name: made() for name, (_, made) in _by_name(layer, input, grad_output, hx, **options).items()}


def _by_name(layer: Any, input: Tensor, grad_output: Tensor, hx: Given, **options: Any) -> dict[str, Makers]:
    """By the parameter's name functions that give its gradients, and their norms."""
    _check(layer, input, grad_output)
    unknown = options.keys() - {"lengths", "resets", "grad_state"}
    if unknown:
        raise TypeError(f"{min(unknown)}: expected an argument among lengths, resets, grad_state")
    lengths, resets, grad_state = map(options.get, ("lengths", "resets", "grad_state"))
    with torch.enable_grad(), autograd.recorded() as calls:
        output, state = layer._call(input.detach(), hx, lengths, resets)
    states = state if isinstance(state, tuple) else (state,)
    grad_states = tuple(grad_state) if isinstance(grad_state, tuple | list) else (grad_state,)
    if grad_state is not None and len(grad_states) != len(states):
        raise ValueError(f"grad_state: expected {len(states)} tensors, got {len(grad_states)}")
    outputs = [output, *(states if grad_state is not None else ())]
    grads = [grad_output, *(grad_states if grad_state is not None else ())]
    for name, grad, out in zip(("grad_output", *["grad_state"] * len(states)), grads, outputs, strict=False):
        if not isinstance(grad, Tensor) or (grad.shape, grad.dtype) != (out.shape, out.dtype):
            given = f"{tuple(grad.shape)} of {grad.dtype}" if isinstance(grad, Tensor) else type(grad).__name__
            raise ValueError(f"{name}: expected shape {tuple(out.shape)} of {out.dtype}, got {given}")
    inputs: list[Any] = [call.read.steps for call in calls]
    steps = torch.autograd.grad(outputs, inputs, grads)
    found: dict[str, Makers] = {}
    for index, (call, of_steps) in enumerate(zip(calls, steps, strict=True)):
        members, by_name = of_call(layer, index, call)
        members.steps = of_steps
        found |= by_name
    return found


def of_call(layer: Any, index: int, call: autograd.Recorded) -> tuple[MemberGradients, dict[str, Makers]]:
    """Of layer `index`: what its gradients by row are made of, but for `steps`, which come with the backward pass; and
    by the parameter's name functions that make of them its gradients, and their norms."""
    y, _, _, of_states = (out.detach() for out in call.outputs)
    read = read_of(None if t is None else t.detach() for t in call.read.flat())
    read = read._replace(steps=None)  # zeros, and whose hook may hold what is made here
    later: Any = None  # the steps
    members = MemberGradients(call.how, read, y, of_states, later, read.x.shape[1])
    D, suffixes = call.how.directions, suffixes_of(layer)
    found: dict[str, Makers] = {}
    for d, name in members.names():
        found |= _of_weight(layer, members, d, name, suffixes[index * D + d])
    return members, found


def _check(layer: Any, input: Tensor, grad_output: Tensor) -> None:
    if not isinstance(layer, layers.Layers) or not hasattr(layer, "_suffixes"):
        raise TypeError(f"layer: expected an LSTM, GRU, RNN or Recurrent of fastrnn, got {type(layer).__name__}")
    if not isinstance(input, Tensor) or input.dim() != 3:
        given = f"{input.dim()}" if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"input: expected a tensor of 3 dimensions, got {given}")
    if autograd.is_transformed(input, grad_output):
        raise NotImplementedError("per-sample gradients: expected a call outside of torch.func's transforms")
    if input.is_inference():
        raise ValueError("input: expected a tensor that was not made in inference mode")
    if layer.training and layer.dropout and layer.num_layers > 1:
        raise ValueError("layer: expected no dropout between layers, which another pass draws anew")
    check_kind(layer)


def check_kind(layer: Any) -> None:
    """Raises ValueError or NotImplementedError for a layer that has no gradients by row."""
    computed = _computed(layer)
    if computed:
        raise ValueError(f"layer: expected weights that are parameters, got {computed[0]}, which is computed")
    if layer.weights:
        raise ValueError(f"layer: expected one without weights={layer.weights!r}, which is for inference")
    if layer.proj_size:
        raise NotImplementedError("layer: expected one without proj_size, got a projection")


def suffixes_of(layer: Any) -> list[str]:
    """Of the names of the parameters of each direction of each layer."""
    return [suffix if isinstance(suffix, str) else suffix[1] for suffix in layer._suffixes()]


def _computed(layer: Any) -> list[str]:
    """The weights that are no parameters themselves."""
    names = [f"{kind}{suffix}" for suffix in suffixes_of(layer) for kind in _NAMES.values()]
    for suffix in suffixes_of(layer):
        is_fixed = not hasattr(layer, "cell") and hasattr(layer, f"leak{suffix}")  # a leak may be a number
        names += [] if is_fixed else _own_rows(layer, suffix)
    return [name for name in names if name not in layer._parameters and getattr(layer, name, None) is not None]


def _of_weight(layer: Any, members: MemberGradients, d: int, name: str, suffix: str) -> dict[str, Makers]:
    if name in _NAMES:
        return {_NAMES[name] + suffix: (lambda: members.gradient(d, name), lambda: members.norm(d, name))}
    rows = _own_rows(layer, suffix)

    def gradient(key: str) -> Tensor:
        found: Tensor = members.gradient(d, name).unflatten(1, (-1, layer.hidden_size))[:, rows[key]]
        return found.reshape(-1, *layer._parameters[key].shape)

    def norms(key: str) -> Tensor:
        found: Tensor = gradient(key).flatten(1).norm(dim=1)
        return found

    return {
        key: (functools.partial(gradient, key), functools.partial(norms, key))
        for key in rows
        if key in layer._parameters  # a leak that is fixed is none
    }


def _own_rows(layer: Any, suffix: str) -> dict[str, int | slice]:
    """The parameters that `w_own` is made of, and which of its rows they are."""
    if not hasattr(layer, "cell"):
        return {f"leak{suffix}": 0} if hasattr(layer, f"leak{suffix}") else {f"peephole{suffix}": slice(None)}
    units = layer.cell.unit_weights
    rows: dict[str, int | slice] = {f"{unit}{suffix}": i for i, unit in enumerate(units)}
    if layer.cell.normalized:
        with_input, recurrent, _ = products_of(layer.cell)
        between = len(units) + len(with_input)
        rows[f"gain_ih{suffix}"] = slice(len(units), between)
        rows[f"gain_hh{suffix}"] = slice(between, between + len(recurrent))
    return rows
