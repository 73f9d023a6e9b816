"""The stateless call of a stack of layers: the only place that walks layers and directions."""

from __future__ import annotations

from typing import Protocol, overload

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from fastrnn import _C, autocast, autograd, noise
from fastrnn.read import How, Read
from fastrnn.reference import Weights
from fastrnn.schema import flatten


class Runs(Protocol):
    """What computes the layers of a stack, one after another: `ops.PackedLayers`, noise, what keeps the states."""

    def run(self, index: int, how: How, read: Read, rounded: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, h_n and c_n of layer `index`; `rounded` is the module's option `weights`."""


def rnn(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[list[Weights]],
    *,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    masks: list[Tensor] | None = None,
    packed: bool = False,
    recompute: bool = False,
    packs: Runs | None = None,
    rounded: str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack of L layers of D directions over a batch of sequences.

    Args:
        cell: a name of `fastrnn.cells.CELLS`.
        input: `[T, B, I]`.
        h0, c0: `[L*D, B, P]` and `[L*D, B, H]`, directions of a layer side by side, or None for zeros.
        weights: per layer, per direction.
        dropout: probability of dropping an element of a layer's output (not the last one's) while `training`.
        lengths, resets: int64 `[B]`, bool `[T, B]`; see `fastrnn.reference.layer_with_states`.
        masks: per layer, of a cell that has masks; see `fastrnn.reference.layer_with_states`.
        recompute: keep only the states for the backward pass; see `fastrnn.ops.layer`.
        packs: where to keep packed weights between calls that record no gradients, or what else computes a layer in its
            `run`; None: nowhere.
        rounded: "bf16" or "int8" to round the weights, for inference; without effect if the input is not float32. Needs
            `packs`.
        packed: draw dropout for the elements within `lengths` alone, as torch.nn does for a packed sequence.
        generator: where dropout is drawn from, for all elements; None: torch's default one, as torch.nn draws.

    Returns:
        `output [T, B, D*P]`, `h_n [L*D, B, P]`, `c_n [L*D, B, H]` (`[0, B, H]` for a cell without c).

    Under autocast every floating-point tensor but float64 is cast to autocast's dtype, as torch does for its own fused
    layers. Raises what `fastrnn.ops.layer` raises.
    """
    if not torch.compiler.is_compiling():
        _C.leave_openmp_after_fork()
        check_local(weights[0][0])
    D = len(weights[0])
    how = How(cell, D, recompute)
    if autocast.is_on(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input = _cast(input, dtype)
        h0, c0 = (_cast(t, dtype) for t in (h0, c0))
        weights = [[Weights._make(_cast(t, dtype) for t in w) for w in directions] for directions in weights]
    states = []
    for index, directions in enumerate(weights):
        if index and dropout and training:
            input = _drop(input, dropout, lengths if packed else None, generator)
        own = slice(index * D, (index + 1) * D)
        h, c = (state if state is None or len(weights) == 1 else state[own] for state in (h0, c0))
        own_masks = None if masks is None else masks[index].to(input.dtype)
        read = Read(lengths, resets, input, h, c, own_masks, None, flatten(directions))
        if packs is None:
            input, *state = autograd.call(how, read)
        else:
            input, *state = packs.run(index, how, read, rounded if input.dtype == torch.float32 else None)
        states.append(state)
    h_n, c_n = states[0] if len(states) == 1 else (torch.cat(parts) for parts in zip(*states, strict=True))
    return input, h_n, c_n


def check_local(weights: Weights) -> None:
    """Raises TypeError for distributed weights, as FSDP's are between the calls that it gathers them for."""
    if hasattr(weights.w_ih, "placements"):
        raise TypeError(
            f"weights: expected local tensors, got a {type(weights.w_ih).__name__} {weights.w_ih.placements}. FSDP "
            "gathers them for a call of the module that fully_shard was given, and for its methods that "
            "torch.distributed.fsdp.register_fsdp_forward_method names; there are no kernels for parts of them"
        )


def may_differ(input: Tensor, weight: Tensor) -> bool:
    """Whether the dtypes may differ, since autocast will make them the same."""
    return autocast.is_on(input.device.type) and torch.float64 not in (input.dtype, weight.dtype)


def _drop(input: Tensor, p: float, lengths: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Dropout between layers; with lengths the mask is drawn in the order of a packed sequence."""
    if generator is not None:
        return input * noise.keeps(input, input.shape, p, generator)
    if lengths is None:
        return drop(input, p)
    active = torch.arange(len(input), device=input.device)[:, None] < lengths
    return torch.zeros_like(input).masked_scatter(active[:, :, None], drop(input[active], p))


@overload
def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
