"""Derivatives of a layer, of every kind: first and second gradients, forward mode, and `torch.func`'s transforms.

A layer is a function of what it reads (`Read`), and so is its backward pass; each is an `autograd.Function` with rules:

- gradients of a layer: one call of `layer_backward`;
- tangents of a layer: one call of the layer of its tangents (dual.py), whose coefficients are made of all steps at once;
- gradients and tangents of a backward pass, whose value is the vector g times the Jacobian J(x): since g J(x) v is the
  product of g with the tangents in the direction v, they are the gradient of that, and the tangents themselves;
- vmap: rows of all members side by side, in one call. Members' own gradients of weights that they share are products of
  the gate gradients of every step with inputs and states, one for each member. Members with weights of their own are a
  call each.

Where there are no kernels for it (GPUs, projections), `fastrnn.reference` is differentiated instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import linear

from fastrnn import codegen, dual, reference
from fastrnn.cells import CELLS
from fastrnn.reference import Weights
from fastrnn.schema import SIZES, Inputs, accumulator, add_cell, is_projected, prepare, unflatten


class How(NamedTuple):
    """What of a call is no tensor."""

    cell: str
    directions: int
    recompute: bool = False
    saves: bool = True  # what backward needs


class Read(NamedTuple):
    """The tensors that a layer reads, and where their rows are: the dimension of B. The last is a list, in a call as the
    arguments after the others.

    `steps` [D, T, B, J, H] is never read: it stands for what is added to the products and to what is given in each step,
    all zero, so that a layer has gradients of it: those of every step, as kGrads in csrc/cells/cell.h lists them.
    """

    lengths: Tensor | None
    resets: Tensor | None
    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    masks: Tensor | None
    steps: Tensor | None
    weights: list[Tensor]

    def inputs(self, how: How) -> Inputs:
        x, h0, c0, weights = self.x, self.h0, self.c0, list(self.weights)
        return Inputs(x, h0, c0, weights, how.directions, self.lengths, self.resets, self.masks, how.cell)

    def flat(self) -> tuple:
        return *self[:-1], *self.weights


READ = len(Read._fields) - 1  # without the weights
FIRST = Read._fields.index("x")  # of those that have gradients
ROWS = Read(0, 1, 1, 1, 1, 2, 2, [])
OUTPUT_ROWS = 1, 1, 1, 2, 2  # of y, h_n, c_n, the states of every step, and what is saved


def read_of(flat) -> Read:
    return Read(*flat[:READ], list(flat[READ:]))


# ---- a call


def call(how: How, read: Read, states: bool = False) -> tuple[Tensor, ...]:
    """y, h_n and c_n of a layer, and with `states` the states besides h of every step [D, T, B, K*H]; see
    `fastrnn.ops.layer`."""
    count = 4 if states else 3
    x, tensors = read.x, read.flat()[FIRST:]
    if not (CELLS[how.cell].has_all_kernels or prepare(how.cell, x.dtype, x.device.type)):
        return _reference(how, read)[:count]
    if is_transformed(*tensors):
        saves = how._replace(saves=_is_differentiated(*tensors))
        return _Transformed.apply(saves, *read.flat())[:count]
    # What is traced or exported shall be saved, so it holds no Python function: backward through it is an error.
    is_traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if records_gradients(*tensors) and not is_traced:
        return _Layer.apply(how, *read.flat())[:count]
    y, h_n, c_n, _, saved_c = torch.ops.fastrnn.layer_forward(*read.inputs(how), states)
    return (y, h_n, c_n, saved_c)[:count]


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


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """Of a call inside of transforms, whether a gradient or a tangent may be asked for."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    is_batched = all(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)
    return not (stack and is_batched) or records_gradients(*tensors)


def _refuse_transform(*args, **kwargs):
    raise NotImplementedError(
        "fastrnn's ops themselves know no torch.func transforms (grad, vmap, jvp, ...): inside of torch.compile the "
        "transform has to be outside of what is compiled; fastrnn.reference.layer is in plain PyTorch operations"
    )


