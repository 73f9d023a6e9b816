"""The op pair `torch.ops.fastrnn.layer_forward` / `layer_backward`: shapes for tracing, gradients, one layer's call.

One rule of each kind serves every cell, since the cell's name is an argument of the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import _C, reference
from fastrnn.reference import Weights

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/layer.h

_SIZES = _C.cells()
_HEADER = 64  # kHeaderBytes in csrc/ops.cpp
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
    """A module's weights in the order in which inference reads them, kept from call to call.

    Every call reads all bytes of the weights and compares their 64-bit fingerprint with that of the kept ones: however
    they were changed (an optimizer, `load_state_dict`, `.data`, another process), they are packed again. A layer of I
    inputs and H units keeps `4 * G * H * (I + H)` bytes in float32, as much as the weights themselves, and half of that
    rounded to bfloat16; H rounded up to whole vectors. A call that records gradients drops them.
    """

    def __init__(self):
        self._kept: dict[int, Tensor] = {}  # by layer

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
        *,
        recompute: bool = False,
        narrow: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layer `index`; the other arguments as in `layer`, `narrow` to round the weights to bfloat16.

        Raises:
            RuntimeError: `narrow`, and a gradient is to be recorded.
            NotImplementedError: `narrow`, and x is on a GPU.
            TypeError, ValueError: as `layer`; also for `narrow` and another dtype than float32.
        """
        if narrow and x.is_cuda:
            raise NotImplementedError(f"weights='bf16': expected tensors on the CPU, got {x.device}")
        flat = weights[0] if len(weights) == 1 else [tensor for direction in weights for tensor in direction]
        keeps = _is_plain(x, h0, c0, lengths, resets, *flat) and x.is_cpu
        if _records_gradients(x, h0, c0, *flat):
            if narrow:
                raise RuntimeError(
                    "weights='bf16' is for inference: expected torch.no_grad() or torch.inference_mode(), "
                    "got a call that records gradients"
                )
            if keeps:
                self._kept.pop(index, None)
        elif keeps or narrow:
            kept = self._kept.get(index) if keeps else None
            *outputs, packed = torch.ops.fastrnn.packed_forward(
                x, h0, c0, *_lists(flat), lengths, resets, cell, narrow, kept
            )
            if keeps and packed.numel():
                self._kept[index] = packed
            return outputs
        return layer(cell, x, h0, c0, weights, lengths, resets, recompute=recompute)

    def run_eagerly(
        self, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, flat: tuple[Tensor | None, ...], narrow: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Layer 0 without lengths and resets, past PyTorch's dispatcher, which takes longer than a small layer does.

        None, and nothing done, unless the call is a plain one: outside of whatever traces, transforms or compiles it,
        with dense tensors on the CPU, no gradient to record, and nothing wrong. `run` then does it, or says what is
        wrong.
        """
        found = _C.eager_forward(cell, narrow, self._kept.get(0), x, h0, c0, flat)
        if found is None:
            return None
        if found[3].numel():
            self._kept[0] = found[3]
        return found[:3]

    def __deepcopy__(self, memo):
        return PackedLayers()

    def __reduce__(self):
        return PackedLayers, ()


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call's results are ordinary tensors, made here and now: a place to keep one."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ) and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


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


@torch.library.register_fake("fastrnn::packed_forward")
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, resets, cell, narrow, packed):
    tensors = {"h0": h0, "c0": c0, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr}
    _check_devices(x, **tensors, lengths=lengths, resets=resets, packed=packed)
    T, B, I = x.shape
    D, P = len(w_hh), w_hh[0].shape[1]
    H = w_hh[0].shape[0] // _SIZES[cell]["gates"]
    with_c = D if _SIZES[cell]["has_cell"] else 0
    rows = 1 if narrow else T * B  # narrow ones are always packed
    size = 0 if packed is not None else _C.packed_size(cell, DTYPES[x.dtype], narrow, rows, I, H, P, D, bool(w_hr))
    return (
        x.new_empty(T, B, D * P),
        x.new_empty(D, B, P),
        x.new_empty(with_c, B, H),
        x.new_empty(size and _HEADER + size, dtype=torch.uint8),
    )
