"""From a cell to the cell of its tangents: what a step's states change by, to first order, as its inputs do.

The tangent of a step is a step again, linear in its own states, with coefficients that depend on the step itself:

    h' = (dh/da) a' + (dh/dh_before) h_before' + ...,   a' = W x' + U h_before' + what the weights' tangents add

so it is a cell of the same gates and states, whose masks are the values that the step itself computes with. Its
equation is the cell's own, run on dual numbers (Clifford 1873): a value and its tangent. Kernels of it, forward and
backward, are made as those of any cell, and the tangents of the tangents likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrnn import cells, codegen
from fastrnn.cells import CELLS, Cell, Function
from fastrnn.equation import FUNCTIONS, record
from fastrnn.reference import products_of


class Dual:
    """A value and its tangent; None: the tangent is 0."""

    def __init__(self, value: Any, tangent: Any = None) -> None:
        self.value, self.tangent = value, tangent

    def __add__(self, other: Any) -> Dual:
        other = _dual(other)
        return Dual(self.value + other.value, _sum(self.tangent, other.tangent))

    def __sub__(self, other: Any) -> Dual:
        other = _dual(other)
        return Dual(self.value - other.value, _sum(self.tangent, _times(other.tangent, -1)))

    def __rsub__(self, other: Any) -> Dual:
        return _dual(other) - self

    def __mul__(self, other: Any) -> Dual:
        other = _dual(other)
        tangent = _sum(_times(self.tangent, other.value), _times(other.tangent, self.value))
        return Dual(self.value * other.value, tangent)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Dual:
        return Dual(-self.value, _times(self.tangent, -1))

    def __truediv__(self, other: Any) -> Dual:
        other = _dual(other)
        quotient = self.value / other.value
        above = _sum(self.tangent, _times(_times(other.tangent, quotient), -1))
        return Dual(quotient, None if above is None else above / other.value)

    def __rtruediv__(self, other: Any) -> Dual:
        return _dual(other) / self

    def sigmoid(self) -> Dual:
        value = self.value.sigmoid()
        return Dual(value, _times(self.tangent, value * (1 - value)))

    def tanh(self) -> Dual:
        value = self.value.tanh()
        return Dual(value, _times(self.tangent, 1 - value * value))

    def exp(self) -> Dual:
        value = self.value.exp()
        return Dual(value, _times(self.tangent, value))

    def relu(self) -> Dual:
        return Dual(self.value.relu(), _times(self.tangent, cells.step(self.value)))

    def logsigmoid(self) -> Dual:
        return Dual(cells.logsigmoid(self.value), _times(self.tangent, (-self.value).sigmoid()))

    def step(self) -> Dual:
        return Dual(cells.step(self.value))

    def maximum(self, other: Any) -> Dual:
        other = _dual(other)
        value, difference = cells.maximum(self.value, other.value), self.value - other.value
        above, below = cells.step(difference), cells.step(-difference)
        share = 0.5 * (1 + above - below)  # half each where both are equal, as in torch.maximum
        return Dual(value, _sum(_times(self.tangent, share), _times(other.tangent, 1 - share)))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = {"log_sigmoid": "logsigmoid"}.get(function.__name__, function.__name__)
        first, *others = args
        if name == "maximum" and not isinstance(first, Dual):
            (first,), others = others, [first]
        assert name in FUNCTIONS, name  # else the equation would not have been recorded
        return getattr(first, name)(*others)


def _dual(value: Any) -> Dual:
    return value if isinstance(value, Dual) else Dual(value)


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _times(tangent: Any, factor: Any) -> Any:
    return None if tangent is None else tangent * factor


@dataclass(frozen=True)
class Plan:
    """The cell of another one's tangents, and what its masks are, in their order: `(kind, index)`.

    "value" j is what vector j of the gate gradients (csrc/cells/cell.h) is the gradient of: a product, or the sum of a
    gate's two products, and of masks that have gradients, where nothing else is read of them, a unit weight, or such a
    mask alone. "state" are the states before the step, "mask" the other masks. "add" j, in the plan of a layer whose
    weights or masks have tangents, is what these add to the tangent of value j.
    """

    cell: Cell
    masks: tuple[tuple[str, int], ...]


@functools.cache
def plan(name: str, with_adds: bool) -> Plan:
    """For a cell, that of its tangents."""
    of, sizes, made = CELLS[name], codegen.description(CELLS[name]), record(CELLS[name])
    vectors = range(sizes["grads"])
    reads_h = made.states[0] in made.graph.below(made.results)
    masks = [("add", j) for j in vectors if with_adds]  # first: their gradients are those of the products
    masks += [("value", j) for j in vectors]
    masks += [("state", i) for i in range(len(of.states)) if i > 0 or reads_h]
    masks += [("mask", i) for i in range(0 if of.mask_gradients else len(of.masks))]

    def tangent(x: Any, u: Any, **given: Any) -> Any:
        by_kind = {mask: given[_name(mask)] for mask in masks}
        return _tangents(of, sizes, by_kind, x, u, [given[state] for state in of.states])

    tangent.__doc__ = f"Tangents of {of.equation.__name__}{', with those of its weights' if with_adds else ''}."
    own_name = f"{name}_tangent{'_of_weights' if with_adds else ''}"
    cell = Cell(own_name, of.gates, of.states, tangent, masks=tuple(map(_name, masks)), mask_gradients=True)
    return Plan(cell, tuple(masks))


def _name(mask: tuple[str, int]) -> str:
    return f"{mask[0]}_{mask[1]}"


def _tangents(
    of: Cell, sizes: codegen.Sizes, given: dict[tuple[str, int], Any], x: Any, u: Any, states: list[Any]
) -> Any:
    """One step of the tangents: of products `x` and `u` of the tangents, and states before it."""
    operands = Operands(of, sizes)

    def zero() -> Any:
        return 0 * given["value", 0]

    def dual(j: int, tangent: Any = None) -> Dual:
        return Dual(given["value", j], _sum(tangent, given.get(("add", j))))

    def input_of(name: str) -> Dual:
        return dual(operands.input_vector(name), getattr(x, name))

    def product_of(name: str) -> Function:
        def of_operand(operand: Any) -> Dual:
            tangent = getattr(u, name)(zero() if operand.tangent is None else operand.tangent)
            j = operands.product_vector(name)
            return Dual(0, tangent) if j is None else dual(j, tangent)

        return of_operand

    before = [Dual(given.get(("state", i)), state) for i, state in enumerate(states)]
    others = [dual(j) for j in sizes["unit_grad"]]
    if of.mask_gradients:
        others += [Dual(0) if j is None else dual(j) for j in map(operands.mask_vector, range(len(of.masks)))]
    else:
        others += [Dual(given["mask", i]) for i in range(len(of.masks))]
    found = of.call(ByName(input_of), ByName(product_of), *before, *others)
    found = found if isinstance(found, tuple) else (found,)
    tangents = tuple(zero() if new.tangent is None else new.tangent for new in map(_dual, found))
    return tangents if len(tangents) > 1 else tangents[0]


class Operands:
    """Which vector of the gate gradients belongs to a gate's product, by the gate's name."""

    def __init__(self, cell: Cell, sizes: codegen.Sizes) -> None:
        with_input, recurrent, _ = products_of(cell)
        self._inputs = {cell.gates[g]: j for g, j in zip(with_input, sizes["input_grad"], strict=True)}
        self._products = {cell.gates[g]: j for g, j in zip(recurrent, sizes["recurrent_grad"], strict=True)}
        self._masks = sizes.get("mask_grad", [])

    def input_vector(self, name: str) -> int:
        return self._inputs[name]

    def product_vector(self, name: str) -> int | None:
        """None: it shares that of the gate's input, and the value there is the sum of both."""
        vector = self._products[name]
        return None if vector == self._inputs.get(name) else vector

    def mask_vector(self, i: int) -> int | None:
        """None: it shares that of a gate, and the value there is the sum of both."""
        vector = self._masks[i]
        return None if vector in (*self._inputs.values(), *self._products.values()) else vector


class ByName:
    """Something for each gate, made when it is asked for."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        return self._make(name)