# The key that every op meets first inside of a transform, in compiled code too, where Python has no say.
_TRANSFORMS = torch.library.Library("fastrnn", "IMPL", "FuncTorchDynamicLayerFrontMode")
for _name in ("layer_forward", "layer_backward", "packed_forward"):
    _TRANSFORMS.impl(_name, _refuse_transform)


# ---- through the equation


def _reference(how: How, read: Read) -> tuple[Tensor, ...]:
    """A layer in torch's operations, in the accumulator's type: y, h_n, c_n and the states of every step."""
    codegen.check_unchanged(CELLS[how.cell])
    dtype = read.x.dtype
    x, h0, c0, masks = (_cast(t, accumulator(dtype)) for t in (read.x, read.h0, read.c0, read.masks))
    weights = unflatten(how.cell, [_cast(w, accumulator(dtype)) for w in read.weights], how.directions)
    with torch.autocast(x.device.type, enabled=False):
        *outputs, states = reference.layer_with_states(how.cell, x, h0, c0, weights, read.lengths, read.resets, masks)
    return *(output.to(dtype) for output in outputs), states


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _has_tangent_kernels(how: How, read: Read) -> bool:
    return read.x.is_cpu and not is_projected(read.inputs(how))


def _through_reference(how: How, read: Read, tangents: Read) -> tuple[Tensor, ...]:
    """The tangents of `_reference`'s outputs."""
    if tangents.steps is not None:
        raise NotImplementedError("derivatives of per-sample gradients: there are none here (GPUs, projections)")
    pairs = [(t, tangent) for t, tangent in zip(read.flat(), tangents.flat(), strict=True) if tangent is not None]
    places = [i for i, tangent in enumerate(tangents.flat()) if tangent is not None]

    def function(*moving):
        flat = list(read.flat())
        for place, tensor in zip(places, moving, strict=True):
            flat[place] = tensor
        return _reference(how, read_of(flat))

    moving, directions = (tuple(column) for column in zip(*pairs, strict=True))
    found, pull = torch.func.vjp(function, *moving)
    # g J is linear in g, and its derivative in the direction v is J v; torch.func.jvp does not nest in forward mode.
    return torch.func.vjp(lambda *g: pull(g), *map(torch.zeros_like, found))[1](directions)


# ---- tangents


def tangents_of(how: How, read: Read, y: Tensor, states: Tensor, tangents: Read) -> tuple[Tensor, ...]:
    """The tangents of y, h_n, c_n and of the states of every step, as a differentiable function of all arguments; `y` and
    `states` are what the layer puts out. A tangent that is None is 0."""
    if not _has_tangent_kernels(how, read):
        return _through_reference(how, read, tangents)
    dtype = read.x.dtype
    if dtype != accumulator(dtype):  # 16 bits would do for none of the steps in between
        read, tangents = (read_of([_widen(t) for t in part.flat()]) for part in (read, tangents))
        y, _, _, states = call(how, read, states=True)
        found = tangents_of(how, read, y, states, tangents)
        return *(tangent.to(dtype) for tangent in found[:3]), found[3]
    with_weights = tangents.steps is not None or any(t is not None for t in tangents.weights)
    plan = dual.plan(how.cell, with_weights)
    if plan.cell.name not in CELLS:
        add_cell(plan.cell)
    weights, of_weights = (unflatten(how.cell, part.weights, how.directions) for part in (read, tangents))
    with torch.autocast(read.x.device.type, enabled=False):
        masks = []
        for d, w in enumerate(weights):
            values = _Values(how, read, y, states, w, d)
            values.add_tangents(of_weights[d], tangents)
            masks.append(values.masks(plan))
        x = tangents.x
        flat = []
        for w in weights:
            w_ih = w.w_ih if x is not None else w.w_ih[:, :0]
            flat += [w_ih] if w.w_hh is None else [w_ih, w.w_hh]
        x = read.x[:, :, :0] if x is None else x
        own = Read(read.lengths, read.resets, x, tangents.h0, tangents.c0, torch.stack(masks), None, flat)
        return call(How(plan.cell.name, how.directions), own, states=True)


