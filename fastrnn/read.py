"""What a layer reads, as the rules of its derivatives see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from fastrnn.schema import Inputs, units

Tensors: TypeAlias = Sequence[Tensor | None]  # None: not given, not wanted, or 0
Dims: TypeAlias = Sequence[int | None]  # of vmap, in each tensor; None: the same for all members
Kept: TypeAlias = tuple[Tensor, Tensor, Tensor]  # by forward: y, what is saved, and the states of every step


class How(NamedTuple):
    """What of a call is no tensor."""

    cell: str
    directions: int
    recompute: bool = False
    saves: bool = True  # what backward needs, or is asked for the states of every step


class Read(NamedTuple):
    """The tensors that a layer reads; in a call the weights are the arguments after the others.

    `steps` [D, T, B, J, H] is never read: it stands for what is added to the products and to what is given in each
    step, all zero, so that a layer has gradients of it: those of every step, as kGrads in csrc/cells/cell.h lists them.
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

    def units(self, how: How) -> int:
        """H."""
        return units(self.inputs(how))

    def flat(self) -> tuple[Tensor | None, ...]:
        return *self[:-1], *self.weights


READ = len(Read._fields) - 1  # without the weights
FIRST = Read._fields.index("x")  # of those that have gradients
STEPS = Read._fields.index("steps")
ROWS = 0, 1, 1, 1, 1, 2, 2  # the dimension of B in each


def read_of(flat: Iterable[Tensor | None]) -> Read:
    found: tuple[Any, ...] = tuple(flat)
    return Read(*found[:READ], list(found[READ:]))  # type: ignore[call-arg]


def replaced(read: Read, places: Iterable[int], tensors: Iterable[Tensor]) -> Read:
    """`read` with other tensors in some places of `flat()`."""
    flat = list(read.flat())
    for place, tensor in zip(places, tensors, strict=True):
        flat[place] = tensor
    return read_of(flat)
