"""The states and gates of every step: what a call with `return_states=True` returns besides.

The kernels hand out the states, with derivatives of all kinds. The gates of all steps are products of the input and of
the states before each step, as few as a step has, and the cell's equation, in torch's operations.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from fastrnn import autocast, autograd, cells
from fastrnn.cells import CELLS, Cell
from fastrnn.equation import FUNCTIONS, Record, record
from fastrnn.read import How, Read, read_of
from fastrnn.reference import Weights, gate_products
from fastrnn.schema import accumulator, unflatten
from fastrnn.signatures import Function
from fastrnn.tangents import _rows, active_input, before


class LayerStates(NamedTuple):
    """Of one layer, in every step: like the layer's output, directions side by side, of its dtype, 0 where a row is
    finished.

    Attributes:
        states: by name, `[T, B, D*H]`; the first is what the layer puts out, `[T, B, D*P]`, and may share its memory.
            With a projection there is one more, `unprojected`: the first before it is projected.
        gates: by name, `[T, B, D*H]`: what the cell's equation (`fastrnn.cells.CELLS`) calls by the gate's name, such
            as an LSTM's i, f, g and o; otherwise the function of the sum of its products, or that sum.
    """

    states: dict[str, Tensor]
    gates: dict[str, Tensor]


_register_namedtuple(LayerStates, serialized_type_name="fastrnn.states.LayerStates")  # for torch.export.save


class Kept:
    """What computes the layers of a call in the place of `ops.PackedLayers`, and keeps the states."""

    def __init__(self) -> None:
        self.layers: list[LayerStates] = []

    def run(self, index: int, how: How, read: Read, rounded: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments and results as of `ops.PackedLayers.run`.

        Raises:
            ValueError: `rounded`, whose kernels keep no states.
        """
        if rounded:
            raise ValueError(f"return_states, weights={rounded!r}: expected one of them, got both")
        y, h_n, c_n, others = autograd.call(how, read, states=True)
        self.add(how.cell, how, read, y, others)
        return y, h_n, c_n

    def add(self, cell: str, how: How, read: Read, y: Tensor, others: Tensor) -> None:
        """A layer of `cell`, or of one made of it that has states of its own in front (`regularized.noisy`): its output
        and its other states of every step [D, T, B, K*H]."""
        self.layers.append(_of_layer(cell, how, read, y, others))

    def laid_out(self, layout: Callable[[Tensor], Any]) -> tuple[LayerStates, ...]:
        return tuple(_map(layout, layer) for layer in self.layers)


def keep(return_states: object) -> Kept | None:
    """For the option of a call.

    Raises:
        TypeError: `return_states` is not a bool.
    """
    if not isinstance(return_states, bool):
        raise TypeError(f"return_states should be of type bool, got: {type(return_states).__name__}")
    return Kept() if return_states else None


def _of_layer(cell: str, how: How, read: Read, y: Tensor, others: Tensor) -> LayerStates:
    dtype, wide = y.dtype, accumulator(y.dtype)
    with autocast.off(y.device.type):
        read = read_of(t.to(wide) if t is not None and t.is_floating_point() else t for t in read.flat())
        h, weights = y.to(wide).unflatten(-1, (how.directions, -1)), unflatten(how.cell, read.weights, how.directions)
        found = [_of_direction(cell, how, read, w, h[:, :, d], others, d) for d, w in enumerate(weights)]

    def together(*parts: Tensor) -> Tensor:
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(dtype)

    return _map(together, *found)


def _map(function: Function, *layers: LayerStates) -> LayerStates:
    """`function` of what has the same name in each."""
    return LayerStates(
        *({name: function(*(p[name] for p in parts)) for name in parts[0]} for parts in zip(*layers, strict=True))
    )