def _widen(tensor: Tensor | None) -> Tensor | None:
    is_narrow = tensor is not None and tensor.is_floating_point()
    return tensor.to(accumulator(tensor.dtype)) if is_narrow else tensor


class _Values:
    """What the steps of one direction compute with, all of them at once; by (kind, index) as in `dual.Plan`."""

    def __init__(self, how: How, read: Read, y: Tensor, states: Tensor, w: Weights, d: int):
        self.cell, self.sizes, self.d = CELLS[how.cell], SIZES[how.cell], d
        self.shape = *read.x.shape[:2], read.weights[0].shape[0] // self.sizes["gates"]
        self.input_gates, self.recurrent, self.first = reference.products_of(self.cell)
        self.x = active_input(read)
        self.h = before(y.unflatten(-1, (how.directions, -1))[:, :, d], read.h0, read, d)
        self.found = {("state", 0): self.h}
        if self.cell.carried:
            carried = before(states[d], read.c0, read, d).chunk(self.cell.carried, dim=-1)
            self.found |= {("state", i + 1): c for i, c in enumerate(carried)}
        self.steps = None if read.steps is None else read.steps[d]
        self._add(w, read.masks)
        self.operand = self._run_second(w) if len(self.recurrent) > self.first else None
        self.found |= self._sums()

    def add_tangents(self, w: Weights, tangents: Read) -> None:
        """What the tangents of weights, masks and `steps` add to the tangents of a step, by "add ..."."""
        values, self.found, of_value = self.found, {}, self.steps
        self.steps = None if tangents.steps is None else tangents.steps[self.d]
        self._add(w, tangents.masks)
        if len(self.recurrent) > self.first:
            self._put_products(self.operand, w, self.first, len(self.recurrent))
        self.found |= self._sums()
        self.found = values | {(f"add {kind}", i): value for (kind, i), value in self.found.items()}
        self.steps = of_value

    def masks(self, plan: dual.Plan) -> Tensor:
        """`[T, B, M*H]` of the plan's cell."""
        return torch.cat([self.found[mask].expand(self.shape) for mask in plan.masks], dim=-1)

    def _add(self, w: Weights, masks: Tensor | None) -> None:
        grads, count = self.sizes, len(self.cell.masks)
        self._put("input", self.input_gates, self._product(self.x, w.w_ih, w.b_ih), grads["input_grad"])
        units = range(len(self.cell.unit_weights))
        self._put("unit", units, None if w.w_own is None else w.w_own.flatten(), grads["unit_grad"])
        of_masks = None if masks is None else masks[self.d]
        self._put("mask", range(count), of_masks, grads.get("mask_grad", [None] * count))
        self._put_products(self.h, w, 0, self.first)

    def _put_products(self, operand: Tensor, w: Weights, begin: int, end: int) -> None:
        """Recurrent products number `begin` to `end`."""
        if begin == end:
            return
        H = self.shape[2]
        rows = [None if t is None else t[begin * H : end * H] for t in (w.w_hh, w.b_hh)]
        vectors = self.sizes["recurrent_grad"][begin:end]
        own = [None if vector in self.sizes["input_grad"] else vector for vector in vectors]
        self._put("product", self.recurrent[begin:end], self._product(operand, *rows), own)

    def _put(self, kind: str, places, value: Tensor | None, vectors: list) -> None:
        """`value` [..., count*H] by place, with what `steps` adds to it."""
        values = [0.0] * len(places) if value is None else value.chunk(len(places), dim=-1) if places else []
        for place, part, vector in zip(places, values, vectors, strict=True):
            if self.steps is not None and vector is not None:
                part = part + self.steps[:, :, vector]
            self.found[kind, place] = part if isinstance(part, Tensor) else self.x.new_zeros(())

    @staticmethod
    def _product(operand: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if weight is None:
            return bias
        return linear(operand, weight, bias)

    def _run_second(self, w: Weights) -> Tensor:
        """The operand of the second product, by the equation."""
        operands = []

        def product_of(name):
            gate = self.cell.gates.index(name)
            return lambda operand: self._product_of(gate, operand, operands, w)

        x = dual.ByName(lambda name: self.found["input", self.cell.gates.index(name)])
        names = ("state", len(self.cell.states)), ("unit", len(self.cell.unit_weights)), ("mask", len(self.cell.masks))
        self.cell.call(
            x, dual.ByName(product_of), *(self.found[kind, i] for kind, count in names for i in range(count))
        )
        return operands[0]

    def _product_of(self, gate: int, operand: Tensor, operands: list, w: Weights) -> Tensor:
        if self.recurrent.index(gate) >= self.first and not operands:
            operands.append(operand)
            self._put_products(operand, w, self.first, len(self.recurrent))
        return self.found["product", gate]

    def _sums(self) -> dict:
        both = [gate for gate in self.input_gates if gate in self.recurrent]
        return {("sum", gate): self.found["input", gate] + self.found["product", gate] for gate in both}


def active_input(read: Read) -> Tensor:
    """x, with zeros where a row is finished: what stands there must not reach a sum, not even as NaN * 0."""
    if read.lengths is None:
        return read.x
    times = torch.arange(read.x.shape[0], device=read.x.device)[:, None]
    return torch.where((times < read.lengths)[:, :, None], read.x, 0)


def before(states: Tensor, initial: Tensor | None, read: Read, d: int) -> Tensor:
    """`[T, B, F]`: the states that direction d has before each time, of those that it has after it and `initial`
    [D, B, F]."""
    T = states.shape[0]
    if T == 0:
        return states
    start = (torch.zeros_like(states[0]) if initial is None else initial[d].to(states.dtype))[None]
    found = torch.cat([start, states[:-1]] if d == 0 else [states[1:], start])
    restarts = read.resets
    if d == 1:
        if read.lengths is not None:
            goes_on = torch.arange(1, T + 1, device=states.device)[:, None] < read.lengths
            found = torch.where(goes_on[:, :, None], found, start)
        if restarts is not None:
            restarts = torch.cat([restarts[1:], torch.zeros_like(restarts[:1])])
            restarts = restarts & goes_on if read.lengths is not None else restarts
    return found if restarts is None else torch.where(restarts[:, :, None], 0, found)


def second_of(how: How, read: Read, tangents: Read, places: list[int]):
    """Of a backward pass: the tangents J(x) v for v = `tangents`, and a function from the vector g to the gradients of
    g J(x) v by those of `read.flat()` that `places` names."""

    def function(*moving):
        flat = list(read.flat())
        for place, tensor in zip(places, moving, strict=True):
            flat[place] = tensor
        now = read_of(flat)
        y, states = None, None
        if _has_tangent_kernels(how, now):
            y, _, _, states = call(how, now, states=True)
        return tangents_of(how, now, y, states, tangents)

    found, pull = torch.func.vjp(function, *(read.flat()[place] for place in places))

    def gradients(grads):
        return pull(tuple(torch.zeros_like(t) if g is None else g for t, g in zip(found, grads, strict=True)))

    return found, gradients


# ---- gradients


def gradients(how: How, read: Read, grads, kept, wanted) -> tuple[Tensor | None, ...]:
    """Of `read.flat()`, those that are wanted, given those of the outputs of a layer, of which `kept` are y, saved and the
    states of every step."""
    if all(grad is None for grad in grads):
        return (None,) * len(wanted)
    if not torch.compiler.is_compiling():
        if any(map(_is_batched, grads)):
            return _of_batched(how, read, grads, kept, wanted)
        if torch.is_grad_enabled() or is_transformed(*grads, *read.flat()):
            return _Backward.apply(how, tuple(wanted), *grads, *read.flat(), *kept)
    return _run_backward(how, read, grads, kept, wanted)


def _run_backward(how: How, read: Read, grads, kept, wanted) -> tuple[Tensor | None, ...]:
    *of_outputs, of_states = grads
    flags = Read(*wanted[:READ], list(wanted[READ:]))
    if of_states is not None and CELLS[how.cell].carried and not read.x.is_cpu:
        return _gradients_through_reference(how, read, grads, wanted)
    wanted_by_op = [flags.x, flags.h0, flags.c0, *flags.weights]
    options = (of_states, flags.steps or flags.masks) if of_states is not None or flags.steps or flags.masks else ()
    found = torch.ops.fastrnn.layer_backward(*of_outputs, *read.inputs(how), *kept, wanted_by_op, *options)
    steps = found.pop() if len(found) > len(wanted_by_op) else None
    masks = _mask_gradients(how, read.masks, steps) if flags.masks else None
    found = [grad if want else None for grad, want in zip(found, wanted_by_op, strict=True)]
    return None, None, *found[:3], masks, steps if flags.steps else None, *found[3:]


def _mask_gradients(how: How, masks: Tensor, steps: Tensor) -> Tensor:
    first, *_ = places = SIZES[how.cell]["mask_grad"]
    found = steps[:, :, :, first : first + len(places)].flatten(-2)
    return found if masks.shape[1] == found.shape[1] else found.sum(1, keepdim=True)


def _gradients_through_reference(how: How, read: Read, grads, wanted) -> tuple[Tensor | None, ...]:
    places = [place for place, want in enumerate(wanted) if want]

    def function(*moving):
        flat = list(read.flat())
        for place, tensor in zip(places, moving, strict=True):
            flat[place] = tensor
        return _reference(how, read_of(flat))

    found, pull = torch.func.vjp(function, *(read.flat()[place] for place in places))
    by_place = pull(tuple(torch.zeros_like(t) if g is None else g for t, g in zip(found, grads, strict=True)))
    return _at(places, by_place, len(wanted))


def _at(places: list[int], values, count: int) -> tuple:
    by_place = dict(zip(places, values, strict=True))
    return tuple(by_place.get(place) for place in range(count))


class _Batched:
    """Tensors that are batched by `is_grads_batched` and its like, which is older than torch.func and has no rules."""

    def __init__(self, tensors):
        self.level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        self.tensors = [torch._remove_batch_dim(t, self.level, 0, 0) if _is_batched(t) else t for t in tensors]
        self.dims = [0 if _is_batched(t) else None for t in tensors]
        if any(map(_is_batched, self.tensors)):
            raise NotImplementedError("is_grads_batched: expected tensors that are batched once; use torch.func.vmap")
        self.batch_size = next(t.shape[0] for t, dim in zip(self.tensors, self.dims, strict=True) if dim == 0)

    def batch(self, tensors, dims) -> tuple[Tensor | None, ...]:
        pairs = zip(tensors, dims, strict=True)
        return tuple(t if dim is None else torch._add_batch_dim(t, dim, self.level) for t, dim in pairs)

    def one_by_one(self, function) -> tuple[Tensor | None, ...]:
        """`function` of the tensors of each member."""
        return self.batch(*_one_by_one(function, self.tensors, self.dims, self.batch_size))


def _is_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _of_batched(how: How, read: Read, grads, kept, wanted) -> tuple[Tensor | None, ...]:
    batched, others = _Batched(grads), (*read.flat(), *kept)
    dims = *batched.dims, *(None for _ in others)
    arguments = how, tuple(wanted), *batched.tensors, *others
    return batched.batch(*_Backward.vmap(batched, (None, None, *dims), *arguments))


# ---- rules for members of a batch of calls


def _fold(tensor: Tensor | None, dim: int | None, rows: int, members: int) -> Tensor | None:
    """Rows of all members side by side, in dimension `rows`, from members in dimension `dim`, or the same for all."""
    if tensor is None:
        return None
    if dim is not None:
        return tensor.movedim(dim, rows).flatten(rows, rows + 1)
    shape = *tensor.shape[:rows], members, *tensor.shape[rows:]
    return tensor.unsqueeze(rows).expand(shape).flatten(rows, rows + 1)


def _unfold(tensor: Tensor | None, rows: int, members: int) -> Tensor | None:
    return None if tensor is None else tensor.unflatten(rows, (members, tensor.shape[rows] // members))


def _member(tensor: Tensor | None, dim: int | None, index: int) -> Tensor | None:
    return tensor if dim is None else tensor.select(dim, index)


def _one_by_one(function, tensors, dims, members: int):
    """`function` of the tensors of each member, its results stacked, and their dimensions of members."""
    found = [
        function(*(_member(tensor, dim, i) for tensor, dim in zip(tensors, dims, strict=True))) for i in range(members)
    ]
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True))
    return stacked, tuple(None if column is None else 0 for column in stacked)


# ---- what autograd calls


def _primal(tensor: Tensor | None) -> Tensor | None:
    """Without its tangent: what a rule for tangents computes has none of its own."""
    return None if tensor is None else forward_ad.unpack_dual(tensor).primal


class _Layer(Function):
    """A layer outside of transforms: y, h_n, c_n and the states of every step."""

    @staticmethod
    def forward(ctx, how, *flat):
        read = read_of(flat)
        y, h_n, c_n, saved, saved_c = torch.ops.fastrnn.layer_forward(*read.inputs(how), True, how.recompute)
        ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, y, saved, saved_c)
        return y, h_n, c_n, saved_c

    @staticmethod
    def backward(ctx, *grads):
        *flat, y, saved, saved_c = ctx.saved_tensors
        return None, *gradients(ctx.how, read_of(flat), grads, (y, saved, saved_c), ctx.needs_input_grad[1:])


