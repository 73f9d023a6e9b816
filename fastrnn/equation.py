"""A cell's equation (cells.py) as a graph: `record` runs it on symbols. Equal expressions are one node throughout.

This file needs nothing but Python.
"""

from __future__ import annotations

import inspect
import linecache
import numbers
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias, Union

if TYPE_CHECKING:
    from fastrnn.cells import Cell

Operand: TypeAlias = Union["Value", float]  # of an operation
Node: TypeAlias = tuple[
    str, tuple[Any, ...]
]  # an operation and its operands; of a leaf its name, of a constant its value

# And how many arguments each has.
FUNCTIONS = {"sigmoid": 1, "tanh": 1, "relu": 1, "exp": 1, "logsigmoid": 1, "step": 1, "maximum": 2}
OPERATIONS = f"+ - * /, {', '.join(FUNCTIONS)}, normalized"
MAX_GATES = 4  # as many as the kernels have tiles for


class EquationError(TypeError):
    """An equation that cannot be made a kernel; the message names its line."""


def error_in(cell: Cell, what: str) -> EquationError:
    """With the line that is being recorded, or the equation's first one."""
    code = cell.equation.__code__
    lines = [f.lineno for f in traceback.extract_stack() if (f.filename, f.name) == (code.co_filename, code.co_name)]
    line = lines[-1] if lines else code.co_firstlineno
    text = linecache.getline(code.co_filename, line or 0).strip()
    return EquationError(f'cell {cell.name}: {what}; {code.co_filename}:{line}: "{text}"')


class Graph:
    """Expressions by value. A node is its number; `nodes[n]` is (operation, operands)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}

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

    def div(self, a: int, b: int) -> int:
        return a if self.value(b) == 1 else self._intern(("/", (a, b)))

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

    def _intern(self, node: Node) -> int:
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

    def parents(self, nodes: Iterable[int]) -> dict[int, list[int]]:
        """What each node goes into on the way to these."""
        found: dict[int, list[int]] = {}
        for node in sorted(self.below(nodes)):
            for operand in self.operands(node):
                found.setdefault(operand, []).append(node)
        return found

    def sums(self, ends: Iterable[int]) -> dict[int, int]:
        """By node on the way to these: the largest sum that it is a term of, and that is all that reads it and its
        terms; the node itself if there is none."""
        ends = set(ends)
        parents = self.parents(ends)
        found: dict[int, int] = {}
        for node in sorted(self.below(ends), reverse=True):
            above = parents.get(node, [])
            operation, (first, *_) = self.nodes[above[0]] if len(above) == 1 else (None, (None,))
            is_term = node not in ends and (operation == "+" or (operation == "-" and first == node))
            found[node] = found[above[0]] if is_term else node
        return found


def _both_ways(pair: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    a, b = pair
    return (a, b), (b, a)


class Value:
    """What an equation computes with while it is recorded."""

    def __init__(self, made: Record, node: int) -> None:
        self.made, self.node = made, node

    @property
    def graph(self) -> Graph:
        return self.made.graph

    @property
    def cell(self) -> Cell:
        return self.made.cell

    def _of(self, node: int) -> Value:
        self.made.note_names()
        return Value(self.made, node)

    def _number(self, other: object) -> int:
        if isinstance(other, Value):
            return other.node
        if isinstance(other, numbers.Real) and not isinstance(other, bool):
            size: Any = abs(other)
            if not size <= 1e38 or 0 < size < 1e-37:
                raise error_in(self.cell, f"{other!r} is no normal number of float32")
            return self.graph.const(float(other))
        raise error_in(self.cell, f"expected a value of the step or a number, got {type(other).__name__}")

    def __add__(self, other: Operand) -> Value:
        return self._of(self.graph.add(self.node, self._number(other)))

    def __sub__(self, other: Operand) -> Value:
        return self._of(self.graph.sub(self.node, self._number(other)))

    def __rsub__(self, other: Operand) -> Value:
        return self._of(self.graph.sub(self._number(other), self.node))

    def __mul__(self, other: Operand) -> Value:
        return self._of(self.graph.mul(self.node, self._number(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Value:
        return self._of(self.graph.sub(self.graph.const(0), self.node))

    def __truediv__(self, other: Operand) -> Value:
        return self._of(self.graph.div(self.node, self._number(other)))

    def __rtruediv__(self, other: Operand) -> Value:
        return self._of(self.graph.div(self._number(other), self.node))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch.tanh(value) and the like, for those who write equations with them."""
        value = next(argument for argument in (*args, *(kwargs or {}).values()) if isinstance(argument, Value))
        name = {"log_sigmoid": "logsigmoid"}.get(function.__name__, function.__name__)
        if name not in FUNCTIONS or len(args) != FUNCTIONS[name] or any((kwargs or {}).values()):
            raise error_in(value.cell, f"{function.__name__} is not an operation of a cell: there are {OPERATIONS}")
        value.numbers_of(args)
        return getattr(args[0], name)(*args[1:])

    def numbers_of(self, arguments: Iterable[object]) -> list[int]:
        """Their nodes; an error if one is neither a value of the step nor a number."""
        return [self._number(argument) for argument in arguments]

    def normalized(self) -> Value:
        """Layer normalization over the units: a leaf of the second phase of a step, as a second product is."""
        if self.made.normalized is not None and self.made.operand != self.node:
            raise error_in(self.cell, "two values are normalized; a step has at most one")
        self.made.operand, self.made.normalized = self.node, self.graph.leaf("normalized")
        return self._of(self.made.normalized)

    __array_ufunc__ = None  # numpy's numbers leave operations with values to them

    def _in_place(self, *_: object) -> Any:
        raise error_in(self.cell, "an operation in place would write to what others read, too; write a = a + b")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = _in_place

    def _branch(self, *_: object) -> Any:
        raise error_in(self.cell, "a step cannot branch on a value: it is the same for all rows and units")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _branch

    def _refuse(self, *_: object) -> Any:
        raise error_in(self.cell, f"expected {OPERATIONS}")

    __floordiv__ = __mod__ = __pow__ = __rpow__ = __matmul__ = __abs__ = _refuse
    __getitem__ = __iter__ = __float__ = __int__ = __call__ = __format__ = __index__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS:
            raise error_in(self.cell, f"{name} is not an operation of a cell: there are {OPERATIONS}")

        def of(*others: object) -> Value:
            if 1 + len(others) != FUNCTIONS[name]:
                raise error_in(self.cell, f"{name}: expected {FUNCTIONS[name]} values, got {1 + len(others)}")
            return self._of(self.graph.apply(name, self.node, *self.numbers_of(others)))

        return of


