"""`explain`: which way a call of a module would go, and why."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import modules
from fastrnn.reference import CELLS


def explain(module: torch.nn.Module, input: Tensor | PackedSequence) -> str:
    """Tells, layer by layer, how `module(input)` would be computed: by which kernels, and for what reason.

    The text is for people; it may change between versions. Nothing is computed. With gradients enabled for the module
    or its input, the backward pass is told as well.

    Args:
        module: a layer or cell of fastrnn.
        input: what it would be called with.

    Raises:
        TypeError: `module` is not of fastrnn.
        NotImplementedError: there are no kernels for the device of `input`.
    """
    if isinstance(module, modules._RecurrentCell):
        stacks = [[module._weights()]]
    elif isinstance(module, modules._Recurrent):
        stacks = module._weights()
    else:
        raise TypeError(f"module: expected a layer or cell of fastrnn, got {type(module).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    training = torch.is_grad_enabled() and (data.requires_grad or any(p.requires_grad for p in module.parameters()))
    T, B = _steps_and_rows(module, input)
    texts = []
    for index, directions in enumerate(stacks):
        w = directions[0]
        x = data.new_empty(()).expand(T, B, w.w_ih.shape[1])
        H = w.w_ih.shape[0] // CELLS[module._cell].gates
        text = torch.ops.fastrnn.explain(
            x, module._cell, H, w.w_hh.shape[1], len(directions), w.w_hr is not None, training
        )
        texts.append(f"layer {index}: {module._cell}, {len(directions)} direction(s), {text}")
    return "\n".join(texts)


def _steps_and_rows(module: torch.nn.Module, input: Tensor | PackedSequence) -> tuple[int, int]:
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if isinstance(module, modules._RecurrentCell):
        return 1, input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return input.shape[0], 1
    T, B = input.shape[:2]
    return (B, T) if module.batch_first else (T, B)