class _Transformed(Function):
    """A layer inside of transforms: what `_Layer` gives, and what is saved."""

    @staticmethod
    def forward(how, *flat):
        read = read_of(flat)
        y, h_n, c_n, saved, saved_c = torch.ops.fastrnn.layer_forward(*read.inputs(how), how.saves, how.recompute)
        return y, h_n, c_n, saved_c, saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        how, *flat = inputs
        y, _, _, saved_c, saved = output
        ctx.how = how
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, y, saved, saved_c)
        ctx.save_for_forward(*flat, y, saved, saved_c)

    @staticmethod
    def backward(ctx, *grads):
        *flat, y, saved, saved_c = ctx.saved_tensors
        return None, *gradients(ctx.how, read_of(flat), grads[:4], (y, saved, saved_c), ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx, _, *tangents):
        *flat, y, _, saved_c = map(_primal, ctx.saved_tensors)

        def of(*tangents):
            return *tangents_of(ctx.how, read_of(flat), y, saved_c, read_of(tangents)), None

        return _Batched(tangents).one_by_one(of) if any(map(_is_batched, tangents)) else of(*tangents)

    @staticmethod
    def vmap(info, in_dims, how, *flat):
        members, (_, *dims) = info.batch_size, in_dims
        if any(dim is not None for dim in dims[READ:]):
            return _one_by_one(lambda *tensors: _Transformed.apply(how, *tensors), flat, dims, members)
        rows = zip(flat, dims, ROWS.flat(), strict=False)
        folded = [_fold(tensor, dim, at, members) for tensor, dim, at in rows]
        found = _Transformed.apply(how, *folded, *flat[READ:])
        return tuple(map(_unfold, found, OUTPUT_ROWS, [members] * len(found))), OUTPUT_ROWS