class Gates:
    """`x` or `u` of an equation: something for each gate, by its name, made when it is asked for."""

    def __init__(self, cell: Cell, of_gate: Callable[[int], Any]) -> None:
        self._cell, self._of_gate = cell, of_gate

    def __getattr__(self, name: str) -> Any:
        if name not in self._cell.gates:
            raise error_in(self._cell, f"there is no gate {name}, but {', '.join(self._cell.gates)}")
        return self._of_gate(self._cell.gates.index(name))


@dataclass
class Record:
    """An equation as a graph: its leaves, the operand of the second product, or of the normalization (None: there is
    one phase, and all products are of h), what the equation calls its values."""

    cell: Cell
    graph: Graph = field(default_factory=Graph)
    inputs: dict[int, int] = field(default_factory=dict)  # by gate, of those that have a product of the input
    products: dict[int, int] = field(default_factory=dict)  # by gate, of those that have a recurrent product
    states: list[int] = field(default_factory=list)  # before the step
    given: list[int] = field(default_factory=list)  # unit weights, then masks
    outputs: list[int] = field(default_factory=list)  # after it
    second: list[int] = field(default_factory=list)  # gates of the second product
    operand: int | None = None
    normalized: int | None = None  # the operand's normalization, if that is what the second phase is for
    variables: dict[str, int] = field(default_factory=dict)  # of the equation, with what they held last

    @property
    def input_gates(self) -> list[int]:
        """The gates that have a product of the input, in order: row blocks of w_ih."""
        return sorted(self.inputs)

    @property
    def recurrent(self) -> list[int]:
        """The gates that have a recurrent product, in order: row blocks of w_hh."""
        return sorted(self.products)

    @property
    def results(self) -> list[int]:
        """What a step has computed in the end, and in the middle."""
        return [*self.outputs, *([] if self.operand is None else [self.operand])]

    @property
    def free(self) -> set[int]:
        """What backward has without its being saved."""
        return {*self.states, *self.given, *self.outputs[1:]} | (
            {self.normalized} if self.normalized is not None else set()
        )

    def note_names(self) -> None:
        """Called at every operation: what the equation's variables hold."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self.cell.equation.__code__:
            frame = frame.f_back
        if frame is not None:
            self.variables |= {name: v.node for name, v in frame.f_locals.items() if isinstance(v, Value)}


def check_names(cell: Cell) -> None:
    """That the names of gates, states, unit weights and masks are names, each given once, and the equation's own."""
    named = [*cell.states, *cell.unit_weights, *cell.masks, *dict(cell.numbers)]

    given_numbers: tuple[tuple[str, Any], ...] = cell.numbers
    for name, value in given_numbers:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not abs(value) <= 1e38:
            given = "none, nor has the equation a default" if value is inspect.Parameter.empty else repr(value)
            raise error_in(cell, f"{name}: expected a number, got {given}")
    if not cell.gates or not cell.states:
        raise error_in(cell, "expected at least one gate and one state")
    for group in (cell.gates, named):
        for name in group:
            if not name.isidentifier() or name[0] == "_" or name in ("x", "u") or group.count(name) > 1:
                raise error_in(cell, f"{name!r} is no name for a gate, state, unit weight, mask or number, or is twice")
    if len(cell.gates) > MAX_GATES:
        raise error_in(cell, f"expected at most {MAX_GATES} gates, got {len(cell.gates)}")
    try:
        inspect.signature(cell.equation).bind(None, None, **dict.fromkeys(named))
    except TypeError as error:
        raise error_in(cell, f"expected an equation of x, u, {', '.join(named)}: {error}") from None


