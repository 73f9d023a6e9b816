"""From a cell's equation (cells.py) to the C++ struct of its kernels, forward and backward.

Three steps after `record` (equation.py): `differentiate` goes through the record in reverse, `choose_saved` finds what
forward has to keep, `struct` writes it all down. The contract of the struct is that of csrc/cells/cell.h. setup.py
writes csrc/cells/generated.h by this; it needs nothing but Python.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastrnn.equation import Graph, Record, depends_on_second, error_in, record

TARGET = Path(__file__).resolve().parent.parent / "csrc" / "cells" / "generated.h"
SAVE = 100  # the cost of keeping a vector from forward to backward; those of computing it again are measured by it
AGAIN = {"sigmoid": 60, "tanh": 60, "relu": 5, "+": 3, "-": 3, "*": 3}


def differentiate(graph: Graph, seeds: dict[int, int]) -> dict[int, int]:
    """The derivative by every node, as nodes of the same graph, given those by the nodes `seeds`."""
    found: dict[int, int] = {}

    def give(node, value):
        found[node] = graph.add(found[node], value) if node in found else value

    for node, seed in seeds.items():
        give(node, seed)
    one = graph.const(1)
    for node in range(max(seeds), -1, -1):
        if node not in found:
            continue
        operation, operands = graph.nodes[node]
        d = found[node]
        if operation == "+":
            for operand in operands:
                give(operand, d)
        elif operation == "-":
            give(operands[0], d)
            give(operands[1], graph.sub(graph.const(0), d))
        elif operation == "*":
            give(operands[0], graph.mul(d, operands[1]))
            give(operands[1], graph.mul(d, operands[0]))
        elif operation == "sigmoid":
            give(operands[0], graph.mul(graph.mul(d, node), graph.sub(one, node)))
        elif operation == "tanh":
            give(operands[0], graph.mul(d, graph.sub(one, graph.mul(node, node))))
        elif operation == "relu":
            give(operands[0], graph.apply("relu_backward", node, d))
    return found


@dataclass
class Derivatives:
    """What backward computes: the gate gradients as vectors, where each gate's are among them, and the states'."""

    vectors: list[int] = field(default_factory=list)
    input_grad: list[int] = field(default_factory=list)
    recurrent_grad: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    by_operand: dict[int, int] = field(default_factory=dict)  # what the operand's adds to vectors, by their index
    state_by_operand: int | None = None


def derive(made: Record) -> Derivatives:
    graph, cell = made.graph, made.cell
    seeds = {}
    for name, output in zip(("dh", "dc"), made.outputs, strict=False):
        seed = graph.leaf(name)
        seeds[output] = graph.add(seeds[output], seed) if output in seeds else seed
    zero = graph.const(0)
    by = differentiate(graph, seeds)
    of_input = [by.get(leaf, zero) for leaf in made.inputs]
    of_product = [by.get(leaf, zero) for leaf in made.products]
    later_input, later_product, later_state = {}, {}, None
    if made.operand is not None:
        by_operand = differentiate(graph, {made.operand: graph.leaf("doperand")})
        later_input = {g: by_operand[leaf] for g, leaf in enumerate(made.inputs) if leaf in by_operand}
        later_product = {g: by_operand[leaf] for g, leaf in enumerate(made.products) if leaf in by_operand}
        later_state = by_operand.get(made.states[0])
    found = Derivatives(states=[by.get(leaf, zero) for leaf in made.states], state_by_operand=later_state)
    _place(found, list(range(len(cell.gates))), of_input, of_product, later_input, later_product)
    return found


def _place(found, gates, of_input, of_product, later_input, later_product) -> None:
    """Gates whose two gradients are the same share a vector; the others' of the input come first. The input's have to
    be vectors 0 to G-1, the products' side by side in the order of the gates."""
    key = {g: ((of_input[g], later_input.get(g)), (of_product[g], later_product.get(g))) for g in gates}
    alone = [g for g in gates if key[g][0] != key[g][1]]
    shared = [g for g in gates if g not in alone]
    if shared != gates[: len(shared)]:
        alone, shared = gates, []
    found.vectors = [of_input[g] for g in alone] + [of_product[g] for g in gates]
    found.input_grad = [alone.index(g) if g in alone else len(alone) + g for g in gates]
    found.recurrent_grad = [len(alone) + g for g in gates]
    found.by_operand = {found.recurrent_grad[g]: later for g, later in later_product.items()}
    found.by_operand |= {found.input_grad[g]: later for g, later in later_input.items()}