GRADS = 4  # of y, h_n, c_n and the states of every step
KEPT_ROWS = 1, 2, 2  # of y, saved and saved_c


class _Backward(Function):
    """A backward pass: the gradients of `Read.flat()` that are wanted, as a function of those of the outputs and of what the
    layer reads. What forward kept is a function of the latter, too."""

    @staticmethod
    def forward(how, wanted, *tensors):
        grads, flat, kept = tensors[:GRADS], tensors[GRADS:-3], tensors[-3:]
        return _run_backward(how, read_of(flat), grads, kept, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        how, wanted, *tensors = inputs
        ctx.how, ctx.wanted = how, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *directions):
        grads, read, kept = _Backward._saved(ctx.saved_tensors)
        wanted = ctx.needs_input_grad[2:]
        if all(direction is None for direction in directions):
            return None, None, *((None,) * len(wanted))
        places = [place for place, want in enumerate(wanted[GRADS:-3]) if want]

        def of(*directions):
            found, pull = second_of(ctx.how, read, read_of(directions), places)
            of_grads = [tangent if want else None for tangent, want in zip(found, wanted, strict=False)]
            return *of_grads, *_at(places, pull(grads) if places else (), len(read.flat()))

        is_batched = any(map(_is_batched, directions))
        found = _Batched(directions).one_by_one(of) if is_batched else of(*directions)
        return None, None, *found, *((None,) * len(kept))

    @staticmethod
    def jvp(ctx, _how, _wanted, *tangents):
        grads, read, kept = _Backward._saved(map(_primal, ctx.saved_tensors))
        of_grads, directions = tangents[:GRADS], tangents[GRADS:-3]
        found = [None] * len(read.flat())
        if any(tangent is not None for tangent in of_grads):
            found = _Backward.apply(ctx.how, ctx.wanted, *of_grads, *read.flat(), *kept)
        if any(tangent is not None for tangent in directions):
            places = [place for place, want in enumerate(ctx.wanted) if want]
            _, pull = second_of(ctx.how, read, read_of(directions), places)
            others = _at(places, pull(grads), len(found))
            found = [b if a is None else a if b is None else a + b for a, b in zip(found, others, strict=True)]
        return tuple(found)

    @staticmethod
    def vmap(info, in_dims, how, wanted, *tensors):
        members, (_, _, *dims) = info.batch_size, in_dims
        own_weights = any(dim is not None for dim in dims[GRADS + READ : -3])
        read = read_of(tensors[GRADS:-3])
        # dL/dh_t in full, which the gradient of a projection is a product of, is not among those of every step.
        if own_weights or (any(wanted[READ:]) and is_projected(read.inputs(how))):
            return _one_by_one(lambda *own: _Backward.apply(how, wanted, *own), tensors, dims, members)
        rows = *OUTPUT_ROWS[:GRADS], *ROWS.flat(), *(None for _ in read.weights), *KEPT_ROWS
        folded = [
            tensor if at is None else _fold(tensor, dim, at, members)
            for tensor, dim, at in zip(tensors, dims, rows, strict=True)
        ]
        of_weights = any(wanted[READ:])
        now = list(wanted)
        now[READ:] = [False] * len(read.weights)
        now[READ - 1] = now[READ - 1] or of_weights
        found = _Backward.apply(how, tuple(now), *folded)
        weights = [None] * len(read.weights)
        if of_weights:
            read, kept = read_of(folded[GRADS:-3]), folded[-3:]
            weights = MemberGradients(how, read, kept, found[READ - 1], members).of_weights(wanted[READ:])
        result = [
            _unfold(grad, at, members) if want else None
            for grad, at, want in zip(found, ROWS.flat(), wanted, strict=False)
        ]
        at = [None if grad is None else dim for grad, dim in zip(result, ROWS.flat(), strict=True)]
        return (*result, *weights), (*at, *(None if w is None else 0 for w in weights))

    @staticmethod
    def _saved(tensors) -> tuple[tuple, Read, tuple]:
        tensors = tuple(tensors)
        return tensors[:GRADS], read_of(tensors[GRADS:-3]), tensors[-3:]


