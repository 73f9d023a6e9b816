"""From a cell's equation (cells.py) to the C++ struct of its kernels, forward and backward.

Three steps after `record` (equation.py): `derive` goes through the record in reverse, `choose_saved` finds what forward
has to keep (derivatives.py), `struct` writes it all down. The contract of the struct is that of csrc/cells/cell.h.
setup.py writes csrc/cells/generated.h by this; it needs nothing but Python.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fastrnn.derivatives import Derivatives, choose_saved, derive, operand_state
from fastrnn.equation import Record, depends_on_second, error_in, record

if TYPE_CHECKING:
    from fastrnn.cells import Cell

TARGET = Path(__file__).resolve().parent.parent / "csrc" / "cells" / "generated.h"


class _Counts(TypedDict):
    gates: int
    first_gates: int
    second_gates: int
    carried: int
    unit_weights: int
    masks: int
    saved: int
    grads: int
    saved_operand: int
    gains: int
    is_normalized: bool
    input_grad: list[int]
    recurrent_grad: list[int]
    unit_grad: list[int]


class Sizes(_Counts, total=False):
    """The constants of a cell's struct, by their names in Python; see csrc/cells/cell.h. These are not among those
    that the extension gives back."""

    mask_grad: list[int]
    reads_h: bool
    normalizes: bool
    operand_state: int
    normalized_grad: int
    input_group: list[int]
    recurrent_group: list[int]


PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
# Arguments and functions of the kernels, and words of C++ that Python leaves free.
RESERVED = re.findall(
    r"\w+",
    """
    x h c V saved grads given dh dc dcarried doperand h_prev c_prev dh_prev
    errno stdin stdout stderr linux unix assert isnan isinf isfinite isnormal signbit fpclassify major minor
    sigmoid tanh relu exp logsigmoid step maximum relu_backward maximum_backward
    alignas alignof and_eq asm auto bitand bitor bool case catch char compl concept const constexpr decltype default
    delete do double enum explicit export extern false float friend goto inline int long mutable namespace new noexcept
    not_eq nullptr operator or_eq private protected public register requires short signed sizeof static struct switch
    template this throw true typedef typeid typename union unsigned using virtual void volatile xor xor_eq
""",
)
MADE_UP = re.compile(r"t\d+")  # values that the equation does not name


def names_in_cpp(made: Record) -> dict[int, str]:
    """What the equation's values are called: as it calls them, where C++ can."""
    reserved = {*RESERVED, *_carried(made).values(), *_seeds(made).values()}
    names: dict[int, str] = {}
    for name, node in made.variables.items():
        if made.graph.nodes[node][0] in ("const", "leaf") or node in names:
            continue
        text = name if name.isascii() else f"v{node}"
        if text in reserved or MADE_UP.fullmatch(text) or text.isupper():  # those in capitals may be macros
            text += "_t"
        while text in names.values():
            text += "_"
        names[node] = text
    return names


class Writer:
    """Statements of C++ that compute nodes from those that are at hand; each value that has a name in the equation, or
    is used more than once, is a line of its own."""

    def __init__(self, made: Record, at_hand: dict[int, str]) -> None:
        self.made, self.graph = made, made.graph
        self.lines: list[str] = []
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
            return f"V({int(value)})" if value == int(value) and abs(value) < 1e6 else f"V({value!r})", 9
        if operation == "leaf":
            raise error_in(self.made.cell, f"{operands[0]} is wanted where the kernels do not have it")
        parts = [self._expression(operand) for operand in operands]
        if operation not in PRECEDENCE:
            return f"{operation}({', '.join(text for text, _ in parts)})", 9
        binds = PRECEDENCE[operation]
        (left, binds_left), (right, binds_right) = parts
        left = left if binds_left >= binds else f"({left})"
        right = right if binds_right > binds else f"({right})"
        return f"{left} {operation} {right}", binds


def class_name(cell: Cell) -> str:
    return "".join(word.capitalize() for word in cell.name.split("_"))