def choose_saved(made: Record, wanted: Iterable[int], forward_nodes: int) -> list[int]:
    """What forward has to keep so that backward can compute `wanted`: the cheapest choice between keeping and computing
    again, as a minimum cut between what only forward has and what backward needs."""
    graph = made.graph
    free = {*made.states, *made.outputs[1:]}
    needed, waiting, seen = set(), list(wanted), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node < forward_nodes:
            needed.add(node)
        else:
            waiting += graph.operands(node)
    edges: dict[tuple, float] = {}
    computed = sorted(node for node in graph.below(needed) if node not in free and graph.nodes[node][0] != "const")
    for node in computed:
        operation = graph.nodes[node][0]
        edges[(node, "in"), (node, "out")] = SAVE
        edges["forward", (node, "in")] = math.inf if operation == "leaf" else AGAIN[operation]
        edges |= {((operand, "out"), (node, "in")): math.inf for operand in graph.operands(node)}
        if node in needed:
            edges[(node, "out"), "backward"] = math.inf
    kept = minimum_cut(edges, "forward", "backward")
    saved = [node for node in computed if (node, "in") in kept and (node, "out") not in kept]
    if made.operand is not None:
        if made.operand not in saved:
            saved.append(made.operand)  # the gradient of the second product's weights reads it
        _keep_between_phases(made, saved)
    return saved


def _keep_between_phases(made: Record, saved: list[int]) -> None:
    """Adds what the second phase of a step needs of the products of the first."""
    graph = made.graph
    of_step = sorted(graph.below([*made.outputs, *saved]))
    later = {node for node in of_step if depends_on_second(made, node)}
    first_products = {leaf for g, leaf in enumerate(made.products) if g not in made.second}

    def is_at_hand(node):
        if node in saved or graph.nodes[node][0] in ("leaf", "const"):
            return node not in first_products or node in saved
        return all(map(is_at_hand, graph.operands(node)))

    crossing = {operand for node in later for operand in graph.operands(node)} | set(made.outputs)
    for node in sorted(crossing - later):
        if not is_at_hand(node):
            saved.append(node)


def minimum_cut(edges: dict[tuple, float], source, sink) -> set:
    """The side of the source in the cheapest cut between the two, the smallest such side; edges[a, b] is what cutting
    the edge from a to b costs. (Edmonds and Karp 1972: the shortest path that is left is filled up, until none is.)
    """
    left = defaultdict(dict)
    for (a, b), capacity in edges.items():
        left[a][b] = left[a].get(b, 0) + capacity
        left[b].setdefault(a, 0)
    while True:
        before, waiting = {source: None}, deque([source])
        while waiting and sink not in before:
            node = waiting.popleft()
            for other, capacity in left[node].items():
                if capacity > 0 and other not in before:
                    before[other] = node
                    waiting.append(other)
        if sink not in before:
            return set(before)
        path, node = [], sink
        while before[node] is not None:
            path.append((before[node], node))
            node = before[node]
        amount = min(left[a][b] for a, b in path)
        for a, b in path:
            left[a][b] -= amount
            left[b][a] += amount


# ---- writing it down

PRECEDENCE = {"+": 1, "-": 1, "*": 2}
# Arguments and functions of the kernels, and words of C++ that Python leaves free.
RESERVED = re.findall(
    r"\w+",
    """
    x h c V saved grads dh dc doperand h_prev c_prev dh_prev sigmoid tanh relu relu_backward
    alignas alignof and_eq asm auto bitand bitor bool case catch char compl concept const constexpr decltype default
    delete do double enum explicit export extern false float friend goto inline int long mutable namespace new noexcept
    not_eq nullptr operator or_eq private protected public register requires short signed sizeof static struct switch
    template this throw true typedef typeid typename union unsigned using virtual void volatile xor xor_eq
""",
)
MADE_UP = re.compile(r"t\d+")  # values that the equation does not name


def names_in_cpp(made: Record) -> dict[int, str]:
    """What the equation's values are called: as it calls them, where C++ can."""
    names: dict[int, str] = {}
    for name, node in made.variables.items():
        if made.graph.nodes[node][0] == "const" or node in names or node in made.states:
            continue
        text = name if name.isascii() else f"v{node}"
        if text in RESERVED or MADE_UP.fullmatch(text):
            text += "_t"
        while text in names.values():
            text += "_"
        names[node] = text
    return names


