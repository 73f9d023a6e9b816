"""Random layers for the kernel tests, each with its call through the kernels and through the reference."""

from dataclasses import dataclass

import torch

from fastrnn import ops, reference
from fastrnn.equation import record
from fastrnn.read import How, Read
from fastrnn.reference import CELLS, Weights
from fastrnn.schema import flatten, own_rows


@dataclass
class LayerCase:
    """One call of a layer. `tensors` are the differentiable inputs: x, h0, c0, then the weights of each direction."""

    cell: str
    directions: int
    tensors: list
    lengths: torch.Tensor | None
    resets: torch.Tensor | None
    masks: torch.Tensor | None = None

    def run(self, layer, tensors=None):
        """`layer` as `ops.layer`, `reference.layer` or `packing`'s; returns y, h_n and, where the cell has one, c_n."""
        x, h0, c0, *flat = self.tensors if tensors is None else tensors
        weights = [Weights(*flat[6 * d : 6 * d + 6]) for d in range(self.directions)]
        outputs = layer(self.cell, x, h0, c0, weights, self.lengths, self.resets, self.masks)
        return outputs if CELLS[self.cell].carried else outputs[:2]

    def op_inputs(self):
        """x, h0, c0, weights and directions, as the ops take them."""
        return [*self.tensors[:3], [t for t in self.tensors[3:] if t is not None], self.directions]

    def to(self, dtype, requires_grad=False):
        tensors = [t if t is None else t.detach().to(dtype).requires_grad_(requires_grad) for t in self.tensors]
        masks = None if self.masks is None else self.masks.to(dtype)
        return LayerCase(self.cell, self.directions, tensors, self.lengths, self.resets, masks)

    def outputs_and_grads(self, layer):
        """All outputs and the gradients of every input, for a fixed random upstream gradient."""
        outputs = self.run(layer)
        inputs = [t for t in self.tensors if t is not None]
        return outputs, torch.autograd.grad(outputs, inputs, self.upstream(outputs), materialize_grads=True)

    @staticmethod
    def upstream(outputs):
        """A fixed random gradient of each output."""
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.rand(o.shape, generator=generator, dtype=torch.float64) - 0.5 for o in outputs]
        return [u.to(o.dtype) for u, o in zip(drawn, outputs, strict=True)]


def packing(packs, rounded=None):
    """`ops.layer`, but by `packs`."""

    def layer(cell, x, h0, c0, weights, lengths, resets, masks):
        read = Read(lengths, resets, x, h0, c0, masks, None, flatten(weights))
        return packs.run(0, How(cell, len(weights)), read, rounded)

    return layer


def make_case(
    cell, T, B, I, H, P=None, D=1, *, bias=True, states=True, lengths=False, resets=False, dtype=torch.float64, seed=0
):
    """Weights of the size that torch.nn draws, so that no state saturates or explodes."""
    generator = torch.Generator().manual_seed(seed)
    P, spec = P or H, CELLS[cell]
    gates, recurrent = len(record(spec).inputs), len(record(spec).recurrent)

    def draw(*shape, scale=1.0):
        return (scale * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)).to(dtype)

    tensors = [draw(T, B, I), draw(D, B, P) if states else None]
    carried = draw(D, B, spec.carried * H) if states and spec.carried else None
    if states and cell == "slstm":
        carried = carried.abs() + 0.5  # it divides by one of its states, which is a sum of positive numbers
    tensors.append(carried)
    scale = H**-0.5
    for _ in range(D):
        biases = [draw(gates * H, scale=scale) if bias else None]
        biases.append(draw(recurrent * H, scale=scale) if bias and recurrent else None)
        projection = draw(P, H, scale=scale) if P != H else None
        w_ih, w_hh = draw(gates * H, I, scale=scale), draw(recurrent * H, P, scale=scale) if recurrent else None
        own = draw(own_rows(cell), H) if own_rows(cell) else None
        tensors += [w_ih, w_hh, *biases, projection, own]
    row_lengths = torch.randint(0, T + 1, (B,), generator=generator) if lengths else None
    marks = torch.rand(T, B, generator=generator) < 0.3 if resets else None
    masks = draw(D, seed % 2 or T, B, len(spec.masks) * H) if spec.masks else None
    return LayerCase(cell, D, tensors, row_lengths, marks, masks)


# The cells that are built in with all kernels, and the LSTM with a projection too: (cell, P for H = 4).
BUILT_IN = [name for name, cell in CELLS.items() if cell.has_all_kernels]
VARIANTS = [(name, None) for name in BUILT_IN] + [("lstm", 3)] * ("lstm" in BUILT_IN)
VARIANT_IDS = [cell if P is None else f"{cell}-projected" for cell, P in VARIANTS]
ROWS = {
    "plain": {},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "lengths+resets": {"lengths": True, "resets": True},
}

__all__ = ["BUILT_IN", "ROWS", "VARIANTS", "VARIANT_IDS", "LayerCase", "make_case", "ops", "reference"]
