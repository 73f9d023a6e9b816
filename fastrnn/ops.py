"""The op pair `torch.ops.fastrnn.layer_forward` / `layer_backward`: shapes for tracing, gradients, one layer's call.

One rule of each kind serves every cell, since the cell's name is an argument of the ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import _C, codegen, compiler, reference
from fastrnn.cells import CELLS, Cell
from fastrnn.reference import Weights

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/layer.h


class Inputs(NamedTuple):
    """What every op of a layer is given, in the order of its schema (csrc/torch/schemas.h)."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    directions: int
    lengths: Tensor | None
    resets: Tensor | None
    masks: Tensor | None
    cell: str


_SIZES = _C.cells()  # by cell, what fakes need of codegen.description()
_HEADER = 64  # kHeaderBytes in csrc/torch/ops.cpp


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
    """One layer through the kernels; arguments and results as in `fastrnn.reference.layer`.

    With `recompute` only the states are kept for the backward pass, which computes the gates again: less memory, more
    time, and in float32 and float64 the same gradients.

    Raises:
        ValueError: a shape, a list's length, or a value of `lengths` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: a tensor is on another device than `x`.
        NotImplementedError: the call is inside of a `torch.func` transform.
    """
    flat = flatten(weights)
    _check_transforms(x, h0, c0, masks, *flat)
    if not (CELLS[cell].has_all_kernels or prepare(cell, x.dtype, x.device.type)):
        return _reference(cell, len(weights), (x, h0, c0, *flat), lengths, resets, masks)
    # What is traced or exported shall be saved, so it holds no Python function: backward through it is an error.
    is_traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if _records_gradients(x, h0, c0, *flat) and not is_traced:
        return _Layer.apply(cell, len(weights), recompute, (lengths, resets, masks), x, h0, c0, *flat)
    inputs = Inputs(x, h0, c0, flat, len(weights), lengths, resets, masks, cell)
    return torch.ops.fastrnn.layer_forward(*inputs, False)[:3]


def add_cell(cell: Cell) -> None:
    """Makes a cell known to the ops, by its name.

    Raises:
        EquationError: the equation cannot be made a kernel.
        ValueError: there is another cell of that name.
    """
    sizes = codegen.description(cell)
    _C.add_cell(cell.name, sizes)
    _SIZES[cell.name], CELLS[cell.name] = sizes, cell
    codegen.remember(cell)


def prepare(cell: str, dtype: torch.dtype = torch.float32, device: str = "cpu", rounded: str | None = None) -> bool:
    """Whether this process has kernels of a cell, which are compiled if they have to be, in seconds: on the CPU where
    there is a C++ compiler, on a GPU where there is an nvcc; see `fastrnn.compiler`. Without kernels a layer is
    computed by `fastrnn.reference`.

    Raises:
        KeyError: there is no such cell.
        CompilationError: there is a compiler, and it refuses.
    """
    if CELLS[cell].has_all_kernels or dtype not in DTYPES:
        return True
    if device == "cpu":
        return compiler.prepare(cell, DTYPES[dtype], rounded)
    return device != "cuda" or compiler.prepare_on_gpu(cell, DTYPES[dtype])


# What torch.compiler.assume_constant_result sets; that function would import Dynamo, which takes a second.
prepare._dynamo_marked_constant = True


def _reference(cell, directions, inputs, lengths, resets, masks):
    """A layer in torch's operations, in the accumulator's type."""
    codegen.check_unchanged(CELLS[cell])
    dtype = inputs[0].dtype
    x, h0, c0, *flat = (t if t is None else t.to(_accumulator(dtype)) for t in inputs)
    masks = masks if masks is None else masks.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        outputs = reference.layer(cell, x, h0, c0, unflatten(cell, flat, directions), lengths, resets, masks)
    return tuple(output.to(dtype) for output in outputs)


def flatten(weights: list[Weights]) -> list[Tensor]:
    """The weights of all directions as the ops take them: one list, without those that a layer lacks."""
    if any(w.w_hh is not None and (w.b_ih is None) != (w.b_hh is None) for w in weights):
        raise ValueError("b_ih, b_hh: expected both or none")
    return [tensor for w in weights for tensor in w if tensor is not None]


def unflatten(cell: str, flat: list[Tensor], directions: int) -> list[Weights]:
    """What `flatten` was given."""
    count = len(flat) // directions
    parts = [iter(flat[d * count : (d + 1) * count]) for d in range(directions)]
    present = _present(cell, count)
    return [Weights(*(next(part) if there else None for there in present)) for part in parts]


def _present(cell: str, count: int) -> tuple[bool, ...]:
    """Which of `Weights` a direction with `count` tensors has."""
    sizes = _SIZES[cell]
    is_recurrent, has_own = sizes["first_gates"] > 0, sizes["unit_weights"] > 0
    others = count - 1 - is_recurrent - has_own  # biases of each product or none, and w_hr
    has_biases = others >= 1 + is_recurrent
    return True, is_recurrent, has_biases, has_biases and is_recurrent, is_recurrent and others % 2 == 1, has_own