class Writer:
    """Statements of C++ that compute nodes from those that are at hand; each value that has a name in the equation, or
    is used more than once, is a line of its own."""

    def __init__(self, made: Record, at_hand: dict[int, str], leaves: Iterable[str]):
        self.made, self.graph, self.lines, self.leaves = made, made.graph, [], set(leaves)
        self.text = dict(at_hand)
        self.used: set[int] = set()  # of what was at hand
        self._names = names_in_cpp(made)
        self._unnamed = 0

    def compute(self, nodes: Iterable[int]) -> list[str]:
        """Adds the statements; returns an expression for each of the nodes."""
        nodes = list(nodes)
        uses: dict[int, int] = {}
        waiting, seen = list(nodes), set()
        while waiting:
            node = waiting.pop()
            uses[node] = uses.get(node, 0) + 1
            if node in seen or node in self.text:
                continue
            seen.add(node)
            waiting += self.graph.operands(node)
        for node in sorted(seen):
            operation = self.graph.nodes[node][0]
            is_value = operation not in ("leaf", "const")
            if is_value and (node in self._names or uses[node] > 1):
                self._declare(node)
        return [self._expression(node)[0] for node in nodes]

    def _declare(self, node: int) -> None:
        expression, _ = self._expression(node)
        self.text[node] = self._names.get(node) or self._new_name()
        self.lines.append(f"const V {self.text[node]} = {expression};")

    def _new_name(self) -> str:
        self._unnamed += 1
        return f"t{self._unnamed}"

    def _expression(self, node: int) -> tuple[str, int]:
        """Its text, and how strongly its outermost operation binds."""
        if node in self.text:
            self.used.add(node)
            return self.text[node], 9
        operation, operands = self.graph.nodes[node]
        if operation == "const":
            value = operands[0]
            return f"V({int(value)})" if value == int(value) and abs(value) < 1e6 else f"V({value!r}f)", 9
        if operation == "leaf":
            if operands[0] not in self.leaves:
                raise error_in(self.made.cell, f"{operands[0]} is wanted where the kernels do not have it")
            return operands[0], 9
        parts = [self._expression(operand) for operand in operands]
        if operation not in PRECEDENCE:
            return f"{operation}({', '.join(text for text, _ in parts)})", 9
        binds = PRECEDENCE[operation]
        (left, binds_left), (right, binds_right) = parts
        left = left if binds_left >= binds else f"({left})"
        right = right if binds_right > binds else f"({right})"
        return f"{left} {operation} {right}", binds


def class_name(cell) -> str:
    return "".join(word.capitalize() for word in cell.name.split("_"))


def struct(cell) -> str:
    """The C++ struct of a cell."""
    made = record(cell)
    forward_nodes = len(made.graph.nodes)
    derived = derive(made)
    wanted = [*derived.vectors, *derived.states, *derived.by_operand.values()]
    if derived.state_by_operand is not None:
        wanted.append(derived.state_by_operand)
    saved = choose_saved(made, wanted, forward_nodes)
    functions = [_forward(made, saved), _backward(made, derived, saved)]
    if made.operand is not None:
        functions = [_first(made, saved), *functions, _backward_first(made, derived, saved)]
    sizes = {
        "kGates": len(cell.gates),
        "kSecondGates": len(made.second),
        "kSaved": len(saved),
        "kGrads": len(derived.vectors),
        "kSavedOperand": -1 if made.operand is None else saved.index(made.operand),
    }
    flags = {"kHasCell": cell.has_cell, "kReadsH": made.states[0] in made.graph.below(made.outputs)}
    lists = {"kInputGrad": derived.input_grad, "kRecurrentGrad": derived.recurrent_grad}
    lines = [
        f"// {cell.name}: {' '.join((cell.equation.__doc__ or '').split())}",
        f"struct {class_name(cell)} {{",
        f"  static constexpr int {', '.join(f'{name} = {value}' for name, value in sizes.items())};",
        *(f"  static constexpr int {n}[{len(v)}] = {{{', '.join(map(str, v))}}};" for n, v in lists.items()),
        f"  static constexpr bool {', '.join(f'{name} = {str(flag).lower()}' for name, flag in flags.items())};",
    ]
    for function in functions:
        lines += ["", *(f"  {line}" for line in function)]
    return "\n".join([*lines, "};"])


def _names_of(made: Record, saved: list[int]) -> dict[int, str]:
    """What backward calls the saved vectors: as the equation does, if it names them."""
    names = names_in_cpp(made)
    return {node: names.get(node, f"saved[{i}]") for i, node in enumerate(saved)}


def _unpack(made: Record, saved: list[int], used: set[int]) -> list[str]:
    """The line that gives the saved vectors their names."""
    names = names_in_cpp(made)
    named = [f"{names[node]} = saved[{i}]" for i, node in enumerate(saved) if node in names and node in used]
    return [f"const V {', '.join(named)};"] if named else []


def _function(signature: str, lines: list[str]) -> list[str]:
    return ["template <class V>", f"FASTRNN_HD static {signature} {{", *(f"  {line}" for line in lines), "}"]


