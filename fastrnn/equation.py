"""A cell's equation (cells.py) as a graph: `record` runs it on symbols. Equal expressions are one node throughout.

This file needs nothing but Python.
"""

from __future__ import annotations

import linecache
import math
import sys
import traceback
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

OPERATIONS = "+ - *, sigmoid, tanh, relu"
MAX_GATES, MAX_STATES = 4, 2  # as many as the kernels have tiles and memory for


class EquationError(TypeError):
    """An equation that cannot be made a kernel; the message names its line."""


def error_in(cell, what: str) -> EquationError:
    """With the line that is being recorded, or the equation's first one."""
    code = cell.equation.__code__
    lines = [f.lineno for f in traceback.extract_stack() if (f.filename, f.name) == (code.co_filename, code.co_name)]
    line = lines[-1] if lines else code.co_firstlineno
    text = linecache.getline(code.co_filename, line).strip()
    return EquationError(f'cell {cell.name}: {what}; {code.co_filename}:{line}: "{text}"')


def _in_float32(value: float) -> float:
    return array("f", [value])[0]


class Graph:
    """Expressions by value. A node is its number; `nodes[n]` is (operation, operands)."""

    def __init__(self):
        self.nodes: list[tuple] = []
        self._numbers: dict[tuple, int] = {}

    def leaf(self, name: str) -> int:
        return self._intern(("leaf", (name,)))

    def const(self, value: float) -> int:
        return self._intern(("const", (float(value),)))

    def value(self, node: int) -> float | None:
        operation, (first, *_) = self.nodes[node]
        return first if operation == "const" else None

    def add(self, a: int, b: int) -> int:
        if self.value(a) == 0:
            return b
        if self.value(b) == 0:
            return a
        return (
            self._rest(a, b)
            or self._rest(b, a)
            or self._interpolation(a, b)
            or self._interpolation(b, a)
            or self._intern(("+", (min(a, b), max(a, b))))
        )

    def sub(self, a: int, b: int) -> int:
        return a if self.value(b) == 0 else self._intern(("-", (a, b)))

    def mul(self, a: int, b: int) -> int:
        a, b = min(a, b), max(a, b)
        for one, other in ((a, b), (b, a)):
            if self.value(one) in (0, 1):
                return one if self.value(one) == 0 else other
        return self._intern(("*", (a, b)))

    def apply(self, function: str, *operands: int) -> int:
        return self._intern((function, operands))

    def _rest(self, a: int, b: int) -> int | None:
        """a + (0 - b) is a - b, and a + (0 - a * z) is a * (1 - z), which is exact where z is close to 1."""
        if self.nodes[b][0] != "-" or self.value(self.nodes[b][1][0]) != 0:
            return None
        taken = self.nodes[b][1][1]
        if self.nodes[taken][0] == "*":
            for factor, z in _both_ways(self.nodes[taken][1]):
                if factor == a:
                    return self.mul(a, self.sub(self.const(1), z))
        return self.sub(a, taken)

    def _interpolation(self, a: int, b: int) -> int | None:
        """(1 - z) * n + z * h is n + z * (h - n), which takes one operation less; for a bounded n alone, since a large
        one would swamp h where z is 1."""
        if self.nodes[a][0] != "*" or self.nodes[b][0] != "*":
            return None
        for left, n in _both_ways(self.nodes[a][1]):
            if self.nodes[left][0] != "-" or self.value(self.nodes[left][1][0]) != 1:
                continue
            if self.nodes[n][0] not in ("sigmoid", "tanh"):
                continue
            z = self.nodes[left][1][1]
            for factor, h in _both_ways(self.nodes[b][1]):
                if factor == z:
                    return self.add(n, self.mul(z, self.sub(h, n)))
        return None

    def _intern(self, node: tuple) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]

    def operands(self, node: int) -> tuple[int, ...]:
        operation, operands = self.nodes[node]
        return () if operation in ("leaf", "const") else operands

    def below(self, nodes: Iterable[int]) -> set[int]:
        """These nodes and all that they are computed from."""
        found, waiting = set(), list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += self.operands(node)
        return found


def _both_ways(pair):
    return pair, pair[::-1]


