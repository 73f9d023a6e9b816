"""What backward computes, from the record of a cell's equation (equation.py), and what forward keeps for it."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastrnn.equation import Graph, Record, depends_on_second

Operands: TypeAlias = tuple[int, ...]
Gradients: TypeAlias = dict[
    int, tuple[int, int | None]
]  # by gate: all but what comes by a second product's operand, and that

SAVE = 100  # the cost of keeping a vector from forward to backward; those of computing it again are measured by it
AGAIN = {
    "sigmoid": 60,
    "tanh": 60,
    "exp": 50,
    "logsigmoid": 80,
    "relu": 5,
    "step": 5,
    "maximum": 5,
    "+": 3,
    "-": 3,
    "*": 3,
    "/": 15,
}


def _sigmoid(graph: Graph, node: int, d: int, operands: Operands) -> list[int]:
    return [graph.mul(graph.mul(d, node), graph.sub(graph.const(1), node))]


def _tanh(graph: Graph, node: int, d: int, operands: Operands) -> list[int]:
    return [graph.mul(d, graph.sub(graph.const(1), graph.mul(node, node)))]


def _quotient(graph: Graph, node: int, d: int, operands: Operands) -> list[int]:
    by_first = graph.div(d, operands[1])
    return [by_first, graph.sub(graph.const(0), graph.mul(by_first, node))]


def _logsigmoid(graph: Graph, node: int, d: int, operands: Operands) -> list[int]:
    return [graph.mul(d, graph.apply("sigmoid", graph.sub(graph.const(0), operands[0])))]


def _maximum(graph: Graph, node: int, d: int, operands: Operands) -> list[int]:
    a, b = operands
    return [graph.apply("maximum_backward", a, b, d), graph.apply("maximum_backward", b, a, d)]


# What a node gives to each of its operands, d being the derivative by the node.
RULES: dict[str, Callable[[Graph, int, int, Operands], list[int]]] = {
    "+": lambda graph, node, d, operands: [d, d],
    "-": lambda graph, node, d, operands: [d, graph.sub(graph.const(0), d)],
    "*": lambda graph, node, d, operands: [graph.mul(d, operands[1]), graph.mul(d, operands[0])],
    "/": _quotient,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "exp": lambda graph, node, d, operands: [graph.mul(d, node)],
    "logsigmoid": _logsigmoid,
    "relu": lambda graph, node, d, operands: [graph.apply("relu_backward", node, d)],
    "step": lambda graph, node, d, operands: [graph.const(0)],
    "maximum": _maximum,
}


def differentiate(graph: Graph, seeds: dict[int, int]) -> dict[int, int]:
    """The derivative by every node, as nodes of the same graph, given those by the nodes `seeds`."""
    found = dict(seeds)
    for node in range(max(seeds), -1, -1):
        operation, operands = graph.nodes[node]
        if node not in found or operation in ("leaf", "const"):
            continue
        for operand, value in zip(operands, RULES[operation](graph, node, found[node], operands), strict=True):
            found[operand] = graph.add(found[operand], value) if operand in found else value
    return found


@dataclass
class Derivatives:
    """What backward computes: gradients as vectors, where each gate's and unit weight's is among them, and the states'.

    With a second product, what its operand's gradient adds to vectors and states, by their index.
    """

    vectors: list[int] = field(default_factory=list)
    input_grad: list[int] = field(default_factory=list)  # by gate
    recurrent_grad: list[int] = field(default_factory=list)  # by gate that has a recurrent product
    unit_grad: list[int] = field(default_factory=list)  # by unit weight
    mask_grad: list[int] = field(default_factory=list)  # by mask, of a cell whose masks have gradients
    normalized_grad: int = -1  # of the operand's normalization, if there is one
    states: list[int] = field(default_factory=list)
    later: dict[int, int] = field(default_factory=dict)  # by vector
    states_later: dict[int, int] = field(default_factory=dict)  # by state

    def wanted(self) -> list[int]:
        return [*self.vectors, *self.states, *self.later.values(), *self.states_later.values()]


def derive(made: Record) -> Derivatives:
    graph, cell = made.graph, made.cell
    sums = graph.sums(made.results)
    seeds: dict[int, int] = {}
    for name, output in zip(cell.states, made.outputs, strict=True):
        seed = graph.leaf(f"d{name}")
        seeds[output] = graph.add(seeds[output], seed) if output in seeds else seed
    zero = graph.const(0)
    by = differentiate(graph, seeds)
    by_operand = {} if made.operand is None else differentiate(graph, {made.operand: graph.leaf("doperand")})
    found = Derivatives(states=[by.get(leaf, zero) for leaf in made.states])
    found.states_later = {i: by_operand[leaf] for i, leaf in enumerate(made.states) if leaf in by_operand}

    def gradients(leaves: dict[int, int]) -> Gradients:
        return {gate: (by.get(leaf, zero), by_operand.get(leaf)) for gate, leaf in leaves.items()}

    inputs, products = _leaves(made)
    _place(found, made, sums, gradients(inputs), gradients(products))
    by_sum = {sums[leaf]: j for leaf, j in zip(inputs.values(), found.input_grad, strict=True) if leaf in sums}
    by_sum |= {sums[leaf]: j for leaf, j in zip(products.values(), found.recurrent_grad, strict=True) if leaf in sums}

    def place_of(leaf: int) -> int:
        found.vectors.append(by.get(leaf, zero))
        if leaf in by_operand:
            found.later[len(found.vectors) - 1] = by_operand[leaf]
        return len(found.vectors) - 1

    units = len(cell.unit_weights)
    found.unit_grad = list(map(place_of, made.given[:units]))
    for leaf in made.given[units:] if cell.mask_gradients else ():
        shared = by_sum.get(sums[leaf]) if leaf in sums else None  # a term of a sum that has a gate's product
        found.mask_grad.append(place_of(leaf) if shared is None else shared)
    if made.normalized is not None:
        found.normalized_grad = len(found.vectors)
        found.vectors.append(by.get(made.normalized, zero))
    return found


def _leaves(made: Record) -> tuple[dict[int, int], dict[int, int]]:
    """By gate, in the order of the row blocks of w_ih and w_hh."""
    return {g: made.inputs[g] for g in made.input_gates}, {g: made.products[g] for g in made.recurrent}


def _place(found: Derivatives, made: Record, sums: dict[int, int], of_input: Gradients, of_product: Gradients) -> None:
    """Gates that read the sum of their two products alone have one gradient for both, in one vector; the other gates'
    of the input come first. The input's have to be vectors 0 to G-1, the products' side by side in the order of the
    gates."""

    def is_sum(gate: int) -> bool:
        if of_product.get(gate) != of_input[gate]:
            return False
        return sums.get(made.inputs[gate]) == sums.get(made.products[gate])

    alone = [g for g in of_input if not is_sum(g)]
    shared = [g for g in of_input if g not in alone]
    if shared != made.recurrent[: len(shared)]:
        alone = list(of_input)
    place = {g: len(alone) + i for i, g in enumerate(of_product)}
    found.input_grad = [alone.index(g) if g in alone else place[g] for g in of_input]
    found.recurrent_grad = list(place.values())
    gradients = [*(of_input[g] for g in alone), *of_product.values()]
    found.vectors = [value for value, _ in gradients]
    found.later = {i: later for i, (_, later) in enumerate(gradients) if later is not None}


def choose_saved(made: Record, wanted: Iterable[int], forward_nodes: int) -> list[int]:
    """What forward has to keep so that backward can compute `wanted`: the cheapest choice between keeping and computing
    again, as a minimum cut between what only forward has and what backward needs."""
    graph = made.graph
    free = made.free
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
    edges: dict[tuple[Hashable, Hashable], float] = {}
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
        if made.operand not in saved and operand_state(made) < 0:
            saved.append(made.operand)  # the gradient of the second product's weights reads it, or of its normalization
        _keep_between_phases(made, saved)
    return saved


def operand_state(made: Record) -> int:
    """Which state besides the output is what is normalized, and need not be saved for that; -1: none."""
    states = made.outputs[1:]
    return states.index(made.operand) if made.normalized is not None and made.operand in states else -1


def _keep_between_phases(made: Record, saved: list[int]) -> None:
    """Adds what the second phase of a step needs of the products of the first."""
    graph = made.graph
    of_step = sorted(graph.below([*made.outputs, *saved]))
    later = {node for node in of_step if depends_on_second(made, node)}
    first_products = {leaf for g, leaf in made.products.items() if g not in made.second}

    def is_at_hand(node: int) -> bool:
        if node in saved or graph.nodes[node][0] in ("leaf", "const"):
            return node not in first_products or node in saved
        return all(map(is_at_hand, graph.operands(node)))

    crossing = {operand for node in later for operand in graph.operands(node)} | set(made.outputs)
    for node in sorted(crossing - later):
        if not is_at_hand(node):
            saved.append(node)


def minimum_cut(edges: dict[tuple[Hashable, Hashable], float], source: Hashable, sink: Hashable) -> set[Any]:
    """The side of the source in the cheapest cut between the two, the smallest such side; edges[a, b] is what cutting
    the edge from a to b costs. (Edmonds and Karp 1972: the shortest path that is left is filled up, until none is.)
    """
    left: defaultdict[Hashable, dict[Hashable, float]] = defaultdict(dict)
    for (a, b), capacity in edges.items():
        left[a][b] = left[a].get(b, 0) + capacity
        left[b].setdefault(a, 0)
    while True:
        before: dict[Hashable, Hashable | None] = {source: None}
        waiting = deque([source])
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
