"""The tangents of a layer: a call of the layer of its tangents (dual.py), whose coefficients, what each step computes
with, are made of all steps at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn import dual, fallback, reference
from fastrnn.cells import CELLS
from fastrnn.read import How, Read, read_of
from fastrnn.reference import Weights
from fastrnn.schema import SIZES, accumulator, add_cell, unflatten


def tangents_of(layer, how: How, read: Read, y: Tensor, states: Tensor, tangents: Read) -> tuple[Tensor, ...]:
    """The tangents of y, h_n, c_n and of the states of every step, as a differentiable function of all arguments.

    `layer` computes a layer, as `fastrnn.autograd.call`; `y` and `states` are what this one puts out. A tangent that is
    None is 0.
    """
    if not fallback.has_tangent_kernels(how, read):
        return fallback.tangents(how, read, tangents)
    dtype = read.x.dtype
    if dtype != accumulator(dtype):  # 16 bits would do for none of the steps in between
        read, tangents = (read_of([_widen(t) for t in part.flat()]) for part in (read, tangents))
        y, _, _, states = layer(how, read, states=True)
        found = tangents_of(layer, how, read, y, states, tangents)
        return *(tangent.to(dtype) for tangent in found[:3]), found[3]
    with_weights = tangents.steps is not None or any(t is not None for t in tangents.weights)
    plan = dual.plan(how.cell, with_weights)
    if plan.cell.name not in CELLS:
        add_cell(plan.cell)
    weights, of_weights = (unflatten(how.cell, part.weights, how.directions) for part in (read, tangents))
    with torch.autocast(read.x.device.type, enabled=False):
        masks = []
        for d, w in enumerate(weights):
            values = Values(how, read, y, states, w, d)
            values.add_tangents(of_weights[d], tangents)
            masks.append(values.masks(plan))
        x = tangents.x
        flat = []
        for w in weights:
            w_ih = w.w_ih if x is not None else w.w_ih[:, :0]
            flat += [w_ih] if w.w_hh is None else [w_ih, w.w_hh]
        x = read.x[:, :, :0] if x is None else x
        own = Read(read.lengths, read.resets, x, tangents.h0, tangents.c0, torch.stack(masks), None, flat)
        return layer(How(plan.cell.name, how.directions), own, states=True)


def _widen(tensor: Tensor | None) -> Tensor | None:
    is_narrow = tensor is not None and tensor.is_floating_point()
    return tensor.to(accumulator(tensor.dtype)) if is_narrow else tensor


class Values:
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
            is_moved = self.steps is not None and vector is not None
            found = part + self.steps[:, :, vector] if is_moved else part
            self.found[kind, place] = found if isinstance(found, Tensor) else self.x.new_zeros(())

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
