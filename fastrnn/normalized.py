"""Layer normalization of the products of all steps at once, for gradients by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.cells import CELLS, NORM_EPSILON
from fastrnn.reference import Weights, products_of
from fastrnn.schema import accumulator


class NormalizedProducts:
    """The products of a weight with the operand of every step, `[T, B, gates*H]`, normalized by groups of gates, as
    `fastrnn.reference.gate_products`. Of the input's weight, or of that of h."""

    def __init__(self, cell: str, w: Weights, operand: Tensor, *, of_input: bool) -> None:
        self.cell = CELLS[cell]
        with_input, recurrent, first = products_of(self.cell)
        self.gates = with_input if of_input else recurrent[:first]
        weight, own = w.w_ih if of_input else w.w_hh, w.w_own
        assert weight is not None
        assert own is not None
        gains = own[len(self.cell.unit_weights) :].split([len(with_input), first])
        self.gains = gains[0 if of_input else 1].flatten()
        self.dtype = accumulator(operand.dtype)
        self.norms = [self._norm(products) for products in self._groups(linear(operand, weight).to(self.dtype))]

    def gain_gradients(self, grads: Tensor) -> Tensor:
        """Of every step, given those of gain * normalized product."""
        return (self._gathered([normalized for normalized, *_ in self.norms]) * grads).to(grads.dtype)

    def product_gradients(self, grads: Tensor) -> Tensor:
        """The same of the products themselves."""
        by_group = []
        for of_values, (_, centred, mean, scale) in zip(
            self._groups(grads.to(self.dtype) * self.gains), self.norms, strict=True
        ):
            of_products, _, _ = torch.ops.aten.native_layer_norm_backward(
                of_values, centred, centred.shape[-1:], mean, scale, None, None, [True, False, False]
            )
            by_group.append(of_products)
        return self._gathered(by_group).to(grads.dtype)

    def _norm(self, products: Tensor) -> tuple[Tensor, ...]:
        """The normalized values, what they were less their mean, and as torch's kernels have them the mean that is left
        and the scale. Twice the mean, since the last bits that the first loses are a mean of their own."""
        centred = products - products.mean(-1, keepdim=True)
        normalized, mean, scale = torch.native_layer_norm(centred, centred.shape[-1:], None, None, NORM_EPSILON)
        return normalized, centred, mean, scale

    def _members(self) -> list[list[int]]:
        """The places of each group's gates among those that have a product."""
        by_group = [
            [i for i, gate in enumerate(self.gates) if self.cell.gates[gate] in group] for group in self.cell.normalized
        ]
        return [members for members in by_group if members]

    def _groups(self, values: Tensor) -> list[Tensor]:
        """Of `[T, B, gates*H]`, what belongs to each."""
        gates, found = values.chunk(len(self.gates), dim=-1), []
        for first, *others in self._members():
            are_neighbours = others == list(range(first + 1, first + 1 + len(others)))
            if are_neighbours:
                found.append(values.narrow(-1, first * gates[0].shape[-1], (1 + len(others)) * gates[0].shape[-1]))
            else:
                found.append(torch.cat([gates[i] for i in (first, *others)], dim=-1))
        return found

    def _gathered(self, by_group: list[Tensor]) -> Tensor:
        """The other way."""
        if len(by_group) == 1 and self._members() == [list(range(len(self.gates)))]:
            return by_group[0]
        gates: list[Any] = [None] * len(self.gates)
        for values, members in zip(by_group, self._members(), strict=True):
            for i, of_gate in zip(members, values.chunk(len(members), dim=-1), strict=True):
                gates[i] = of_gate
        return torch.cat(gates, dim=-1)
