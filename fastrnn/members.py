"""Calls of several members at once, as vmap makes them: their rows side by side, and gradients of each member's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastrnn.cells import CELLS, Function
from fastrnn.normalized import NormalizedProducts
from fastrnn.read import Dims, How, Read, Tensors
from fastrnn.schema import SIZES, unflatten
from fastrnn.tangents import Steps, active_input, before, values_of


def fold(tensor: Tensor | None, dim: int | None, rows: int | None, members: int) -> Tensor | None:
    """Rows of all members side by side, in dimension `rows`, from members in dimension `dim`, or the same for all.
    Without rows the tensor itself."""
    if tensor is None or rows is None:
        return tensor
    if members == 0:
        raise ValueError("vmap: expected members to map over, got a dimension of size 0")
    if dim is not None:
        return tensor.movedim(dim, rows).flatten(rows, rows + 1)
    shape = *tensor.shape[:rows], members, *tensor.shape[rows:]
    return tensor.unsqueeze(rows).expand(shape).flatten(rows, rows + 1)


@overload
def unfold(tensor: Tensor, rows: int, members: int) -> Tensor: ...
@overload
def unfold(tensor: Tensor | None, rows: int, members: int) -> Tensor | None: ...
def unfold(tensor: Tensor | None, rows: int, members: int) -> Tensor | None:
    return None if tensor is None else tensor.unflatten(rows, (members, tensor.shape[rows] // max(members, 1)))


def member(tensor: Tensor | None, dim: int | None, index: int) -> Tensor | None:
    return tensor if dim is None or tensor is None else tensor.select(dim, index)


def one_by_one(function: Function, tensors: Tensors, dims: Dims, members: int) -> tuple[Tensors, Dims]:
    """`function` of the tensors of each member, its results stacked, and their dimensions of members."""
    found = [
        function(*(member(tensor, dim, i) for tensor, dim in zip(tensors, dims, strict=True))) for i in range(members)
    ]
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True))
    return stacked, tuple(None if column is None else 0 for column in stacked)


class Batched:
    """Tensors that are batched by `is_grads_batched` and its like, which is older than torch.func and has no rules."""

    def __init__(self, tensors: Tensors) -> None:
        self.level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        known: list[Any] = list(tensors)
        self.tensors = [torch._remove_batch_dim(t, self.level, 0, 0) if is_batched(t) else t for t in known]
        self.dims = [0 if is_batched(t) else None for t in tensors]
        if any(map(is_batched, self.tensors)):
            raise NotImplementedError("is_grads_batched: expected tensors that are batched once; use torch.func.vmap")
        self.batch_size = next(t.shape[0] for t, dim in zip(self.tensors, self.dims, strict=True) if dim == 0)

    def batch(self, tensors: Tensors, dims: Dims) -> tuple[Tensor | None, ...]:
        known: Sequence[Any] = tensors
        pairs = zip(known, dims, strict=True)
        return tuple(t if dim is None else torch._add_batch_dim(t, dim, self.level) for t, dim in pairs)

    def one_by_one(self, function: Function) -> tuple[Tensor | None, ...]:
        """`function` of the tensors of each member."""
        return self.batch(*one_by_one(function, self.tensors, self.dims, self.batch_size))


def is_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


class MemberGradients:
    """The gradients of weights that N members share, whose rows are side by side, by member: products of the gate
    gradients of every step, `steps` [D, T, N*B, J, H], with what the weights have multiplied."""

    def __init__(self, how: How, read: Read, y: Tensor, states: Tensor, steps: Tensor, members: int) -> None:
        self.how, self.read, self.y, self.states, self.steps, self.members = how, read, y, states, steps, members
        self.sizes = SIZES[how.cell]
        self._products: dict[tuple[int, bool], NormalizedProducts] = {}  # for the weights, and for the gains
        self._own: dict[int, Tensor] = {}  # the gradients of w_own, which several parameters are rows of

    def release(self) -> None:
        """What is large: no gradient is asked for any more."""
        self.steps = None  # type: ignore[assignment]
        self._products.clear()
        self._own.clear()

    def of_weights(self, wanted: Sequence[bool]) -> list[Tensor | None]:
        """[N, ...] for each of the weights; None: not wanted."""
        weights = zip(self.read.weights, self.names(), wanted, strict=True)
        return [self.gradient(*name).reshape(self.members, *w.shape) if want else None for w, name, want in weights]

    def names(self) -> list[tuple[int, str]]:
        """The direction of each of the weights, and its name in `reference.Weights`."""
        places = range(len(self.read.weights))
        by_direction = unflatten(self.how.cell, list(places), self.how.directions)
        named = {place: (d, name) for d, w in enumerate(by_direction) for name, place in w._asdict().items()}
        return [named[place] for place in places]

    def factors(self, d: int, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """Pairs a [N, T*B, rows], b [N, T*B, columns] (None: ones), whose products a^T b, one below the other, are the
        gradient."""
        first, recurrent = self.sizes["first_gates"], self.sizes["recurrent_grad"]
        if name == "b_ih":
            return [(self._split(self._vectors(d, self.sizes["input_grad"])), None)]
        if name == "w_ih":
            return [(self._split(self._of_products(d, of_input=True)), self._split(active_input(self.read)))]
        if name == "w_own":
            return [(self._split(self._of_own(d)), None)]
        if name == "b_hh":
            return [(self._split(self._vectors(d, recurrent)), None)]
        found: list[tuple[Tensor, Tensor | None]] = [
            (self._split(self._of_products(d, of_input=False)), self._split(self._h(d)))
        ]
        if self.sizes["second_gates"]:
            found.append((self._split(self._vectors(d, recurrent[first:])), self._split(self._operand(d))))
        return found

    def gradient(self, d: int, name: str) -> Tensor:
        """[N, rows, columns], or [N, rows] of a bias."""
        if name == "w_own" and d in self._own:
            return self._own[d]
        pairs = self.factors(d, name)
        products = [a.sum(1) if b is None else a.transpose(1, 2) @ b for a, b in pairs]
        found = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        if name == "w_own":
            self._own[d] = found
        return found

    def norm(self, d: int, name: str) -> Tensor:
        """[N]: the gradients' 2-norms."""
        squares: Any = sum(_squared_norm(a, b) for a, b in self.factors(d, name))
        found: Tensor = squares.clamp_min(0).sqrt()
        return found

    def _vectors(self, d: int, places: list[int]) -> Tensor:
        """[T, N*B, count*H]"""
        first, count = places[0], len(places)
        in_order = places == list(range(first, first + count))
        vectors = self.steps[d][:, :, first : first + count] if in_order else self.steps[d][:, :, places]
        return vectors.flatten(-2)

    def _of_products(self, d: int, *, of_input: bool) -> Tensor:
        """The gradients of the products with the input, or with h."""
        vectors = self._vectors(d, self._product_vectors(of_input))
        return self._normalized(d, of_input).product_gradients(vectors) if self._are_normalized() else vectors

    def _of_own(self, d: int) -> Tensor:
        """Those of the unit weights, and of the gains of normalized products."""
        units = self.sizes["unit_grad"]
        parts = [self._vectors(d, units)] if units else []
        if self._are_normalized():
            for of_input in (True, False) if self.sizes["first_gates"] else (True,):
                vectors = self._vectors(d, self._product_vectors(of_input))
                parts.append(self._normalized(d, of_input).gain_gradients(vectors))
        return torch.cat(parts, dim=-1)

    def _product_vectors(self, of_input: bool) -> list[int]:
        found: list[int] = self.sizes["input_grad"]
        return found if of_input else self.sizes["recurrent_grad"][: self.sizes["first_gates"]]

    def _are_normalized(self) -> bool:
        return bool(CELLS[self.how.cell].normalized)

    def _normalized(self, d: int, of_input: bool) -> NormalizedProducts:
        if (d, of_input) not in self._products:
            w = unflatten(self.how.cell, self.read.weights, self.how.directions)[d]
            operand = active_input(self.read) if of_input else self._h(d)
            self._products[d, of_input] = NormalizedProducts(self.how.cell, w, operand, of_input=of_input)
        return self._products[d, of_input]

    def _split(self, rows: Tensor) -> Tensor:
        """[T, N*B, F] as [N, T*B, F]"""
        return unfold(rows, 1, self.members).movedim(1, 0).flatten(1, 2)

    def _h(self, d: int) -> Tensor:
        own = self.y.unflatten(-1, (self.how.directions, -1))[:, :, d]
        return before(own, self.read.h0, self.read, d)

    def _operand(self, d: int) -> Tensor:
        values = values_of(self.how, self.read, self.y, self.states)[d]
        found = Steps(self.how, self.read, self.y, self.states, d).operand(values)
        assert found is not None
        return found


def _squared_norm(a: Tensor, b: Tensor | None) -> Tensor:
    """[N], of a^T b for a [N, L, R] and b [N, L, C]."""
    if b is None:
        return a.sum(1).square().sum(1)
    (_, L, R), C = a.shape, b.shape[2]
    if L * (R + C) < R * C:
        return (a @ a.transpose(1, 2) * (b @ b.transpose(1, 2))).sum((1, 2))
    found: Tensor = torch.linalg.vector_norm(a.transpose(1, 2) @ b, dim=(1, 2)).square()
    return found
