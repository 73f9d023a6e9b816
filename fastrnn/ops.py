"""One layer's call, in the words of the modules: with or without gradients, and for inference with weights that are
kept packed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import _C, autograd
from fastrnn.autograd import records_gradients
from fastrnn.cells import CELLS
from fastrnn.read import How, Read
from fastrnn.reference import Weights
from fastrnn.schema import DTYPES, SIZES, Inputs, add_cell, flatten, prepare, split, unflatten

__all__ = ["DTYPES", "SIZES", "Inputs", "PackedLayers", "add_cell", "flatten", "layer", "prepare", "split", "unflatten"]


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Weights],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    masks: Tensor | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer through the kernels; arguments and results as in `fastrnn.reference.layer_with_states`.

    With `recompute` only the states are kept for the backward pass, which computes the gates again: less memory, more
    time, and in float32 and float64 the same gradients. Of a cell with layer normalization y alone is kept, and the
    backward pass begins with another forward pass.

    Raises:
        ValueError: a shape, a list's length, or a value of `lengths` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: a tensor is on another device than `x`.
    """
    read = Read(lengths, resets, x, h0, c0, masks, None, flatten(weights))
    return autograd.call(How(cell, len(weights), recompute), read)


class PackedLayers:
    """A module's weights in the order in which inference reads them, kept from call to call.

    Every call reads all bytes of the weights and compares their 64-bit fingerprint with that of the kept ones: however
    they were changed (an optimizer, `load_state_dict`, `.data`, another process), they are packed again. A layer of I
    inputs and H units keeps `4 * G * H * (I + H)` bytes in float32, as much as the weights themselves, half of that
    rounded to bfloat16, a quarter (and 8 bytes for each row of a weight) as int8; H rounded up to whole vectors. A call
    that records gradients drops them.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # by layer

    def run(self, index: int, how: How, read: Read, rounded: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y, h_n and c_n of layer `index`; `rounded` is the module's option `weights`.

        Raises:
            RuntimeError: `rounded`, and gradients of the weights are to be recorded. Gradients of x alone are an error
                in the backward pass, if there is one.
            NotImplementedError: `rounded`, and x is on a GPU; as `layer`.
            TypeError, ValueError: as `layer`; also for `rounded` and another dtype than float32.
        """
        x, flat = read.x, read.weights
        if rounded and x.is_cuda:
            raise NotImplementedError(f"weights={rounded!r}: expected tensors on the CPU, got {x.device}")
        is_special = autograd.is_recorded() or autograd.is_transformed(x, read.h0, read.c0, read.masks, *flat)
        if rounded:
            self._check_rounded(how.cell, x, flat, rounded, is_special)
        elif is_special or records_gradients(x, read.h0, read.c0, *flat):
            if self._kept and _is_plain(x, *flat):
                self._kept.pop(index, None)
            return autograd.call(how, read)
        keeps = x.is_cpu and _is_plain(*read.flat())
        if rounded or (keeps and (CELLS[how.cell].has_all_kernels or prepare(how.cell, x.dtype))):
            kept = self._kept.get(index) if keeps else None
            y, h_n, c_n, packed = torch.ops.fastrnn.packed_forward(*read.inputs(how), rounded, kept)
            if keeps and packed.numel():
                self._kept[index] = packed
            return y, h_n, c_n
        return autograd.call(how, read)

    @staticmethod
    def _check_rounded(cell: str, x: Tensor, flat: list[Tensor], rounded: str, is_special: bool) -> None:
        if is_special:
            raise NotImplementedError(f"weights={rounded!r}: expected a call outside of torch.func's transforms")
        if not prepare(cell, x.dtype, x.device.type, rounded):
            raise NotImplementedError(f"weights={rounded!r}: there are no kernels of cell {cell} here")
        if records_gradients(*flat):
            raise RuntimeError(
                f"weights={rounded!r} is for inference: expected torch.no_grad() or torch.inference_mode(), "
                "got a call that records gradients"
            )

    def run_eagerly(
        self,
        cell: str,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | tuple[Tensor, ...] | None,
        flat: tuple[Tensor, ...],
        directions: int,
        rounded: str | None,
        recompute: bool,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """All layers of a call without masks, past PyTorch's dispatcher and, where gradients are recorded, with nodes
        of autograd's graph in C++: either takes longer than a small layer does.

        `h0`, `c0` (or its parts) and `flat` are of all layers, one after another; `dropout` is that of now, between
        layers. A single step is x [B, I] with states [B, P] and [B, K*H], and so are its results; a cell without c may
        have no c_n.

        None, and nothing done, unless the call is a plain one: outside of whatever traces, transforms or compiles it,
        with dense tensors on the CPU, and nothing wrong. `run` then does it, or says what is wrong.
        """
        if autograd.is_recorded():
            return None
        if not CELLS[cell].has_all_kernels:
            option = rounded if x.dtype == torch.float32 else None
            if not x.is_cpu or x.dtype not in DTYPES or not prepare(cell, x.dtype, "cpu", option):
                return None
        return _C.eager_forward(
            cell, rounded, recompute, self._kept, layers, x, h0, c0, flat, directions, dropout, lengths, resets
        )


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call's results are ordinary tensors, made here and now: a place to keep one."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ) and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
