"""The op pair `torch.ops.fastrnn.layer_forward` / `layer_backward`: shapes for tracing, gradients, one layer's call.

One rule of each kind serves every cell, since the cell's name is an argument of the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import _C, reference
from fastrnn.reference import Weights

_SIZES = _C.cells()
_FIELDS = len(Weights._fields)


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Weights],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer through the kernels; arguments and results as in `fastrnn.reference.layer`.

    With `recompute` only the states are kept for the backward pass, which computes the gates again: less memory, more
    time, and in float32 and float64 the same gradients.

    Raises:
        ValueError: a shape, a list's length, or a value of `lengths` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: a tensor is on another device than `x`.
    """
    flat = weights[0] if len(weights) == 1 else [tensor for direction in weights for tensor in direction]
    if _records_gradients(x, h0, c0, *flat):
        return _Layer.apply(cell, recompute, lengths, resets, x, h0, c0, *flat)
    return torch.ops.fastrnn.layer_forward(x, h0, c0, *_lists(flat), lengths, resets, cell, False)[:3]


def _records_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class PackedLayers:
    """The layers of a module with their weights rounded to bfloat16 and packed, made anew whenever a weight changed.

    A change is noticed by the tensors' addresses and version counters, and where it leaves both as they were (through
    `.data`, or by another process) by up to 64 of the values of each tensor: a partial one may go unnoticed. A layer
    of I inputs and H units takes `2 * G * H * (I + H)` bytes, H rounded up to whole vectors. Weights that were
    computed, as by weight_norm, are kept as well; those made under `torch.inference_mode()`, which have no version, are
    packed in every call.
    """

    def __init__(self):
        # By layer: fingerprint, packed weights, and the weights themselves, lest their addresses be used again.
        self._kept: dict[int, tuple[int, Tensor, list]] = {}

    def run(
        self,
        index: int,
        cell: str,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: list[Weights],
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layer `index`; the other arguments as in `layer`.

        Raises:
            RuntimeError: a gradient is to be recorded.
            TypeError, ValueError: as `layer`; also for another dtype than float32.
        """
        flat = [tensor for direction in weights for tensor in direction]
        if _records_gradients(x, h0, c0, *flat):
            raise RuntimeError(
                "weights='bf16' is for inference: expected torch.no_grad() or torch.inference_mode(), "
                "got a call that records gradients"
            )
        packed = self._packed(index, cell, flat)
        sizes = (weights[0].w_ih.shape[0] // _SIZES[cell]["gates"], weights[0].w_hh.shape[1], len(weights))
        projected = weights[0].w_hr is not None
        return torch.ops.fastrnn.packed_forward(x, h0, c0, packed, lengths, resets, cell, *sizes, projected)

    def _packed(self, index: int, cell: str, flat: list[Tensor | None]) -> Tensor:
        lists = _lists(flat)
        tensors = [t for t in flat if t is not None]
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return torch.ops.fastrnn.pack_weights(*lists, cell)
        fingerprint = torch.ops.fastrnn.fingerprint(tensors)
        kept = self._kept.get(index)
        if kept is None or kept[0] != fingerprint:
            kept = (fingerprint, torch.ops.fastrnn.pack_weights(*lists, cell), tensors)
            if fingerprint:
                self._kept[index] = kept
        return kept[1]

    def __deepcopy__(self, memo):
        return PackedLayers()

    def __reduce__(self):
        return PackedLayers, ()


def _lists(flat: list[Tensor | None]) -> list[list[Tensor]]:
    """Per field of `Weights`, the tensors of all directions."""
    if len(flat) == _FIELDS:
        return [[] if tensor is None else [tensor] for tensor in flat]
    return [[t for t in flat[field::_FIELDS] if t is not None] for field in range(_FIELDS)]


class _Layer(torch.autograd.Function):
    """Gradients through the kernels once; a second time through the reference."""

    @staticmethod
    def forward(ctx, cell, recompute, lengths, resets, x, h0, c0, *flat):
        y, h_n, c_n, saved, saved_c = torch.ops.fastrnn.layer_forward(
            x, h0, c0, *_lists(flat), lengths, resets, cell, True, recompute
        )
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, resets, y, saved, saved_c, x, h0, c0, *flat)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n):
        lengths, resets, y, saved, saved_c, *inputs = ctx.saved_tensors
        grads = (grad_y, grad_h_n, grad_c_n)
        wanted = ctx.needs_input_grad[4:]
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(inputs))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (None, None, None, None, *_reference_grads(ctx.cell, inputs, wanted, lengths, resets, grads))
        x, h0, c0, *flat = inputs
        fields = [any(wanted[3 + field :: _FIELDS]) for field in range(_FIELDS)]
        dx, dh0, dc0, *lists = torch.ops.fastrnn.layer_backward(
            *grads, x, h0, c0, *_lists(flat), lengths, resets, y, saved, saved_c, ctx.cell, [*wanted[:3], *fields]
        )
        directions = range(len(flat) // _FIELDS)
        by_argument = [dx, dh0, dc0, *(lists[f][d] if lists[f] else None for d in directions for f in range(_FIELDS))]
        return (None,) * 4 + tuple(g if want else None for g, want in zip(by_argument, wanted, strict=True))


def _reference_grads(cell, inputs, wanted, lengths, resets, grads):
    """The same gradients as a differentiable function of `inputs` and `grads`."""
    # A view of each input of its own: one tensor may be passed for two arguments.
    inputs = [t if t is None else t.view_as(t) for t in inputs]
    x, h0, c0, *flat = (t if t is None else t.to(_accumulator(t.dtype)) for t in inputs)
    weights = [Weights(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
    with torch.autocast(x.device.type, enabled=False):
        outputs = reference.layer(cell, x, h0, c0, weights, lengths, resets)
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    sources = [t for t, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, sources, grads, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_devices(x: Tensor, **others: Tensor | list[Tensor] | None) -> None:
    """The kernels check for themselves; but one tensor on the meta device sends the whole call to the fake."""
    for name, value in others.items():
        for tensor in value if isinstance(value, list) else (value,):
            if tensor is not None and tensor.device != x.device:
                raise RuntimeError(f"{name}: expected device {x.device} as x, got {tensor.device}")


@torch.library.register_fake("fastrnn::layer_forward")
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, resets, cell, save, recompute=False):
    _check_devices(
        x, h0=h0, c0=c0, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, lengths=lengths, resets=resets
    )
    sizes = _SIZES[cell]
    T, B, _ = x.shape
    D, P = len(w_hh), w_hh[0].shape[1]
    H = w_hh[0].shape[0] // sizes["gates"]
    with_c = D if sizes["has_cell"] else 0
    return (
        x.new_empty(T, B, D * P),
        x.new_empty(D, B, P),
        x.new_empty(with_c, B, H),
        x.new_empty(D if save and not recompute else 0, T, B, sizes["saved"] + len(w_hr) // D, H),
        x.new_empty(with_c if save else 0, T, B, H, dtype=_accumulator(x.dtype)),
    )


@torch.library.register_fake("fastrnn::layer_backward")
def _(
    grad_y,
    grad_h_n,
    grad_c_n,
    x,
    h0,
    c0,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    w_hr,
    lengths,
    resets,
    y,
    saved,
    saved_c,
    cell,
    wanted,
):
    sizes = _SIZES[cell]
    B, D, P = x.shape[1], len(w_hh), w_hh[0].shape[1]
    H = w_hh[0].shape[0] // sizes["gates"]
    lists = [
        [t.new_empty(t.shape) if want else t.new_empty(0) for t in tensors]
        for tensors, want in zip((w_ih, w_hh, b_ih, b_hh, w_hr), wanted[3:], strict=True)
    ]
    return (
        x.new_empty(x.shape) if wanted[0] else x.new_empty(0),
        x.new_empty(D if wanted[1] else 0, B, P),
        x.new_empty(D if wanted[2] and sizes["has_cell"] else 0, B, H),
        *lists,
    )


@torch.library.register_fake("fastrnn::pack_weights")
def _(w_ih, w_hh, b_ih, b_hh, w_hr, cell):
    _check_devices(w_ih[0], w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr)
    return w_ih[0].new_empty(_C.packed_size(cell, *_packed_sizes(w_ih, w_hh, cell), bool(w_hr)), dtype=torch.uint8)


@torch.library.register_fake("fastrnn::fingerprint")
def _(weights):
    return 0  # nothing to keep


def _packed_sizes(w_ih, w_hh, cell):
    """I, H, P, D."""
    return w_ih[0].shape[1], w_hh[0].shape[0] // _SIZES[cell]["gates"], w_hh[0].shape[1], len(w_hh)


@torch.library.register_fake("fastrnn::packed_forward")
def _(x, h0, c0, packed, lengths, resets, cell, H, P, D, projected):
    _check_devices(x, h0=h0, c0=c0, packed=packed, lengths=lengths, resets=resets)
    T, B, _ = x.shape
    with_c = D if _SIZES[cell]["has_cell"] else 0
    return x.new_empty(T, B, D * P), x.new_empty(D, B, P), x.new_empty(with_c, B, H)