def record(cell: Cell) -> Record:
    """Runs the equation on symbols."""
    check_names(cell)
    made = Record(cell)
    graph = made.graph
    made.states = [graph.leaf(f"{state}_prev") for state in cell.states]
    made.given = [graph.leaf(f"given[{i}]") for i in range(len(cell.unit_weights) + len(cell.masks))]
    asked: dict[int, int] = {}

    def product(gate: int) -> Callable[[object], Value]:
        def of(operand: object) -> Value:
            if not isinstance(operand, Value):
                raise error_in(
                    cell, f"u.{cell.gates[gate]}: expected a value of the step, got {type(operand).__name__}"
                )
            if asked.setdefault(gate, operand.node) != operand.node:
                raise error_in(cell, f"u.{cell.gates[gate]} has two operands; a gate has one recurrent product")
            return Value(made, graph.leaf(f"product {gate}"))

        return of

    def input_of(gate: int) -> Value:
        made.inputs[gate] = graph.leaf(f"input {gate}")
        return Value(made, made.inputs[gate])

    results = cell.call(
        Gates(cell, input_of), Gates(cell, product), *(Value(made, leaf) for leaf in [*made.states, *made.given])
    )
    results = results if isinstance(results, tuple) else (results,)
    if len(results) != len(cell.states) or not all(isinstance(result, Value) for result in results):
        given = ", ".join("a value" if isinstance(result, Value) else type(result).__name__ for result in results)
        raise error_in(cell, f"expected the new {', '.join(cell.states)}, got {given}")
    made.outputs = [result.node for result in results]
    made.products = {gate: graph.leaf(f"product {gate}") for gate in asked}
    _check_normalized(made, asked)
    unused = [name for gate, name in enumerate(cell.gates) if gate not in {*made.inputs, *asked}]
    if unused or not made.inputs:
        raise error_in(cell, f"no product of gate {unused[0]} is asked for" if unused else "nothing reads the input")
    _find_stages(made, asked)
    return made


def _check_normalized(made: Record, asked: dict[int, int]) -> None:
    """That the groups of normalized products are all the gates, each once, and that these are products of h."""
    cell, named = made.cell, [gate for group in made.cell.normalized for gate in group]
    if named and (sorted(named) != sorted(cell.gates) or () in cell.normalized):
        raise error_in(cell, f"normalized: expected groups of all the gates, each once, got {cell.normalized}")
    others = [cell.gates[gate] for gate, operand in asked.items() if operand != made.states[0]]
    if others and (named or made.normalized is not None):
        raise error_in(cell, f"u.{others[0]}: with normalization, expected all products to be of {cell.states[0]}")


def _find_stages(made: Record, asked: dict[int, int]) -> None:
    cell, h = made.cell, made.states[0]
    operands = {operand for operand in asked.values() if operand != h}
    if len(operands) > 1:
        raise error_in(cell, "there are products of more than one operand besides h")
    made.second = sorted(gate for gate, operand in asked.items() if operand != h)
    if operands:
        made.operand = operands.pop()
    recurrent = made.recurrent
    if made.second and len(made.second) == len(recurrent):
        raise error_in(cell, "all products are of something else than h")
    if made.second != recurrent[len(recurrent) - len(made.second) :]:
        raise error_in(cell, "the gates whose product is not of h have to be the last ones")
    if made.operand is not None and depends_on_second(made, made.operand):
        raise error_in(cell, "the operand of the second product depends on that product")


def depends_on_second(made: Record, node: int) -> bool:
    """Whether a node is of the second phase of a step."""
    return not made.graph.below([node]).isdisjoint({*(made.products[g] for g in made.second), made.normalized})