class MemberGradients:
    """The gradients of shared weights, for each of N members whose rows are side by side: products of the gate gradients
    of every step, `steps`, with what they were multiplied with."""

    def __init__(self, how: How, read: Read, kept, steps: Tensor, members: int):
        self.how, self.read, self.kept, self.steps, self.members = how, read, kept, steps, members
        self.sizes = SIZES[how.cell]

    def of_weights(self, wanted) -> list[Tensor | None]:
        """By weight, [N, ...]; None: not wanted."""
        count = len(self.read.weights)
        found: list[Tensor | None] = [None] * count
        for d, places in enumerate(unflatten(self.how.cell, list(range(count)), self.how.directions)):
            makers = {
                "w_ih": self._w_ih,
                "w_hh": self._w_hh,
                "b_ih": self._b_ih,
                "b_hh": self._b_hh,
                "w_own": self._own,
            }
            for name, make in makers.items():
                place = getattr(places, name)
                if place is not None and wanted[place]:
                    found[place] = make(d)
        return found

    def factors(self, d: int) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
        """By weight, pairs [N, T*B, rows] and [N, T*B, columns] (None: ones) whose products, one below the other, are its
        gradient."""
        first = self.sizes["first_gates"]
        recurrent, inputs = self.sizes["recurrent_grad"], self._vectors(d, self.sizes["input_grad"])
        found = {"w_ih": [(inputs, self._split(active_input(self.read)))], "b_ih": [(inputs, None)]}
        products = []
        if first:
            products.append((self._vectors(d, recurrent[:first]), self._split(self._h(d))))
        if self.sizes["second_gates"]:
            products.append((self._vectors(d, recurrent[first:]), self._split(self._operand(d))))
        found |= {"w_hh": products, "b_hh": [(a, None) for a, _ in products]}
        return found

    def _vectors(self, d: int, places: list[int]) -> Tensor:
        """[N, T*B, count*H]"""
        first, count = places[0], len(places)
        in_order = places == list(range(first, first + count))
        vectors = self.steps[d][:, :, first : first + count] if in_order else self.steps[d][:, :, places]
        return self._split(vectors.flatten(-2))

    def _split(self, rows: Tensor) -> Tensor:
        """[T, N*B, F] as [N, T*B, F]"""
        return _unfold(rows, 1, self.members).movedim(1, 0).flatten(1, 2)

    def _product(self, a: Tensor, b: Tensor | None) -> Tensor:
        return a.sum(1) if b is None else a.transpose(1, 2) @ b

    def _w_ih(self, d):
        return self._product(self._vectors(d, self.sizes["input_grad"]), self._split(active_input(self.read)))

    def _b_ih(self, d):
        return self._product(self._vectors(d, self.sizes["input_grad"]), None)

    def _w_hh(self, d):
        return torch.cat([self._product(*pair) for pair in self.factors(d)["w_hh"]], dim=1)

    def _b_hh(self, d):
        return self._product(self._vectors(d, self.sizes["recurrent_grad"]), None)

    def _own(self, d):
        found = self._product(self._vectors(d, self.sizes["unit_grad"]), None)
        return found.unflatten(1, (self.sizes["unit_weights"], -1))

    def _h(self, d: int) -> Tensor:
        own = self.kept[0].unflatten(-1, (self.how.directions, -1))[:, :, d]
        return before(own, self.read.h0, self.read, d)

    def _operand(self, d: int) -> Tensor:
        weights = unflatten(self.how.cell, self.read.weights, self.how.directions)
        return _Values(self.how, self.read, self.kept[0], self.kept[2], weights[d], d).operand