def _check_transforms(*tensors: Tensor | None) -> None:
    """There is no rule for `torch.func` and forward-mode gradients yet: an error, never tangents of zero."""
    if torch.compiler.is_compiling():
        return
    given = [t for t in tensors if t is not None]
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        or any(map(torch._C._functorch.is_legacy_batchedtensor, given))
        or (forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given))
    ):
        _refuse_transform()


def _refuse_transform(*args, **kwargs):
    raise NotImplementedError(
        "fastrnn's layers know no torch.func transforms (grad, vmap, jvp, ...) yet, nor batched or forward-mode "
        "gradients; fastrnn.revert(model) makes them torch.nn's, and fastrnn.reference.layer is in plain PyTorch "
        "operations"
    )


# The key that every op meets first inside of a transform, in compiled code too, where Python has no say.
_TRANSFORMS = torch.library.Library("fastrnn", "IMPL", "FuncTorchDynamicLayerFrontMode")
for _name in ("layer_forward", "layer_backward", "packed_forward"):
    _TRANSFORMS.impl(_name, _refuse_transform)


def _records_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class PackedLayers:
    """A module's weights in the order in which inference reads them, kept from call to call.

    Every call reads all bytes of the weights and compares their 64-bit fingerprint with that of the kept ones: however
    they were changed (an optimizer, `load_state_dict`, `.data`, another process), they are packed again. A layer of I
    inputs and H units keeps `4 * G * H * (I + H)` bytes in float32, as much as the weights themselves, half of that
    rounded to bfloat16, a quarter (and 8 bytes for each row of a weight) as int8; H rounded up to whole vectors. A call
    that records gradients drops them.
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
        masks: Tensor | None = None,
        *,
        recompute: bool = False,
        rounded: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layer `index`; the other arguments as in `layer`, `rounded` the module's option `weights`.

        Raises:
            RuntimeError: `rounded`, and gradients of the weights are to be recorded. Gradients of x alone are an error
                in the backward pass, if there is one.
            NotImplementedError: `rounded`, and x is on a GPU; as `layer`.
            TypeError, ValueError: as `layer`; also for `rounded` and another dtype than float32.
        """
        if rounded and x.is_cuda:
            raise NotImplementedError(f"weights={rounded!r}: expected tensors on the CPU, got {x.device}")
        flat = flatten(weights)
        _check_transforms(x, h0, c0, masks, *flat)
        if rounded and not prepare(cell, x.dtype, x.device.type, rounded):
            raise NotImplementedError(f"weights={rounded!r}: there are no kernels of cell {cell} here")
        keeps = _is_plain(x, h0, c0, lengths, resets, masks, *flat) and x.is_cpu
        if rounded and _records_gradients(*flat):
            raise RuntimeError(
                f"weights={rounded!r} is for inference: expected torch.no_grad() or torch.inference_mode(), "
                "got a call that records gradients"
            )
        if not rounded and _records_gradients(x, h0, c0, *flat):
            if keeps:
                self._kept.pop(index, None)
        elif rounded or (keeps and (CELLS[cell].has_all_kernels or prepare(cell, x.dtype))):
            kept = self._kept.get(index) if keeps else None
            inputs = Inputs(x, h0, c0, flat, len(weights), lengths, resets, masks, cell)
            *outputs, packed = torch.ops.fastrnn.packed_forward(*inputs, rounded, kept)
            if keeps and packed.numel():
                self._kept[index] = packed
            return outputs
        return layer(cell, x, h0, c0, weights, lengths, resets, masks, recompute=recompute)

    def run_eagerly(
        self,
        cell: str,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        flat: tuple[Tensor, ...],
        directions: int,
        rounded: str | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Layer 0 without lengths and resets, past PyTorch's dispatcher, which takes longer than a small layer does.

        None, and nothing done, unless the call is a plain one: outside of whatever traces, transforms or compiles it,
        with dense tensors on the CPU, no gradient to record, and nothing wrong. `run` then does it, or says what is
        wrong.
        """
        if not CELLS[cell].has_all_kernels:
            how = rounded if x.dtype == torch.float32 else None
            if not x.is_cpu or x.dtype not in DTYPES or not prepare(cell, x.dtype, "cpu", how):
                return None
        found = _C.eager_forward(cell, rounded, self._kept.get(0), x, h0, c0, flat, directions)
        if found is None:
            return None
        if found[3].numel():
            self._kept[0] = found[3]
        return found[:3]


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call's results are ordinary tensors, made here and now: a place to keep one."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ) and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class _Layer(torch.autograd.Function):
    """Gradients through the kernels once; a second time through the reference."""

    @staticmethod
    def forward(ctx, cell, directions, recompute, rows, x, h0, c0, *flat):
        inputs = Inputs(x, h0, c0, flat, directions, *rows, cell)
        y, h_n, c_n, saved, saved_c = torch.ops.fastrnn.layer_forward(*inputs, True, recompute)
        ctx.cell, ctx.directions = cell, directions
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows, y, saved, saved_c, x, h0, c0, *flat)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, *grads):
        lengths, resets, masks, y, saved, saved_c, x, h0, c0, *flat = ctx.saved_tensors
        rows = lengths, resets, masks
        _check_transforms(*grads)
        wanted = ctx.needs_input_grad[4:]
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(wanted))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = x, h0, c0, *flat
            return (None,) * 4 + _reference_grads(ctx.cell, ctx.directions, inputs, wanted, rows, grads)
        inputs = Inputs(x, h0, c0, flat, ctx.directions, *rows, ctx.cell)
        found = torch.ops.fastrnn.layer_backward(*grads, *inputs, y, saved, saved_c, list(wanted))
        return (None,) * 4 + tuple(g if want else None for g, want in zip(found, wanted, strict=True))


def _reference_grads(cell, directions, inputs, wanted, rows, grads):
    """The same gradients as a differentiable function of `inputs` and `grads`; `rows` are lengths, resets and masks."""
    # A view of each input of its own: one tensor may be passed for two arguments.
    inputs = [t if t is None else t.view_as(t) for t in inputs]
    x, h0, c0, *flat = (t if t is None else t.to(_accumulator(t.dtype)) for t in inputs)
    outputs = _reference(cell, directions, (x, h0, c0, *flat), *rows)
    # A state may depend on nothing that asks for gradients, such as one that stays what it was.
    pairs = [
        (out, grad.to(out.dtype))
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    if not pairs:
        return (None,) * len(wanted)
    outputs, grads = zip(*pairs, strict=True)
    sources = [t for t, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, sources, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if want else None for want in wanted)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_fake(inputs: Inputs, **others: Tensor | None) -> None:
    """The kernels check for themselves; but one tensor on the meta device sends the whole call to the fake."""
    if inputs.cell not in _SIZES:
        raise ValueError(f"cell: expected one of {', '.join(_SIZES)}, got {inputs.cell}")
    if not inputs.weights:
        raise ValueError("weights: expected those of each direction, got none")
    named = [("weights", weight) for weight in inputs.weights]
    named += [*inputs._asdict().items(), *others.items()]
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.device != inputs.x.device:
            raise RuntimeError(f"{name}: expected device {inputs.x.device} as x, got {tensor.device}")


def split(args) -> tuple[Inputs, tuple]:
    """The arguments of an op from x on: those of every op, and its own."""
    count = len(Inputs._fields)
    return Inputs(*args[:count]), args[count:]


def _fake_outputs(inputs: Inputs):
    """y, h_n and c_n."""
    x, directions, sizes = inputs.x, inputs.directions, _SIZES[inputs.cell]
    T, B, _ = x.shape
    H = _units(inputs)
    P = inputs.weights[1].shape[1] if sizes["first_gates"] else H
    with_c = (directions, B, sizes["carried"] * H) if sizes["carried"] else (0, B, H)
    return x.new_empty(T, B, directions * P), x.new_empty(directions, B, P), x.new_empty(with_c)


def _units(inputs: Inputs):
    return inputs.weights[0].shape[0] // _SIZES[inputs.cell]["gates"]


def _is_projected(inputs: Inputs) -> bool:
    return _present(inputs.cell, len(inputs.weights) // inputs.directions)[4]


@torch.library.register_fake("fastrnn::layer_forward")
def _(*args):
    inputs, options = split(args)
    save, recompute = (*options, False)[:2]
    _check_fake(inputs)
    x, directions = inputs.x, inputs.directions
    y, h_n, c_n = _fake_outputs(inputs)
    T, (with_c, B, carried) = x.shape[0], c_n.shape
    vectors = _SIZES[inputs.cell]["saved"] + _is_projected(inputs)
    saved = x.new_empty(directions if save and not recompute else 0, T, B, vectors, _units(inputs))
    return y, h_n, c_n, saved, x.new_empty(with_c if save else 0, T, B, carried, dtype=_accumulator(x.dtype))


@torch.library.register_fake("fastrnn::layer_backward")
def _(grad_y, grad_h_n, grad_c_n, *args):
    inputs, (y, saved, saved_c, wanted) = split(args)
    _check_fake(inputs, grad_y=grad_y, grad_h_n=grad_h_n, grad_c_n=grad_c_n, y=y, saved=saved, saved_c=saved_c)
    _, h_n, c_n = _fake_outputs(inputs)
    likes = [inputs.x, h_n, c_n, *inputs.weights]
    return [like.new_empty(like.shape if want else 0) for like, want in zip(likes, wanted, strict=True)]


@torch.library.register_fake("fastrnn::packed_forward")
def _(*args):
    inputs, (rounded, packed) = split(args)
    _check_fake(inputs, packed=packed)
    x = inputs.x
    y, h_n, c_n = _fake_outputs(inputs)
    T, B, I = x.shape
    size = 0
    if packed is None:
        rows = 1 if rounded else T * B  # rounded ones are always packed
        sizes = rows, I, _units(inputs), h_n.shape[2], inputs.directions
        size = _C.packed_size(inputs.cell, DTYPES[x.dtype], rounded, *sizes, _is_projected(inputs))
    return y, h_n, c_n, x.new_empty(size and _HEADER + size, dtype=torch.uint8)