def _of_direction(cell: str, how: How, read: Read, w: Weights, h: Tensor, others: Tensor, d: int) -> LayerStates:
    own, computing, shape = CELLS[cell], CELLS[how.cell], h.shape[:2]
    after, earlier = [h], [before(h, read.h0, read, d)]
    if computing.carried:
        after += others[d].chunk(computing.carried, dim=-1)
        earlier += before(others[d], read.c0, read, d).chunk(computing.carried, dim=-1)
    given: list[Tensor] = [] if w.w_own is None else list(w.w_own[: len(own.unit_weights)])
    masks: Any = read.masks  # given where the cell has some
    given += masks[d].expand(*shape, -1).chunk(len(own.masks), dim=-1) if own.masks else ()
    leaves = {f"{name}_prev": state for name, state in zip(computing.states, earlier, strict=True)}
    leaves |= {f"given[{i}]": value for i, value in enumerate(given)}
    gates = _values(own, plan(cell, w.w_hr is not None), leaves, active_input(read), earlier[0], w)
    states = {name: state for name, state in zip(computing.states, after, strict=True) if name in own.states}
    states |= {"unprojected": gates.pop("unprojected")} if w.w_hr is not None else {}
    found = LayerStates(states, gates)
    if read.lengths is None:
        return found
    is_active = (torch.arange(h.shape[0], device=h.device)[:, None] < read.lengths)[:, :, None]
    return _map(lambda value: torch.where(is_active, value, 0), found)


# ---- the equation, for all steps at once


class Plan(NamedTuple):
    """How the gates follow from the products and from what a step has before it; see `equation.Record`."""

    nodes: tuple[tuple[int, str, tuple[Any, ...]], ...]  # each after its operands
    wanted: tuple[tuple[str, int], ...]  # names and nodes
    input_gates: tuple[int, ...]
    first: tuple[int, ...]  # gates of the first product, of the second, and the operand of that
    second: tuple[int, ...]
    operand: int | None


def plan(cell: str, is_projected: bool) -> Plan:
    return _plan(cell, is_projected)


# As of `schema.prepare`: the equation is recorded outside of what is compiled.
plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _plan(cell: str, is_projected: bool) -> Plan:
    made = record(CELLS[cell])
    wanted = {name: _node_of(made, gate, name) for gate, name in enumerate(CELLS[cell].gates)}
    wanted |= {"unprojected": made.outputs[0]} if is_projected else {}
    needed = made.graph.below([*wanted.values(), *([] if made.operand is None else [made.operand])])
    nodes = tuple((node, *made.graph.nodes[node]) for node in sorted(needed))
    first = tuple(gate for gate in made.recurrent if gate not in made.second)
    return Plan(nodes, tuple(wanted.items()), tuple(made.input_gates), first, tuple(made.second), made.operand)


def _node_of(made: Record, gate: int, name: str) -> int:
    """What stands for a gate in its cell's equation; see `LayerStates`."""
    if name in made.variables and name not in made.cell.states:
        return made.variables[name]
    graph = made.graph
    products = [leaves[gate] for leaves in (made.inputs, made.products) if gate in leaves]
    parents, sums = graph.parents(made.results), graph.sums(made.results)
    for product in products:
        for parent in parents.get(sums.get(product, product), ()):
            if graph.nodes[parent][0] in FUNCTIONS:
                return parent
    return functools.reduce(graph.add, products)


def _values(cell: Cell, plan: Plan, leaves: dict[str, Tensor], x: Tensor, h: Tensor, w: Weights) -> dict[str, Tensor]:
    """By name, `[T, B, H]`; `x` and `h` are what the products of all steps multiply."""
    inputs = len(plan.input_gates)
    H = w.w_ih.shape[0] // inputs
    split = len(plan.first) * H
    gains: Any = () if w.w_own is None else w.w_own[len(cell.unit_weights) :]

    def add(kind: str, gates: tuple[int, ...], operand: Tensor, weight: Any, bias: Tensor | None) -> None:
        of_gates = gains[:inputs] if kind == "input" else gains[inputs:]
        products = gate_products(cell, operand, weight, bias, list(gates), of_gates)
        leaves.update({f"{kind} {gate}": part for gate, part in zip(gates, products, strict=True)})

    leaves = dict(leaves)
    add("input", plan.input_gates, x, w.w_ih, w.b_ih)
    if plan.first:
        add("product", plan.first, h, *_rows(w, slice(split)))
    values: dict[int | None, Any] = {}
    for node, operation, operands in plan.nodes:
        if operation == "const":
            values[node] = operands[0]
        elif operation == "leaf":
            if operands[0] == "normalized":
                leaves["normalized"] = cells.normalized(values[plan.operand])
            elif operands[0] not in leaves:  # a product of what has been computed by now
                add("product", plan.second, values[plan.operand], *_rows(w, slice(split, None)))
            values[node] = leaves[operands[0]]
        else:
            values[node] = _OPERATIONS[operation](*(values[operand] for operand in operands))
    return {name: values[node].expand(*x.shape[:2], H) for name, node in plan.wanted}


_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_OPERATIONS |= {name: getattr(cells, name) for name in FUNCTIONS}
