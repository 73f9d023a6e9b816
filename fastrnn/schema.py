"""The op pair `torch.ops.fastrnn.layer_forward` / `layer_backward` as PyTorch is told of it: arguments, shapes for
tracing, the cells that there are.

One rule of each kind serves every cell, since the cell's name is an argument of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import _C, codegen, compiler
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


SIZES: dict[str, codegen.Sizes] = _C.cells()  # by cell, what codegen.description() says of it
_HEADER = 64  # kHeaderBytes in csrc/torch/ops.cpp


def add_cell(cell: Cell) -> None:
    """Makes a cell known to the ops, by its name.

    Raises:
        EquationError: the equation cannot be made a kernel.
        ValueError: there is another cell of that name.
    """
    sizes = codegen.description(cell)
    _C.add_cell(cell.name, sizes)
    SIZES[cell.name], CELLS[cell.name] = sizes, cell
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
    if SIZES[cell]["is_normalized"] and device != "cpu":
        return False
    if device == "cpu":
        return compiler.prepare(cell, DTYPES[dtype], rounded)
    return device != "cuda" or compiler.prepare_on_gpu(cell, DTYPES[dtype])


# What torch.compiler.assume_constant_result sets; that function would import Dynamo, which takes a second.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def flatten(weights: list[Weights]) -> list[Tensor]:
    """The weights of all directions as the ops take them: one list, without those that a layer lacks."""
    if any(w.w_hh is not None and (w.b_ih is None) != (w.b_hh is None) for w in weights):
        raise ValueError("b_ih, b_hh: expected both or none")
    return [tensor for w in weights for tensor in w if tensor is not None]


def unflatten(cell: str, flat: Sequence[Any], directions: int) -> list[Weights]:
    """What `flatten` was given."""
    count = len(flat) // directions
    parts = [iter(flat[d * count : (d + 1) * count]) for d in range(directions)]
    present = _present(cell, count)
    return [Weights._make(next(part) if there else None for there in present) for part in parts]


def _present(cell: str, count: int) -> tuple[bool, ...]:
    """Which of `Weights` a direction with `count` tensors has."""
    sizes = SIZES[cell]
    is_recurrent, has_own = sizes["first_gates"] > 0, own_rows(cell) > 0
    others = count - 1 - is_recurrent - has_own  # biases of each product or none, and w_hr
    has_biases = others >= 1 + is_recurrent
    return True, is_recurrent, has_biases, has_biases and is_recurrent, is_recurrent and others % 2 == 1, has_own


def own_rows(cell: str) -> int:
    """How many rows w_own has: of each unit weight, then of each normalized product."""
    return SIZES[cell]["unit_weights"] + SIZES[cell]["gains"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_fake(inputs: Inputs, **others: Tensor | None) -> None:
    """The kernels check for themselves; but one tensor on the meta device sends the whole call to the fake."""
    if inputs.cell not in SIZES:
        raise ValueError(f"cell: expected one of {', '.join(SIZES)}, got {inputs.cell}")
    if not inputs.weights:
        raise ValueError("weights: expected those of each direction, got none")
    named: list[tuple[str, object]] = [("weights", weight) for weight in inputs.weights]
    named += [*inputs._asdict().items(), *others.items()]
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.device != inputs.x.device:
            raise RuntimeError(f"{name}: expected device {inputs.x.device} as x, got {tensor.device}")


def split(args: tuple[Any, ...]) -> tuple[Inputs, tuple[Any, ...]]:
    """The arguments of an op from x on: those of every op, and its own."""
    count = len(Inputs._fields)
    return Inputs(*args[:count]), args[count:]


def _fake_outputs(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and c_n."""
    x, directions, sizes = inputs.x, inputs.directions, SIZES[inputs.cell]
    T, B, _ = x.shape
    H = units(inputs)
    P = inputs.weights[1].shape[1] if sizes["first_gates"] else H
    with_c = (directions, B, sizes["carried"] * H) if sizes["carried"] else (0, B, H)
    return x.new_empty(T, B, directions * P), x.new_empty(directions, B, P), x.new_empty(with_c)


def units(inputs: Inputs) -> int:
    """H."""
    return inputs.weights[0].shape[0] // SIZES[inputs.cell]["gates"]


def is_projected(inputs: Inputs) -> bool:
    return _present(inputs.cell, len(inputs.weights) // inputs.directions)[4]


@torch.library.register_fake("fastrnn::layer_forward")  # type: ignore[untyped-decorator]
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, options = split(args)
    save, recompute = (*options, False)[:2]
    _check_fake(inputs)
    x, directions = inputs.x, inputs.directions
    y, h_n, c_n = _fake_outputs(inputs)
    T, (with_c, B, carried) = x.shape[0], c_n.shape
    vectors = SIZES[inputs.cell]["saved"] + is_projected(inputs)
    saved = x.new_empty(directions if save and not recompute else 0, T, B, vectors, units(inputs))
    return y, h_n, c_n, saved, x.new_empty(with_c if save else 0, T, B, carried, dtype=accumulator(x.dtype))


@torch.library.register_fake("fastrnn::layer_backward")  # type: ignore[untyped-decorator]
def _(grad_y: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *args: Any) -> list[Tensor]:
    inputs, (y, saved, saved_c, wanted, *options) = split(args)
    defaults: tuple[Any, ...] = (None, False, None)
    grad_saved_c, steps, grad_values = (*options, *defaults[len(options) :])
    given = {"grad_y": grad_y, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n, "grad_saved_c": grad_saved_c}
    given["grad_values"] = grad_values
    _check_fake(inputs, **given, y=y, saved=saved, saved_c=saved_c)
    _, h_n, c_n = _fake_outputs(inputs)
    likes = [inputs.x, h_n, c_n, *inputs.weights]
    found = [like.new_empty(like.shape if want else 0) for like, want in zip(likes, wanted, strict=True)]
    T, B, _ = inputs.x.shape
    vectors = SIZES[inputs.cell]["grads"], units(inputs)
    return [*found, inputs.x.new_empty(inputs.directions, T, B, *vectors)] if steps else found


@torch.library.register_fake("fastrnn::packed_forward")  # type: ignore[untyped-decorator]
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, (rounded, packed) = split(args)
    _check_fake(inputs, packed=packed)
    x = inputs.x
    y, h_n, c_n = _fake_outputs(inputs)
    T, B, I = x.shape
    size = 0
    if packed is None:
        steps = (1, 1) if rounded else (T, B)  # rounded ones are always packed
        sizes = *steps, I, units(inputs), h_n.shape[2], inputs.directions
        size = _C.packed_size(inputs.cell, DTYPES[x.dtype], rounded, *sizes, is_projected(inputs))
    return y, h_n, c_n, x.new_empty(size and _HEADER + size, dtype=torch.uint8)