def _plan(cell: Cell) -> tuple[Record, Derivatives, list[int]]:
    made = record(cell)
    forward_nodes = len(made.graph.nodes)
    derived = derive(made)
    return made, derived, choose_saved(made, derived.wanted(), forward_nodes)


def description(cell: Cell) -> Sizes:
    """The constants of the cell's struct by their names in Python; see csrc/cells/cell.h."""
    return _description(*_plan(cell))


def struct(cell: Cell) -> str:
    """The C++ struct of a cell."""
    made, derived, saved = _plan(cell)
    functions = [_forward(made, saved), _backward(made, derived, saved)]
    if made.operand is not None:
        functions = [_first(made, saved), *functions, _backward_first(made, derived, saved)]
    lines = textwrap.wrap(
        f"{cell.name}: {cell.equation.__doc__ or ''}", 120, initial_indent="// ", subsequent_indent="// "
    )
    lines = [f"{line} ." if line.endswith("\\") else line for line in lines]  # it would continue the comment
    lines += [f"struct {class_name(cell)} {{", *_constants(made, derived, saved)]
    for function in functions:
        lines += ["", *(f"  {line}" for line in function)]
    return "\n".join([*lines, "};"])


def _constants(made: Record, derived: Derivatives, saved: list[int]) -> list[str]:
    lines = []
    for key, value in _description(made, derived, saved).items():
        name = "k" + "".join(word.capitalize() for word in key.split("_"))
        if isinstance(value, bool):
            lines.append(f"  static constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, list):
            lines.append(f"  static constexpr int {name}[{len(value) or 1}] = {{{', '.join(map(str, value))}}};")
        else:
            lines.append(f"  static constexpr int {name} = {value};")
    return lines


def _description(made: Record, derived: Derivatives, saved: list[int]) -> Sizes:
    gains = len(made.inputs) + len(made.recurrent) if made.cell.normalized else 0
    found: Sizes = {
        "gates": len(made.inputs),
        "first_gates": len(made.recurrent) - len(made.second),
        "second_gates": len(made.second),
        "carried": made.cell.carried,
        "unit_weights": len(made.cell.unit_weights),
        "masks": len(made.cell.masks),
        "gains": gains,
        "saved": len(saved) + gains,
        "grads": len(derived.vectors),
        "saved_operand": saved.index(made.operand) if made.operand in saved else -1,
        "input_grad": derived.input_grad,
        "recurrent_grad": derived.recurrent_grad,
        "unit_grad": derived.unit_grad,
        "reads_h": made.states[0] in made.graph.below(made.outputs),
        "normalizes": made.normalized is not None,
        "is_normalized": gains > 0 or made.normalized is not None,
        "operand_state": operand_state(made),
        "normalized_grad": derived.normalized_grad,
        "input_group": _groups(made, made.input_gates),
        "recurrent_group": _groups(made, made.recurrent),
    }
    if made.cell.mask_gradients:
        found["mask_grad"] = derived.mask_grad
    return found


def _groups(made: Record, gates: list[int]) -> list[int]:
    """Of each gate, the group in which its products are normalized."""
    groups = made.cell.normalized
    return [i for gate in gates for i, group in enumerate(groups) if made.cell.gates[gate] in group]


def _names_of(made: Record, saved: list[int]) -> dict[int, str]:
    """What backward calls the saved vectors: as the equation does, if it names them."""
    names = names_in_cpp(made)
    return {node: names.get(node, f"saved[{i}]") for i, node in enumerate(saved)}


def _unpack(array: str, names: dict[int, str], nodes: Iterable[int], used: set[int]) -> list[str]:
    """The line that gives the elements of an array, which are these nodes, the names that they are used by."""
    named = [f"{names[node]} = {array}[{i}]" for i, node in enumerate(nodes) if node in used and node in names]
    return [f"const V {', '.join(named)};"] if named else []


def _function(signature: str, lines: list[str]) -> list[str]:
    head = [f"FASTRNN_HD static {signature} {{"]
    if len(head[0]) > 118:
        at = head[0].rindex(", ", 0, 118) + 1
        head = [head[0][:at], "   " + head[0][at:]]
    return ["template <class V>", *head, *(f"  {line}" for line in lines), "}"]


def _given(made: Record) -> dict[int, str]:
    """h_{t-1}, and what belongs to the unit; last what is normalized, which the second phase is given."""
    normalized = {} if made.normalized is None else {made.normalized: f"given[{len(made.given)}]"}
    return {node: f"given[{i}]" for i, node in enumerate(made.given)} | {made.states[0]: "h_prev"} | normalized


def _carried(made: Record) -> dict[int, str]:
    """The other states before the step, where their array has to be read before it is written."""
    names = (f"{name}_prev" for name in made.cell.states[1:])
    return {node: _free(name) for name, node in zip(names, made.states[1:], strict=True)}


def _seeds(made: Record) -> dict[int, str]:
    """The gradients of the states after the step: of h an argument, the others in an array."""
    others = {made.graph.leaf(f"d{name}"): _free(f"d{name}") for name in made.cell.states[1:]}
    return {made.graph.leaf(f"d{made.cell.states[0]}"): "dh"} | others


def _free(name: str) -> str:
    return f"{name}_t" if name in RESERVED else name


def _products_of(made: Record, is_second: bool) -> dict[int, str]:
    """The products that a phase of the step has."""
    found = {made.inputs[gate]: f"x[{i}]" for i, gate in enumerate(made.input_gates)}
    for i, gate in enumerate(made.recurrent):
        if (gate in made.second) == is_second:
            found[made.products[gate]] = f"h[{i}]"
    return found


def _first(made: Record, saved: list[int]) -> list[str]:
    assert made.operand is not None
    before = {node: f"c_prev[{i}]" for i, node in enumerate(made.states[1:])}
    writer = Writer(made, _given(made) | before | _products_of(made, False))
    kept = [(i, node) for i, node in enumerate(saved) if not depends_on_second(made, node)]
    values = writer.compute([*(node for _, node in kept), made.operand])
    stores = [f"saved[{i}] = {value};" for (i, _), value in zip(kept, values[:-1], strict=True)]
    signature = "V first(const V* x, const V* h, V h_prev, const V* given, const V* c_prev, V* saved)"
    return _function(signature, [*writer.lines, *stores, f"return {values[-1]};"])


def _forward(made: Record, saved: list[int]) -> list[str]:
    carried, kept = _carried(made), list(enumerate(saved))
    at_hand = _given(made) | carried | _products_of(made, made.operand is not None)
    if made.operand is not None:
        from_first = [(i, node) for i, node in kept if not depends_on_second(made, node)]
        at_hand |= {node: f"saved[{i}]" for i, node in from_first}
        kept = [pair for pair in kept if pair not in from_first]
    writer = Writer(made, at_hand)
    values = writer.compute([*made.outputs, *(node for _, node in kept)])
    count = len(made.outputs)
    lines = _unpack("c", carried, made.states[1:], writer.used) + writer.lines
    lines += [f"saved[{i}] = {value};" for (i, _), value in zip(kept, values[count:], strict=True)]
    lines += [f"c[{i}] = {value};" for i, value in enumerate(values[1:count])]
    signature = "V forward(const V* x, const V* h, V h_prev, const V* given, V* c, V* saved)"
    return _function(signature, [*lines, f"return {values[0]};"])


def _backward(made: Record, derived: Derivatives, saved: list[int]) -> list[str]:
    names = _names_of(made, saved)
    before = {node: f"c_prev[{i}]" for i, node in enumerate(made.states[1:])}
    after = {node: f"c[{i}]" for i, node in enumerate(made.outputs[1:])}
    seeds = _seeds(made)
    writer = Writer(made, after | before | _given(made) | names | seeds)
    values = writer.compute([*derived.vectors, *derived.states])
    count = len(derived.vectors)
    stores = [f"grads[{i}] = {value};" for i, value in enumerate(values[:count])]
    stores += [f"{to} = {value};" for to, value in zip(("dh_prev", *_places(made)), values[count:], strict=True)]
    lines = _unpack("saved", names_in_cpp(made), saved, writer.used)
    lines += _unpack("dcarried", seeds, list(seeds)[1:], writer.used)
    signature = (
        "void backward(const V* saved, V h_prev, const V* given, const V* c_prev, const V* c, V dh, V* dcarried, "
        "V* grads, V& dh_prev)"
    )
    return _function(signature, [*lines, *writer.lines, *stores])


def _places(made: Record) -> list[str]:
    return [f"dcarried[{i}]" for i in range(len(made.states) - 1)]


def _backward_first(made: Record, derived: Derivatives, saved: list[int]) -> list[str]:
    before = {node: f"c_prev[{i}]" for i, node in enumerate(made.states[1:])}
    after = {node: f"c[{i}]" for i, node in enumerate(made.outputs[1:])}
    operand = {made.graph.leaf("doperand"): "doperand"}
    writer = Writer(made, after | before | _given(made) | _names_of(made, saved) | operand)
    places = ["dh_prev", *_places(made)]
    targets = [(f"grads[{i}]", made.graph.value(derived.vectors[i]) == 0, node) for i, node in derived.later.items()]
    targets += [(places[i], False, node) for i, node in derived.states_later.items()]
    values = writer.compute([node for *_, node in targets])
    lines = [
        f"{to} = {value if is_zero else f'{to} + {value}'};"
        for (to, is_zero, _), value in zip(targets, values, strict=True)
    ]
    signature = (
        "void backward_first(const V* saved, V h_prev, const V* given, const V* c_prev, const V* c, V doperand, "
        "V* dcarried, V* grads, V& dh_prev)"
    )
    return _function(signature, [*_unpack("saved", names_in_cpp(made), saved, writer.used), *writer.lines, *lines])


HEAD = """\
// Made by fastrnn/codegen.py from the equations in fastrnn/cells.py: the struct of every cell, see cell.h, and at the
// end the list of all.
#pragma once

#include "cell.h"

namespace fastrnn {"""


def header(cells: Iterable[Cell]) -> str:
    """The header of cells: their structs, and the list of them for every file that needs them all, ALL of those with
    kernels of all kinds, FLOAT of those with kernels of float32 on the CPU."""
    cells = list(cells)
    listed = " \\\n".join(
        f"  {'ALL' if cell.has_all_kernels else 'FLOAT'}({cell.name}, {class_name(cell)})" for cell in cells
    )
    end = f"}}  // namespace fastrnn\n\n#define FASTRNN_CELLS(ALL, FLOAT) \\\n{listed}\n"
    return "\n\n".join([HEAD, *map(struct, cells), end])


def write(cells: Iterable[Cell]) -> None:
    """Writes the header, unless it is there as it should be: else the kernels would be compiled again."""
    made = header(cells)
    if not TARGET.exists() or TARGET.read_text() != made:
        TARGET.write_text(made)


_REMEMBERED: dict[str, str] = {}  # by name, the structs of cells as their equations were


def remember(cell: Cell) -> None:
    """For `check_unchanged`: the first of a name."""
    _REMEMBERED.setdefault(cell.name, struct(cell))


def check_unchanged(cell: Cell) -> None:
    """That an equation is what it was when its cell was made.

    Raises:
        RuntimeError: it reads something from outside that has changed since.
    """
    if cell.name in _REMEMBERED and struct(cell) != _REMEMBERED[cell.name]:
        raise RuntimeError(
            f"cell {cell.name}: the equation is not what it was when it was defined: it reads something from outside "
            "that has changed, such as a loop's variable; make that a keyword-only argument"
        )
