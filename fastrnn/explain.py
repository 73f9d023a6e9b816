"""`explain`: which way a call would go, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import modules, ops
from fastrnn.cells import CELLS
from fastrnn.convert import label, left, path
from fastrnn.layers import Layers
from fastrnn.recurrent import RecurrentCell
from fastrnn.reference import sizes
from fastrnn.regularized import Regularized
from fastrnn.signatures import Function, Input

_OURS = modules._Replacement, Layers, RecurrentCell


def explain(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> str:
    """Tells how the recurrent layers and cells of a model would be computed: by which kernels, and for what reason.

    The text is for people; it may change between versions. With gradients enabled for a layer or its input, the
    backward pass is told as well. Layers that are not of fastrnn are named, with what to do about it.

    Args:
        model: a layer or cell of fastrnn, of which nothing is computed, or any other module, which is called once, with
            hooks on its recurrent modules.
        args, kwargs: what it would be called with.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`, or a layer's input is missing.
        NotImplementedError: there are no kernels for the device of the input.
    """
    if isinstance(model, _OURS):
        return _explain_layer(model, *args[:1], **kwargs)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    texts: dict[str, list[str]] = {}
    handles = []
    within = {module.layer for module in model.modules() if isinstance(module, Regularized)}  # told with it
    for name, module in model.named_modules():
        why = left(module)
        if module in within:
            continue
        if isinstance(module, _OURS):
            texts[name] = []
            handles.append(module.register_forward_pre_hook(_hook(texts[name]), with_kwargs=True))
        elif why:
            texts[name] = [f"{path(type(module))}, not of fastrnn: {why}"]
    try:
        if handles:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    lines = [
        (name, line) for name, found in texts.items() for text in found or ["not called"] for line in text.split("\n")
    ]
    return "\n".join(f"{label(name)}: {line}" for name, line in lines) or "no recurrent modules"


def _hook(texts: list[str]) -> Function:
    """Notes what is told of each call, once."""

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = kwargs.get("input", args[0] if args else None)
        text = "called with its own arguments: unknown"
        if isinstance(input, Tensor | PackedSequence):
            text = _explain_layer(module, input)
        if text not in texts:
            texts.append(text)

    return note


def _explain_layer(module: Any, input: Input, **others: Any) -> str:
    is_cell = isinstance(module, modules._RecurrentCell | RecurrentCell)
    stacks = [[module._weights()]] if is_cell else module._weights()
    data = input.data if isinstance(input, PackedSequence) else input
    training = torch.is_grad_enabled() and (data.requires_grad or any(p.requires_grad for p in module.parameters()))
    rounded = None if is_cell or data.dtype != torch.float32 else module.weights
    if rounded and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        return f"weights={rounded!r} is for inference: an error where gradients of the weights are recorded"
    T, B = _steps_and_rows(module, input)
    cell, noise = module.told() if isinstance(module, Regularized) else (module._cell, None)
    texts = [noise] if noise else []
    for index, directions in enumerate(stacks):
        w = directions[0]
        x = data.new_empty(()).expand(T, B, w.w_ih.shape[1])
        if not ops.prepare(cell, x.dtype, x.device.type, rounded):
            texts.append(f"layer {index}: {cell}, in torch's operations: there are no kernels of it here")
            continue
        H, P = sizes(CELLS[cell], w)
        text = torch.ops.fastrnn.explain(
            x, cell, H, P, len(directions), w.w_hr is not None, training and not rounded, rounded
        )
        texts.append(f"layer {index}: {cell}, {len(directions)} direction(s), {text}")
    return "\n".join(texts)


def _steps_and_rows(module: Any, input: Input) -> tuple[int, int]:
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if isinstance(module, modules._RecurrentCell | RecurrentCell):
        return 1, input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return input.shape[0], 1
    T, B = input.shape[:2]
    return (B, T) if module.batch_first else (T, B)
