"""The tangents of a layer: a call of the layer of its tangents (dual.py), whose coefficients, what each step computes
with, are made of all steps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn import dual
from fastrnn.cells import CELLS, Function
from fastrnn.read import How, Read
from fastrnn.reference import Weights
from fastrnn.schema import SIZES, add_cell, unflatten


def tangents_of(
    layer: Callable[..., tuple[Tensor, ...]],
    how: How,
    read: Read,
    y: Tensor,
    states: Tensor,
    values: Tensor,
    tangents: Read,
) -> tuple[Tensor, ...]:
    """The tangents of y, h_n, c_n and of the states of every step, as a differentiable function of all arguments.

    `layer` computes a layer, as `fastrnn.autograd.call`; `y`, `states` and `values` are what this one computes. A
    tangent that is None is 0.
    """
    of_tangents = (tangents.steps, tangents.masks, *tangents.weights)
    plan = dual.plan(how.cell, any(tangent is not None for tangent in of_tangents))
    if plan.cell.name not in CELLS:
        add_cell(plan.cell)
    weights = unflatten(how.cell, read.weights, how.directions)
    of_weights = unflatten(how.cell, tangents.weights, how.directions)
    masks = []
    for d, of_w in enumerate(of_weights):
        steps = Steps(how, read, y, states, d)
        adds = steps.parts(of_w, tangents, steps.operand(values[d])) if ("add", 0) in plan.masks else []
        masks.append(steps.masks(plan, values[d], adds))
    x = read.x[:, :, :0] if tangents.x is None else tangents.x
    matrices = [(w.w_ih if tangents.x is not None else w.w_ih[:, :0], w.w_hh) for w in weights]
    flat = [matrix for pair in matrices for matrix in pair if matrix is not None]
    own = Read(read.lengths, read.resets, x, tangents.h0, tangents.c0, _stack(masks), None, flat)
    return layer(How(plan.cell.name, how.directions), own, states=True)


def values_of(how: How, read: Read, y: Tensor, states: Tensor) -> Tensor:
    """`[D, T, B, J, H]`: what each of the J vectors of the gate gradients is the gradient of, see `dual.Plan`."""
    weights = unflatten(how.cell, read.weights, how.directions)
    parts = [Steps(how, read, y, states, d).parts(w, read) for d, w in enumerate(weights)]
    return _stack([torch.stack(of_direction, dim=2) for of_direction in parts])


def _stack(of_directions: list[Tensor]) -> Tensor:
    """Of one direction without a copy."""
    return torch.stack(of_directions) if len(of_directions) > 1 else of_directions[0][None]


class Steps:
    """All steps of a direction at once, from what they have before them."""

    def __init__(self, how: How, read: Read, y: Tensor, states: Tensor, d: int) -> None:
        self.cell, self.sizes, self.read, self.d = CELLS[how.cell], SIZES[how.cell], read, d
        self.H = read.units(how)
        self.x = active_input(read)
        self.h = before(y.unflatten(-1, (how.directions, -1))[:, :, d], read.h0, read, d)
        self.c = before(states[d], read.c0, read, d) if self.cell.carried else None

    def parts(self, w: Weights, of: Read, operand: Tensor | None = None) -> list[Tensor]:
        """The J values `[T, B, H]` with the weights `w`, and the masks and steps of `of`. Of tangents, what they add to
        those of the values: then the operand of a second product is given; otherwise it is computed on the way."""
        sizes, first = self.sizes, self.sizes["first_gates"]
        parts: list[Tensor | None] = [None] * sizes["grads"]

        def put(value: Tensor | None, vectors: list[int]) -> None:
            if value is None or not vectors:
                return
            for part, j in zip(value.chunk(len(vectors), dim=-1), vectors, strict=True):
                known = parts[j]
                parts[j] = part if known is None else known + part

        put(_product(self.x, w.w_ih, w.b_ih), sizes["input_grad"])
        put(None if w.w_own is None else w.w_own.flatten(), sizes["unit_grad"])
        put(None if of.masks is None else of.masks[self.d], sizes.get("mask_grad", []))
        rows = first * self.H
        put(_product(self.h, *_rows(w, slice(rows))), sizes["recurrent_grad"][:first])
        if sizes["second_gates"]:
            operand = self._operand(parts) if operand is None else operand
            put(_product(operand, *_rows(w, slice(rows, None))), sizes["recurrent_grad"][first:])
        shape = *self.read.x.shape[:2], self.H
        zero = self.x.new_zeros(())
        found = [(zero if part is None else part).expand(shape) for part in parts]
        return found if of.steps is None else [a + b for a, b in zip(found, of.steps[self.d].unbind(2), strict=True)]

    def masks(self, plan: dual.Plan, values: Tensor, adds: list[Tensor]) -> Tensor:
        """`[T, B, M*H]` of the plan's cell."""
        parts = [*adds, values.flatten(-2), self.h if ("state", 0) in plan.masks else None, self.c]
        if ("mask", 0) in plan.masks and self.read.masks is not None:
            parts.append(self.read.masks[self.d].expand(*values.shape[:2], -1))
        return torch.cat([part for part in parts if part is not None], dim=-1)

    def operand(self, values: Tensor) -> Tensor | None:
        """That of the second product, `[T, B, H]`."""
        return self._operand(values.unbind(2)) if self.sizes["second_gates"] else None

    def _operand(self, values: Sequence[Tensor | None]) -> Tensor:
        """By the equation, from the values of the first products and of what is given."""
        found, vectors, cell = [], dual.Operands(self.cell, self.sizes), self.cell
        second = cell.gates[-self.sizes["second_gates"] :]

        def product_of(name: str) -> Function:
            def of(operand: Tensor) -> Any:
                if name in second:
                    found.append(operand)
                    return operand  # what follows it is of no interest
                j = vectors.product_vector(name)
                return 0.0 if j is None else values[j]

            return of

        masks: Sequence[Any] = ()
        if self.read.masks is not None:
            masks = self.read.masks[self.d].chunk(len(cell.masks), dim=-1)
        if cell.mask_gradients:  # some are in the values of gates
            masks = [0.0 if vectors.mask_vector(i) is None else mask for i, mask in enumerate(masks)]
        states = self.h, *(() if self.c is None else self.c.chunk(cell.carried, dim=-1))
        inputs = dual.ByName(lambda name: values[vectors.input_vector(name)])
        cell.call(inputs, dual.ByName(product_of), *states, *(values[j] for j in self.sizes["unit_grad"]), *masks)
        return found[0]


def _rows(w: Weights, rows: slice) -> list[Tensor | None]:
    return [None if tensor is None else tensor[rows] for tensor in (w.w_hh, w.b_hh)]


def _product(operand: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return bias if weight is None else linear(operand, weight, bias)


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
    # Not of one step less: to what is exported for any T, a slice of one step would be a case of its own.
    found = torch.cat([start, states])[:-1] if d == 0 else torch.cat([states, start])[1:]
    restarts = read.resets
    if d == 1:
        if read.lengths is not None:
            goes_on = torch.arange(1, T + 1, device=states.device)[:, None] < read.lengths
            found = torch.where(goes_on[:, :, None], found, start)
        if restarts is not None:
            restarts = torch.cat([restarts, torch.zeros_like(restarts[:1])])[1:]
            restarts = restarts & goes_on if read.lengths is not None else restarts
    return found if restarts is None else torch.where(restarts[:, :, None], 0, found)