class Value:
    """What an equation computes with while it is recorded."""

    def __init__(self, made: Record, node: int):
        self.made, self.node = made, node

    @property
    def graph(self) -> Graph:
        return self.made.graph

    @property
    def cell(self):
        return self.made.cell

    def _of(self, node: int) -> Value:
        self.made.note_names()
        return Value(self.made, node)

    def _number(self, other) -> int:
        if isinstance(other, Value):
            return other.node
        if isinstance(other, (int, float)):
            if not math.isfinite(other) or abs(other) > 1e38 or _in_float32(other) != other:
                raise error_in(self.cell, f"{other!r} is no number of float32")
            return self.graph.const(other)
        raise error_in(self.cell, f"expected a value of the step or a number, got {type(other).__name__}")

    def __add__(self, other):
        return self._of(self.graph.add(self.node, self._number(other)))

    def __sub__(self, other):
        return self._of(self.graph.sub(self.node, self._number(other)))

    def __rsub__(self, other):
        return self._of(self.graph.sub(self._number(other), self.node))

    def __mul__(self, other):
        return self._of(self.graph.mul(self.node, self._number(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return self._of(self.graph.sub(self.graph.const(0), self.node))

    def sigmoid(self):
        return self._of(self.graph.apply("sigmoid", self.node))

    def tanh(self):
        return self._of(self.graph.apply("tanh", self.node))

    def relu(self):
        return self._of(self.graph.apply("relu", self.node))

    def _branch(self, *_):
        raise error_in(self.cell, "a step cannot branch on a value: it is the same for all rows and units")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _branch

    def _refuse(self, *_):
        raise error_in(self.cell, f"expected {OPERATIONS}")

    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __rpow__ = __matmul__ = __abs__ = _refuse
    __getitem__ = __iter__ = __float__ = __int__ = _refuse

    def __getattr__(self, name):
        raise error_in(self.cell, f"{name} is not an operation of a cell: there are {OPERATIONS}")


class Gates:
    """`x` or `u` of an equation: something for each gate, by its name."""

    def __init__(self, cell, by_gate: Iterable):
        self._cell = cell
        self.__dict__ |= dict(zip(cell.gates, by_gate, strict=True))

    def __getattr__(self, name):
        raise error_in(self._cell, f"there is no gate {name}, but {', '.join(self._cell.gates)}")


@dataclass
class Record:
    """An equation as a graph: its leaves, the operand of the second product (None: all products are of h), what the
    equation calls its values."""

    cell: object
    graph: Graph = field(default_factory=Graph)
    inputs: list[int] = field(default_factory=list)  # by gate
    products: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)  # before the step
    outputs: list[int] = field(default_factory=list)  # after it
    second: list[int] = field(default_factory=list)  # gates of the second product
    operand: int | None = None
    variables: dict[str, int] = field(default_factory=dict)  # of the equation, with what they held last

    def note_names(self) -> None:
        """Called at every operation: what the equation's variables hold."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self.cell.equation.__code__:
            frame = frame.f_back
        if frame is not None:
            self.variables |= {name: v.node for name, v in frame.f_locals.items() if isinstance(v, Value)}


def record(cell) -> Record:
    """Runs the equation on symbols."""
    made = Record(cell)
    graph = made.graph
    if len(cell.gates) > MAX_GATES or len(cell.states) > MAX_STATES:
        given = f"{len(cell.gates)} and {len(cell.states)}"
        raise error_in(cell, f"expected at most {MAX_GATES} gates and {MAX_STATES} states, got {given}")
    made.inputs = [graph.leaf(f"x[{g}]") for g in range(len(cell.gates))]
    made.products = [graph.leaf(f"h[{g}]") for g in range(len(cell.gates))]
    made.states = [graph.leaf(f"{state}_prev") for state in cell.states]
    asked: dict[int, int] = {}

    def product(gate):
        def of(operand):
            if not isinstance(operand, Value):
                raise error_in(
                    cell, f"u.{cell.gates[gate]}: expected a value of the step, got {type(operand).__name__}"
                )
            if asked.setdefault(gate, operand.node) != operand.node:
                raise error_in(cell, f"u.{cell.gates[gate]} has two operands; a gate has one recurrent product")
            return Value(made, made.products[gate])

        return of

    x = Gates(cell, [Value(made, leaf) for leaf in made.inputs])
    u = Gates(cell, [product(gate) for gate in range(len(cell.gates))])
    results = cell.equation(x, u, *(Value(made, leaf) for leaf in made.states))
    results = results if isinstance(results, tuple) else (results,)
    if len(results) != len(cell.states) or not all(isinstance(result, Value) for result in results):
        given = ", ".join("a value" if isinstance(result, Value) else type(result).__name__ for result in results)
        raise error_in(cell, f"expected the new {', '.join(cell.states)}, got {given}")
    made.outputs = [result.node for result in results]
    _find_stages(made, asked)
    return made


def _find_stages(made: Record, asked: dict[int, int]) -> None:
    cell, h = made.cell, made.states[0]
    operands = {operand for operand in asked.values() if operand != h}
    if len(operands) > 1:
        raise error_in(cell, "there are products of more than one operand besides h")
    made.second = sorted(gate for gate, operand in asked.items() if operand != h)
    if len(made.second) > 1 or len(made.second) == len(cell.gates):
        raise error_in(cell, "one gate at most may have a product of something else than h, and not the only one")
    made.operand = operands.pop() if operands else None
    if made.second != list(range(len(cell.gates) - len(made.second), len(cell.gates))):
        raise error_in(cell, "the gate whose product is not of h has to be the last one")
    if made.operand is None:
        return
    if depends_on_second(made, made.operand):
        raise error_in(cell, "the operand of the second product depends on that product")
    others = [
        name
        for name, leaf in zip(cell.states[1:], made.states[1:], strict=True)
        if leaf in made.graph.below([made.operand])
    ]
    if others:
        raise error_in(
            cell, f"the operand of the second product may depend on {cell.states[0]}, but not on {others[0]}"
        )


def depends_on_second(made: Record, node: int) -> bool:
    """Whether a node is of the second phase of a step."""
    return not made.graph.below([node]).isdisjoint(made.products[g] for g in made.second)
