"""Derivatives of a layer, of every kind: first and second gradients, forward mode, and `torch.func`'s transforms.

A layer is a function of what it reads (`Read`), and so is its backward pass; each is an `autograd.Function` with rules:

- gradients of a layer: one call of `layer_backward`;
- tangents of a layer: one call of the layer of its tangents (tangents.py);
- gradients and tangents of a backward pass, whose value is the vector g times the Jacobian J(x): since g J(x) v is the
  product of g with the tangents in the direction v, they are the gradient of that, and the tangents themselves;
- vmap: rows of all members side by side, in one call. Members' own gradients of weights that they share are products of
  the gate gradients of every step with inputs and states, one for each member. Members with weights of their own are a
  call each.

Where there are no kernels for it (GPUs, projections), the equation is differentiated instead (fallback.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad

from fastrnn import autocast, fallback
from fastrnn.cells import CELLS
from fastrnn.fallback import at
from fastrnn.members import Batched, MemberGradients, fold, is_batched, one_by_one, unfold
from fastrnn.read import FIRST, READ, ROWS, STEPS, Dims, How, Kept, Read, Tensors, read_of, replaced
from fastrnn.schema import SIZES, accumulator, is_projected, prepare
from fastrnn.tangents import tangents_of, values_of

GRADS = 5  # of y, h_n, c_n, the states of every step, and the values in every step (tangents.py)
OUTPUT_ROWS = 1, 1, 1, 2, 2  # the dimension of B in these; and, in place of the last, in what is saved
KEPT_ROWS = 1, 2, 2  # in y, what is saved, and the states of every step


@overload
def call(how: How, read: Read, states: Literal[False] = False) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def call(how: How, read: Read, states: Literal[True]) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def call(how: How, read: Read, states: bool = False) -> Any:
    """y, h_n and c_n of a layer, and with `states` the states besides h of every step [D, T, B, K*H]; see
    `fastrnn.ops.layer`."""
    count = 4 if states else 3
    flat, x = read.flat(), read.x
    tensors = flat[FIRST:]
    if not (CELLS[how.cell].has_all_kernels or prepare(how.cell, x.dtype, x.device.type)):
        if is_recorded():
            raise NotImplementedError(f"per-sample gradients: there are no kernels of cell {how.cell} here")
        return fallback.layer(how, read)[:count]
    transformed = is_transformed(*tensors)
    if transformed and _nested_tangents():
        return fallback.layer(how, read)[:count]
    if is_recorded():
        _RECORDED.calls.append(_record(how, read))
        return _RECORDED.calls[-1].outputs[:count]
    if transformed:
        saves = states or (_is_differentiated(*tensors) and not _runs_again(how))
        return _Transformed.apply(how._replace(saves=saves), *flat)[:count]
    # What is traced or exported shall be saved, so it holds no Python function: backward through it is an error. The
    # flag, since to compiled code torch.compiler.is_exporting() was always true before torch 2.13.
    is_traced = torch.jit.is_tracing() or torch.compiler._is_exporting_flag
    if records_gradients(*tensors) and not is_traced:
        return _Layer.apply(how._replace(saves=states or not _runs_again(how)), states, *flat)
    saves_states_alone = states and not SIZES[how.cell]["is_normalized"]  # those cells save all or nothing
    y, h_n, c_n, _, saved_c = torch.ops.fastrnn.layer_forward(*read.inputs(how), states, saves_states_alone)
    return (y, h_n, c_n, saved_c)[:count]


class Recorded(NamedTuple):
    """A call whose gate gradients are to be looked at: the gradient of `read.steps`."""

    how: How
    read: Read
    outputs: tuple[Tensor, ...]  # y, h_n, c_n and the states of every step


_RECORDED = threading.local()


@contextlib.contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """A list that takes up each call that this thread makes."""
    calls: list[Recorded] = []
    _RECORDED.calls = calls
    try:
        yield calls
    finally:
        del _RECORDED.calls


def is_recorded() -> bool:
    return not torch.compiler.is_compiling() and hasattr(_RECORDED, "calls")


def _record(how: How, read: Read) -> Recorded:
    read = read._replace(steps=_zero_steps(how, read).requires_grad_())
    return Recorded(how, read, _Layer.apply(how, True, *read.flat()))


def _zero_steps(how: How, read: Read) -> Tensor:
    """`Read.steps`, one number that stands for all."""
    shape = how.directions, *read.x.shape[:2], SIZES[how.cell]["grads"], read.units(how)
    return read.x.new_zeros(()).expand(shape)


def records_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a call is inside of a `torch.func` transform, or has tangents."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or (
        forward_ad._current_level >= 0
        and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors if t is not None)
    )


def _runs_again(how: How) -> bool:
    """Whether nothing is kept but y, and backward begins with another forward pass: the products that are normalized
    cannot be computed from the states of a step alone."""
    return how.recompute and bool(SIZES[how.cell]["is_normalized"])


def _run_forward(how: How, read: Read) -> tuple[Tensor, ...]:
    """y, h_n and c_n, what is saved, and the states of every step."""
    runs_again = _runs_again(how)
    recompute = how.recompute and not runs_again
    y, h_n, c_n, saved, saved_c = torch.ops.fastrnn.layer_forward(*read.inputs(how), how.saves, recompute)
    return y, h_n, c_n, saved.new_empty(0, *saved.shape[1:]) if runs_again else saved, saved_c


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """Of a call inside of transforms, whether a gradient or a tangent may be asked for."""
    kinds = _transforms()
    is_batched = kinds and all(kind == TransformType.Vmap for kind in kinds)
    return not is_batched or records_gradients(*map(_bare, tensors))


def _transforms() -> list[Any]:
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]


def _nested_tangents() -> bool:
    """Whether there are tangents of tangents. PyTorch asks no rule of an `autograd.Function` for them; they are 0."""
    return _transforms().count(TransformType.Jvp) > 1


def _bare(tensor: Tensor | None) -> Tensor | None:
    """What transforms have wrapped, which alone knows whether it requires a gradient."""
    while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _refuse_transform(*args: object, **kwargs: object) -> NoReturn:
    # To Dynamo NotImplementedError is a graph break, and behind one inside of torch.func.vjp, of any function whatever,
    # torch 2.11 gives gradients of 0.
    gives_zeros = torch.__version__ < "2.12" and TransformType.Grad in _transforms()
    raise (RuntimeError if gives_zeros else NotImplementedError)(
        "fastrnn's ops themselves know no torch.func transforms (grad, vmap, jvp, ...): inside of torch.compile the "
        "transform has to be outside of what is compiled; fastrnn.reference.layer is in plain PyTorch operations"
    )


# The key that every op meets first inside of a transform, in compiled code too, where Python has no say.
_TRANSFORMS = torch.library.Library("fastrnn", "IMPL", "FuncTorchDynamicLayerFrontMode")
for _name in ("layer_forward", "layer_backward", "packed_forward"):
    _TRANSFORMS.impl(_name, _refuse_transform)


# ---- what autograd calls


def _primal(tensor: Tensor | None) -> Tensor | None:
    """Without its tangent: what a rule for tangents computes has none of its own."""
    return None if tensor is None else forward_ad.unpack_dual(tensor).primal


def _primals(ctx: Any) -> list[Any]:
    """What was saved, without tangents."""
    return list(map(_primal, ctx.saved_tensors))


class _Layer(Function):
    """A layer outside of transforms: y, h_n, c_n and, if they are asked for, the states of every step. Compiled code
    would make a gradient of them even where nobody uses them: zeros."""

    apply: ClassVar[Callable[..., Any]]  # torch's has no annotations

    @staticmethod
    def forward(ctx: Any, how: How, states: bool, *flat: Tensor | None) -> tuple[Tensor, ...]:
        read = read_of(flat)
        y, h_n, c_n, saved, saved_c = _run_forward(how, read)
        ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, y, saved, saved_c)
        return (y, h_n, c_n, saved_c) if states else (y, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *flat, y, saved, saved_c = ctx.saved_tensors
        grads += (None,) * (GRADS - len(grads))
        return None, None, *gradients(ctx.how, read_of(flat), grads, (y, saved, saved_c), ctx.needs_input_grad[2:])


class _Transformed(Function):
    """A layer inside of transforms: what `_Layer` gives, and what is saved."""

    apply: ClassVar[Callable[..., Any]]

    @staticmethod
    def forward(how: How, *flat: Tensor | None) -> tuple[Tensor, ...]:
        y, h_n, c_n, saved, saved_c = _run_forward(how, read_of(flat))
        return y, h_n, c_n, saved_c, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        how, *flat = inputs
        y, _, _, saved_c, saved = output
        ctx.how = how
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, y, saved, saved_c)
        ctx.save_for_forward(*flat, y, saved, saved_c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *flat, y, saved, saved_c = ctx.saved_tensors
        return None, *gradients(
            ctx.how, read_of(flat), (*grads[:4], None), (y, saved, saved_c), ctx.needs_input_grad[1:]
        )

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *flat, y, saved, saved_c = _primals(ctx)

        def of(*tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            *of_outputs, of_states = _tangents(ctx.how, read_of(flat), (y, saved, saved_c), read_of(tangents))
            return *of_outputs, of_states if ctx.how.saves else torch.zeros_like(saved_c), None

        return Batched(tangents).one_by_one(of) if any(map(is_batched, tangents)) else of(*tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, how: How, *flat: Tensor | None) -> tuple[Tensors, Dims]:
        members, (_, *dims) = info.batch_size, in_dims
        if any(dim is not None for dim in dims[READ:]):
            return one_by_one(lambda *tensors: _Transformed.apply(how, *tensors), flat, dims, members)
        folded = [fold(*each, members) for each in zip(flat, dims, ROWS, strict=False)]
        found = _Transformed.apply(how, *folded, *flat[READ:])
        return tuple(map(unfold, found, OUTPUT_ROWS, [members] * len(found))), OUTPUT_ROWS


class _Kept(Function):
    """y, the states and the values of every step, as a function of what the layer reads, from what a call has kept."""

    apply: ClassVar[Callable[..., Any]]

    @staticmethod
    def forward(how: How, *tensors: Any) -> tuple[Tensor, ...]:
        y, _, states = tensors[-3:]
        return y.view_as(y), states.view_as(states), values_of(how, read_of(tensors[:-3]), y, states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_states: Tensor | None, grad_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *flat, y, saved, states = ctx.saved_tensors
        grads = grad_y, None, None, grad_states, grad_values
        wanted = ctx.needs_input_grad[1:-3]
        return None, *gradients(ctx.how, read_of(flat), grads, (y, saved, states), wanted), None, None, None

    @staticmethod
    def jvp(ctx: Any, _how: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *flat, y, saved, states = _primals(ctx)
        read, directions, kept = read_of(flat), read_of(tangents[:-3]), (y, saved, states)
        of_y, _, _, of_states = of_outputs = _tangents(ctx.how, read, kept, directions)
        return of_y, of_states, _value_tangents(ctx.how, read, kept, directions, of_outputs)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, how: How, *tensors: Tensor | None) -> tuple[Tensors, Dims]:
        members, (_, *dims) = info.batch_size, in_dims
        if any(dim is not None for dim in dims[READ:-3]):
            return one_by_one(lambda *own: _Kept.apply(how, *own), tensors, dims, members)
        rows = *ROWS, *(None for _ in tensors[READ:-3]), *KEPT_ROWS
        folded = [fold(*each, members) for each in zip(tensors, dims, rows, strict=True)]
        return tuple(map(unfold, _Kept.apply(how, *folded), (1, 2, 2), [members] * 3)), (1, 2, 2)


def _tangents(how: How, read: Read, kept: Kept, directions: Read) -> tuple[Tensor, ...]:
    """Of y, h_n, c_n and the states of every step."""
    _check_masks(how, directions.masks is not None)
    if not fallback.has_tangent_kernels(how, read):
        return fallback.tangents(how, read, directions)
    with autocast.off(read.x.device.type):
        dtype = read.x.dtype
        if dtype != accumulator(dtype):  # 16 bits would do for none of what lies in between
            read, directions = (read_of(map(_widen, part.flat())) for part in (read, directions))
            y, _, _, states, saved = _Transformed.apply(how, *read.flat())
            kept = y, saved, states
        y, states, values = _Kept.apply(how, *read.flat(), *kept)
        *found, of_states = tangents_of(call, how, read, y, states, values, directions)
        return *(tangent.to(dtype) for tangent in found), of_states


def _widen(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(accumulator(tensor.dtype))


def _value_tangents(how: How, read: Read, kept: Kept, directions: Read, of_outputs: tuple[Tensor, ...]) -> Tensor:
    """Of the values of every step, given those of y and the states."""
    y, states, _ = _Kept.apply(how, *read.flat(), *kept)
    places = [place for place, direction in enumerate(directions.flat()) if direction is not None]
    moving, along = ([part.flat()[place] for place in places] for part in (read, directions))

    def function(y: Tensor, states: Tensor, *moving: Tensor) -> tuple[Tensor]:
        return (values_of(how, replaced(read, places, moving), y, states),)

    return fallback.pushed(function, [y, states, *moving], [of_outputs[0], of_outputs[3], *along])[0]


def second_of(
    how: How, read: Read, kept: Kept, grads: Tensors, directions: Read, places: list[int]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Of a backward pass with the vector g = `grads`: the tangents J(x) v for v = `directions`, and the gradients of
    g J(x) v by `read.flat()`, those that `places` names."""

    def function(*moving: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        now = replaced(read, places, moving)
        found = _tangents(how, now, kept, directions)
        if grads[4] is not None:
            found = *found, _value_tangents(how, now, kept, directions, found)
        return tuple(tangent for tangent, grad in zip(found, grads, strict=False) if grad is not None), found

    if not places:
        return (*function()[1], None)[:GRADS], (None,) * len(read.flat())
    _, pull, found = fallback.vjp(function, *(read.flat()[place] for place in places), has_aux=True)
    by_place = pull(tuple(grad for grad in grads if grad is not None))
    return (*found, None)[:GRADS], at(places, by_place, len(read.flat()))


class _Backward(Function):
    """A backward pass: the gradients of `Read.flat()` that are wanted, as a function of those of the outputs and of
    what the layer reads. What forward kept is a function of the latter, too."""

    apply: ClassVar[Callable[..., Any]]

    @staticmethod
    def forward(how: How, wanted: tuple[bool, ...], *tensors: Any) -> tuple[Tensor | None, ...]:
        grads, flat, kept = tensors[:GRADS], tensors[GRADS:-3], tensors[-3:]
        return _run_backward(how, read_of(flat), grads, kept, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        how, wanted, *tensors = inputs
        ctx.how, ctx.wanted = how, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        grads, read, kept = _Backward._saved(ctx.saved_tensors)
        wanted = ctx.needs_input_grad[2:]
        if all(direction is None for direction in directions):
            return None, None, *((None,) * len(wanted))
        places = [place for place, want in enumerate(wanted[GRADS:-3]) if want]

        def of(*directions: Tensor | None) -> tuple[Tensor | None, ...]:
            found, of_read = second_of(ctx.how, read, kept, grads, read_of(directions), places)
            return *(tangent if want else None for tangent, want in zip(found, wanted, strict=False)), *of_read

        found = Batched(directions).one_by_one(of) if any(map(is_batched, directions)) else of(*directions)
        return None, None, *found, *((None,) * len(kept))

    @staticmethod
    def jvp(ctx: Any, _how: None, _wanted: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grads, read, kept = _Backward._saved(_primals(ctx))
        of_grads, directions = tangents[:GRADS], tangents[GRADS:-3]
        found: Tensors = [None] * len(read.flat())
        if any(tangent is not None for tangent in of_grads):
            found = _Backward.apply(ctx.how, ctx.wanted, *of_grads, *read.flat(), *kept)
        if any(tangent is not None for tangent in directions):
            places = [place for place, want in enumerate(ctx.wanted) if want]
            _, others = second_of(ctx.how, read, kept, grads, read_of(directions), places)
            found = [b if a is None else a if b is None else a + b for a, b in zip(found, others, strict=True)]
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, how: How, wanted: tuple[bool, ...], *tensors: Any) -> tuple[Tensors, Dims]:
        members, (_, _, *dims) = info.batch_size, in_dims
        own_weights = any(dim is not None for dim in dims[GRADS + READ : -3])
        if own_weights or (any(wanted[READ:]) and not _have_steps(how, tensors)):
            return one_by_one(lambda *own: _Backward.apply(how, wanted, *own), tensors, dims, members)
        rows = *OUTPUT_ROWS, *ROWS, *(None for _ in wanted[READ:]), *KEPT_ROWS
        folded: list[Any] = [fold(*each, members) for each in zip(tensors, dims, rows, strict=True)]
        of_weights = any(wanted[READ:])
        now = list(wanted)
        now[READ:] = [False] * len(wanted[READ:])
        now[STEPS] = now[STEPS] or of_weights
        if now[STEPS] and folded[GRADS + STEPS] is None:
            folded[GRADS + STEPS] = _zero_steps(how, read_of(folded[GRADS:-3]))
        found = _Backward.apply(how, tuple(now), *folded)
        weights: Tensors = [None] * len(wanted[READ:])
        if of_weights:
            read, (y, _, states) = read_of(folded[GRADS:-3]), folded[-3:]
            weights = MemberGradients(how, read, y, states, found[STEPS], members).of_weights(wanted[READ:])
        result = [
            unfold(grad, at, members) if want else None for grad, at, want in zip(found, ROWS, wanted, strict=False)
        ]
        at = [None if grad is None else dim for grad, dim in zip(result, ROWS, strict=True)]
        return (*result, *weights), (*at, *(None if w is None else 0 for w in weights))

    @staticmethod
    def _saved(tensors: Iterable[Any]) -> tuple[Tensors, Read, Kept]:
        tensors = tuple(tensors)
        return tensors[:GRADS], read_of(tensors[GRADS:-3]), tensors[-3:]


def _have_steps(how: How, tensors: tuple[Any, ...]) -> bool:
    """Whether members' own gradients of weights can come of those of every step. A projection's cannot: dL/dh_t in
    full, which it is a product of, is not among these. Without kernels for tangents they have no derivatives."""
    read = read_of(tensors[GRADS:-3])
    if is_projected(read.inputs(how)):
        return False
    is_differentiated = (_is_differentiated if is_transformed(*tensors) else records_gradients)(*tensors)
    return fallback.has_tangent_kernels(how, read) or not is_differentiated


# ---- gradients


def gradients(how: How, read: Read, grads: Tensors, kept: Kept, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of `read.flat()`, those that are wanted, given those of the outputs of a layer. `kept` are y, what is saved, and
    the states of every step."""
    given = [grad for grad in grads if grad is not None]
    if not given:
        return (None,) * len(wanted)
    if not torch.compiler.is_compiling():
        if any(map(torch._C._functorch.is_legacy_batchedtensor, given)):
            return _of_batched(how, read, grads, kept, wanted)
        if torch.is_grad_enabled() or is_transformed(*given):
            found: tuple[Tensor | None, ...] = _Backward.apply(how, tuple(wanted), *grads, *read.flat(), *kept)
            return found
    return _run_backward(how, read, grads, kept, wanted)


def gradients_of_recorded(
    cell: str,
    directions: int,
    recompute: bool,
    is_step: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    flat: Tensors,
    grads: Tensors,
    kept: Tensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """What csrc/torch/recorded.cpp leaves to Python: the gradients of x, h0, c0 and each weight, given those of y, h_n
    and c_n. If `is_step`, x, the states, the outputs and y are those of a single step, without its dimension."""

    def sequence(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unsqueeze(0) if is_step else tensor

    x, h0, c0, *weights = flat
    read = read_of((lengths, resets, *map(sequence, (x, h0, c0)), None, None, *weights))
    y, saved, states = kept
    of_outputs = (*map(sequence, grads), None, None)
    all_wanted = (False, False, *wanted[:3], False, False, *wanted[3:])
    all_kept: Any = sequence(y), saved, states
    found = gradients(How(cell, directions, recompute), read, of_outputs, all_kept, all_wanted)
    of_inputs = [grad if grad is None or not is_step else grad.squeeze(0) for grad in found[FIRST : FIRST + 3]]
    return [*of_inputs, *found[READ:]]


def _run_backward(
    how: How, read: Read, grads: Tensors, kept: Kept, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    *of_outputs, of_states, of_values = grads
    if of_states is not None and CELLS[how.cell].carried and not read.x.is_cpu:
        return fallback.gradients(how, read, grads[:4], wanted)
    of_op, (of_masks, of_steps) = [*wanted[FIRST : FIRST + 3], *wanted[READ:]], wanted[STEPS - 1 : STEPS + 1]
    _check_masks(how, of_masks)
    with_steps = of_steps or of_masks
    options = (of_states, with_steps, of_values) if with_steps or not (of_states is of_values is None) else ()
    if _runs_again(how):
        kept = kept[0], *torch.ops.fastrnn.layer_forward(*read.inputs(how), True, False)[3:]
    found = torch.ops.fastrnn.layer_backward(*of_outputs, *read.inputs(how), *kept, of_op, *options)
    steps = found.pop() if with_steps else None
    masks = _mask_gradients(how, read.masks, steps) if of_masks else None
    found = [grad if want else None for grad, want in zip(found, of_op, strict=True)]
    return None, None, *found[:3], masks, steps if of_steps else None, *found[3:]


def _check_masks(how: How, are_varied: bool) -> None:
    if are_varied and not CELLS[how.cell].mask_gradients:
        raise ValueError("masks: expected tensors without gradients and tangents; a mask has none: detach it")


def _mask_gradients(how: How, masks: Any, steps: Any) -> Tensor:
    first, *_ = places = SIZES[how.cell]["mask_grad"]
    is_row = places == list(range(first, first + len(places)))
    found: Tensor = (steps[:, :, :, first : first + len(places)] if is_row else steps[:, :, :, places]).flatten(-2)
    return found if masks.shape[1] == found.shape[1] else found.sum(1, keepdim=True)


def _of_batched(how: How, read: Read, grads: Tensors, kept: Kept, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    batched, others = Batched(grads), (*read.flat(), *kept)
    dims = *batched.dims, *(None for _ in others)
    tensors = *batched.tensors, *others
    return batched.batch(*_Backward.vmap(batched, (None, None, *dims), how, tuple(wanted), *tensors))