def _given(made: Record) -> dict[int, str]:
    return dict(zip(made.states, ("h_prev", "c_prev"), strict=False))


def _products_of(made: Record, is_second: bool) -> list[str]:
    """The leaves that a phase of the step has."""
    gates = range(len(made.inputs))
    return [f"x[{g}]" for g in gates] + [f"h[{g}]" for g in gates if (g in made.second) == is_second]


def _first(made: Record, saved: list[int]) -> list[str]:
    writer = Writer(made, {made.states[0]: "h_prev"}, _products_of(made, False))
    kept = [(i, node) for i, node in enumerate(saved) if not depends_on_second(made, node)]
    values = writer.compute([*(node for _, node in kept), made.operand])
    stores = [f"saved[{i}] = {value};" for (i, _), value in zip(kept, values[:-1], strict=True)]
    return _function(
        "V first(const V* x, const V* h, V h_prev, V* saved)", [*writer.lines, *stores, f"return {values[-1]};"]
    )


def _forward(made: Record, saved: list[int]) -> list[str]:
    at_hand, lines, kept = _given(made), [], list(enumerate(saved))
    if made.operand is not None:
        from_first = [(i, node) for i, node in kept if not depends_on_second(made, node)]
        at_hand |= {node: f"saved[{i}]" for i, node in from_first}
        kept = [pair for pair in kept if pair not in from_first]
    writer = Writer(made, at_hand, _products_of(made, made.operand is not None))
    values = writer.compute([*made.outputs, *(node for _, node in kept)])
    if made.cell.has_cell and made.states[1] in writer.used:
        lines.append("const V c_prev = c;")
    lines += writer.lines
    lines += [f"saved[{i}] = {value};" for (i, _), value in zip(kept, values[len(made.outputs) :], strict=True)]
    if made.cell.has_cell:
        lines.append(f"c = {values[1]};")
    return _function("V forward(const V* x, const V* h, V h_prev, V& c, V* saved)", [*lines, f"return {values[0]};"])


def _backward(made: Record, derived: Derivatives, saved: list[int]) -> list[str]:
    names = _names_of(made, saved)
    writer = Writer(made, _given(made) | dict.fromkeys(made.outputs[1:], "c") | names, ("dh", "dc"))
    values = writer.compute([*derived.vectors, *derived.states])
    stores = [f"grads[{i}] = {value};" for i, value in enumerate(values[: len(derived.vectors)])]
    states = [f"{to} = {v};" for to, v in zip(("dh_prev", "dc"), values[len(derived.vectors) :], strict=False)]
    signature = "void backward(const V* saved, V h_prev, V c_prev, V c, V dh, V& dc, V* grads, V& dh_prev)"
    return _function(signature, [*_unpack(made, saved, writer.used), *writer.lines, *stores, *states])


def _backward_first(made: Record, derived: Derivatives, saved: list[int]) -> list[str]:
    writer = Writer(made, {made.states[0]: "h_prev"} | _names_of(made, saved), ("doperand",))
    vectors = sorted(derived.by_operand)
    wanted = [derived.by_operand[i] for i in vectors]
    if derived.state_by_operand is not None:
        wanted.append(derived.state_by_operand)
    values = writer.compute(wanted)
    is_zero = [made.graph.value(derived.vectors[i]) == 0 for i in vectors]
    lines = [
        f"grads[{i}] = {value if zero else f'grads[{i}] + {value}'};"
        for i, zero, value in zip(vectors, is_zero, values, strict=False)
    ]
    if derived.state_by_operand is not None:
        lines.append(f"dh_prev = dh_prev + {values[-1]};")
    signature = "void backward_first(const V* saved, V h_prev, V doperand, V* grads, V& dh_prev)"
    return _function(signature, [*_unpack(made, saved, writer.used), *writer.lines, *lines])


HEAD = """\
// Made by fastrnn/codegen.py from the equations in fastrnn/cells.py: the struct of every cell, see cell.h, and at the
// end the list of all.
#pragma once

#include "cell.h"

namespace fastrnn {"""


def header(cells: Iterable) -> str:
    """The header of all cells: their structs, and the list of them for every file that needs them all."""
    cells = list(cells)
    listed = " \\\n".join(f"  X({cell.name}, {class_name(cell)})" for cell in cells)
    end = f"}}  // namespace fastrnn\n\n#define FASTRNN_CELLS(X) \\\n{listed}\n"
    return "\n\n".join([HEAD, *map(struct, cells), end])


def write(cells: Iterable) -> None:
    """Writes the header, unless it is there as it should be: else the kernels would be compiled again."""
    made = header(cells)
    if not TARGET.exists() or TARGET.read_text() != made:
        TARGET.write_text(made)
