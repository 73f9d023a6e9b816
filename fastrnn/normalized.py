"""Layer normalization of the products of all steps at once, for gradients by row."""

from __future__ import annotations

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
        self.products = linear(operand, weight).to(self.dtype)

    def gain_gradients(self, grads: Tensor) -> Tensor:
        """Of every step, given those of gain * normalized product."""
        found = torch.empty_like(self.products)
        for units in self._groups():
            found[..., units] = self._norm(units)[0]
        return (found * grads).to(grads.dtype)

    def product_gradients(self, grads: Tensor) -> Tensor:
        """The same of the products themselves."""
        found = torch.empty_like(self.products)
        of_normalized = grads.to(self.dtype) * self.gains
        for units in self._groups():
            _, centred, mean, scale = self._norm(units)
            found[..., units], _, _ = torch.ops.aten.native_layer_norm_backward(
                of_normalized[..., units].contiguous(),
                centred,
                [len(units)],
                mean,
                scale,
                None,
                None,
                [True, False, False],
            )
        return found.to(grads.dtype)

    def _groups(self) -> list[Tensor]:
        """The columns of each."""
        columns = torch.arange(self.products.shape[-1], device=self.products.device).chunk(len(self.gates))
        by_group = [
            [columns[i] for i, gate in enumerate(self.gates) if self.cell.gates[gate] in group]
            for group in self.cell.normalized
        ]
        return [torch.cat(members) for members in by_group if members]

    def _norm(self, units: Tensor) -> tuple[Tensor, ...]:
        """The normalized values, what they were less their mean, and as torch's kernels have them the mean that is left
        and the scale. Twice the mean, since the last bits that the first loses are a mean of their own."""
        values = self.products[..., units]
        centred = values - values.mean(-1, keepdim=True)
        normalized, mean, scale = torch.native_layer_norm(centred, [len(units)], None, None, NORM_EPSILON)
        return normalized, centred, mean, scale
