"""From a cell to the cell of its tangents: what a step's states change by, to first order, as its inputs do.

The tangent of a step is a step again, linear in its own states, with coefficients that depend on the step itself:

    h' = (dh/da) a' + (dh/dh_before) h_before' + ...,   a' = W x' + U h_before' + what the weights' tangents add

so it is a cell of the same gates and states, whose masks are the values that the step itself computes with. Its
equation is the cell's own, run on dual numbers (Clifford 1873): a value and its tangent. Kernels of it, forward and
backward, are made as those of any cell, and the tangents of the tangents likewise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastrnn import cells
from fastrnn.cells import CELLS, Cell
from fastrnn.equation import FUNCTIONS, record


class Dual:
    """A value and its tangent; None: the tangent is 0."""

    def __init__(self, value, tangent=None):
        self.value, self.tangent = value, tangent

    def __add__(self, other):
        other = _dual(other)
        return Dual(self.value + other.value, _sum(self.tangent, other.tangent))

    def __sub__(self, other):
        other = _dual(other)
        return Dual(self.value - other.value, _sum(self.tangent, _times(other.tangent, -1)))

    def __rsub__(self, other):
        return _dual(other) - self

    def __mul__(self, other):
        other = _dual(other)
        tangent = _sum(_times(self.tangent, other.value), _times(other.tangent, self.value))
        return Dual(self.value * other.value, tangent)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return Dual(-self.value, _times(self.tangent, -1))

    def __truediv__(self, other):
        other = _dual(other)
        quotient = self.value / other.value
        above = _sum(self.tangent, _times(_times(other.tangent, quotient), -1))
        return Dual(quotient, None if above is None else above / other.value)

    def __rtruediv__(self, other):
        return _dual(other) / self

    def sigmoid(self):
        value = self.value.sigmoid()
        return Dual(value, _times(self.tangent, value * (1 - value)))

    def tanh(self):
        value = self.value.tanh()
        return Dual(value, _times(self.tangent, 1 - value * value))

    def exp(self):
        value = self.value.exp()
        return Dual(value, _times(self.tangent, value))

    def relu(self):
        return Dual(self.value.relu(), _times(self.tangent, cells.step(self.value)))

    def logsigmoid(self):
        return Dual(cells.logsigmoid(self.value), _times(self.tangent, (-self.value).sigmoid()))

    def step(self):
        return Dual(cells.step(self.value))

    def maximum(self, other):
        other = _dual(other)
        value, difference = cells.maximum(self.value, other.value), self.value - other.value
        above, below = cells.step(difference), cells.step(-difference)
        share = 0.5 * (1 + above - below)  # half each where both are equal, as in torch.maximum
        return Dual(value, _sum(_times(self.tangent, share), _times(other.tangent, 1 - share)))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = {"log_sigmoid": "logsigmoid"}.get(function.__name__, function.__name__)
        first, *others = args
        if name == "maximum" and not isinstance(first, Dual):
            (first,), others = others, [first]
        assert name in FUNCTIONS, name  # else the equation would not have been recorded
        return getattr(first, name)(*others)


def _dual(value) -> Dual:
    return value if isinstance(value, Dual) else Dual(value)


def _sum(a, b):
    return b if a is None else a if b is None else a + b


def _times(tangent, factor):
    return None if tangent is None else tangent * factor


@dataclass(frozen=True)
class Plan:
    """The cell of another one's tangents, and what its masks are, in their order: `(kind, index)`.

    "input" and "product" are the values of a gate's two products, by gate; "sum" that of both, of gates which read
    nothing but their sum. "state" are the states before the step, "unit" the unit weights, "mask" the masks. Then what
    is added to the tangents, in the plan of a layer whose weights have tangents: "add input", "add product", "add sum",
    "add unit". "add mask" are the tangents of masks that have some.
    """

    cell: Cell
    masks: tuple[tuple[str, int], ...]


@functools.cache
def plan(name: str, with_weights: bool) -> Plan:
    """For a cell, the cell of its tangents: those of the input, the states and masks, and of the weights on request."""
    of = CELLS[name]
    made = record(of)
    reads_h = made.states[0] in made.graph.below(made.outputs + ([] if made.operand is None else [made.operand]))
    summed = _summed_gates(made)
    values = [("sum" if gate in summed else "input", gate) for gate in made.input_gates]
    values += [("product", gate) for gate in made.recurrent if gate not in summed]
    adds = [(f"add {kind}", gate) for kind, gate in values] if with_weights else []
    values += [("state", i) for i in range(len(of.states)) if i > 0 or reads_h]
    for kind, count in ("unit", len(of.unit_weights)), ("mask", len(of.masks)):
        values += [(kind, i) for i in range(count)]
        has_tangents = with_weights if kind == "unit" else of.mask_gradients
        adds += [(f"add {kind}", i) for i in range(count if has_tangents else 0)]
    masks = tuple(values + adds)

    def tangent(x, u, **given):
        by_kind = {mask: given[f"{mask[0].replace(' ', '_')}_{mask[1]}"] for mask in masks}
        return _tangents(of, summed, by_kind, x, u, [given[state] for state in of.states])

    tangent.__doc__ = f"Tangents of {of.equation.__name__}{' with weights that have some' if with_weights else ''}."
    cell = Cell(
        f"{name}_tangent{'_of_weights' if with_weights else ''}",
        of.gates,
        of.states,
        tangent,
        masks=tuple(f"{kind.replace(' ', '_')}_{i}" for kind, i in masks),
        mask_gradients=True,
    )
    return Plan(cell, masks)


def _summed_gates(made) -> set[int]:
    """The gates of which nothing but the sum of both products is read."""
    readers: dict[int, list[int]] = {}
    for node in made.graph.below(made.outputs + ([] if made.operand is None else [made.operand])):
        for operand in set(made.graph.operands(node)):
            readers.setdefault(operand, []).append(node)

    def is_summed(gate):
        of_both = [readers.get(leaves.get(gate), []) for leaves in (made.inputs, made.products)]
        return len(of_both[0]) == 1 and of_both[0] == of_both[1] and made.graph.nodes[of_both[0][0]][0] == "+"

    return {gate for gate in made.inputs if gate in made.products and is_summed(gate)}


def _tangents(of: Cell, summed: set[int], given: dict, x, u, states: list):
    """One step of the tangents: of products `x` and `u` of the tangents, and states before it."""
    place = {gate: i for i, gate in enumerate(of.gates)}

    def zero():
        return 0 * next(iter(given.values()))

    def input_of(name):
        kind = "sum" if place[name] in summed else "input"
        add = given.get((f"add {kind}", place[name]))
        return Dual(given[kind, place[name]], _sum(getattr(x, name), add))

    def product_of(name):
        def of_operand(operand):
            tangent = getattr(u, name)(zero() if operand.tangent is None else operand.tangent)
            if place[name] in summed:  # the value is that of the input's product
                return Dual(0, tangent)
            return Dual(given["product", place[name]], _sum(tangent, given.get(("add product", place[name]))))

        return of_operand

    def duals(kind, count):
        return [Dual(given[kind, i], given.get((f"add {kind}", i))) for i in range(count)]

    before = [Dual(given.get(("state", i)), state) for i, state in enumerate(states)]
    others = duals("unit", len(of.unit_weights)) + duals("mask", len(of.masks))
    found = of.call(ByName(input_of), ByName(product_of), *before, *others)
    found = found if isinstance(found, tuple) else (found,)
    tangents = tuple(zero() if new.tangent is None else new.tangent for new in map(_dual, found))
    return tangents if len(tangents) > 1 else tangents[0]


class ByName:
    """Something for each gate, made when it is asked for."""

    def __init__(self, make):
        self._make = make

    def __getattr__(self, name):
        return self._make(name)
