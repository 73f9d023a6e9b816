"""What fastrnn is to reach, as data, and whether the rows of a run reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cases import DTYPES, Shape
from benchmarks.peers import FASTRNN
from benchmarks.records import Row
from benchmarks.suites import BEST, LATENCY, MEMORY, ODD, TRAINING
from benchmarks.table import group_by_case, is_unsettled

LISTED = 6  # with more values than this, only the worst is shown

Key = tuple[str, str, Shape]  # cell, mode, shape
Measured = dict[Key, dict[str, Row]]  # the rows of each case by provider; those without figures are left out
Value = Callable[[Measured, Key], float | None]  # None: not measured


def speed(*peers: str, ours: str = FASTRNN.name) -> Value:
    """The time of the fastest of `peers` over the time of `ours`."""

    def value(measured: Measured, key: Key) -> float | None:
        case = measured.get(key, {})
        if not {ours, *peers} <= case.keys():
            return None
        return min(case[peer].ratio for peer in peers) / case[ours].ratio

    return value


def arithmetic_share(measured: Measured, key: Key) -> float | None:
    """The share of the peak rate of the FMA units, where these are the limit.

    Not known if it is more than all of it: then the peak was measured on a disturbed machine.
    """
    row = measured.get(key, {}).get(FASTRNN.name)
    return row.limit_share if row and row.limit_kind == "compute" and row.limit_share <= 1 else None


def slowdown(measured: Measured, key: Key) -> float | None:
    """The time with 16 threads over the time with 2."""
    case = measured.get(key, {})
    two = case.get("fastrnn-2t") or next((row for row in case.values() if row.threads == 2), None)
    many = case.get("fastrnn-16t")
    if two is None or many is None:
        return None
    return many.ratio / (two.ratio if two.provider == "fastrnn-2t" else 1)


def memory(ours: str, peer: str) -> Value:
    """The peak memory of `ours` over the peer's."""

    def value(measured: Measured, key: Key) -> float | None:
        case = measured.get(key, {})
        return case[ours].ratio / case[peer].ratio if {ours, peer} <= case.keys() else None

    return value


def growth(measured: Measured, key: Key) -> float | None:
    """The memory that twice the steps need more, as a multiple of the output that they add."""
    cell, mode, shape = key
    once, twice = (measured.get((cell, mode, s), {}).get(FASTRNN.name) for s in (shape, shape._replace(T=2 * shape.T)))
    if once is None or twice is None:
        return None
    output = shape.T * shape.B * shape.H * DTYPES[once.dtype].itemsize
    return (twice.p50 - once.p50) * 1e6 / output


@dataclass(frozen=True)
class Bound:
    """What each value, and the geometric mean of all, has to reach; or, if `at_most`, may not pass."""

    each: float
    mean: float | None = None
    at_most: bool = False

    def holds_for(self, value: float) -> bool:
        return value <= self.each if self.at_most else value >= self.each

    def mean_holds(self, values: Iterable[float]) -> bool:
        return self.mean is None or geometric_mean(values) >= self.mean

    def __str__(self) -> str:
        text = f"{'<=' if self.at_most else '>='} {self.each:g}"
        return text if self.mean is None else f"{text} each, {self.mean:g} mean"


@dataclass(frozen=True)
class Target:
    """One line of the table: a value of each case of these modes and shapes, and a bound for each cell."""

    title: str
    modes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    value: Value
    bounds: dict[str, Bound]


def bounds(lstm, gru, rnn=None) -> dict[str, Bound]:
    """A bound per cell from its limit, or its pair of limits for each value and the mean."""
    limits = {"lstm": lstm, "gru": gru, "rnn": rnn}
    return {cell: Bound(*np.atleast_1d(limit).tolist()) for cell, limit in limits.items() if limit is not None}


def at_most(limit: float, *cells: str) -> dict[str, Bound]:
    return dict.fromkeys(cells, Bound(limit, at_most=True))


CELLS = ("lstm", "gru", "rnn")
LARGE = (Shape(100, 64, 512, 512),)
STEPS = tuple(shape._replace(T=1) for shape in LATENCY)

ALL = LATENCY + TRAINING + ODD

TARGETS = (
    Target(
        "forward + backward vs torch.nn",
        ("training",),
        ALL,
        speed("torch.nn"),
        bounds((1.15, 1.5), (2, 6.5), (1.6, 5.5)),
    ),
    Target(
        "step of training vs torch.nn",
        ("step-of-training",),
        ODD + TRAINING[1:2],
        speed("torch.nn"),
        bounds((1.1, 1.35), (1.6, 4.5), (1.4, 3.2)),
    ),
    Target(
        "inference vs best peer",
        ("inference",),
        ALL,
        speed(*BEST),
        bounds((1.0, 1.15), (1.05, 1.4), (1.1, 2)),
    ),
    Target(
        "inference, batch 1, bf16 weights, vs best peer",
        ("inference",),
        LATENCY,
        speed(*BEST, ours="fastrnn-bf16"),
        bounds((1.5, 2.5), (1.5, 2.5), (1.5, 2.5)),
    ),
    Target(
        "inference, batch 1, int8 weights, vs best peer in float32",
        ("inference",),
        LATENCY[3:],
        speed(*BEST, ours="fastrnn-int8"),
        bounds(2.5, 2.5),
    ),
    Target(
        "inference, batch 1, int8 weights, vs torch's dynamic int8",
        ("inference",),
        LATENCY[3:],
        speed("torch.nn-int8", ours="fastrnn-int8"),
        bounds(1.5, 1.5),
    ),
    Target(
        "forward + backward with bfloat16 products, vs without",
        ("training",),
        TRAINING[1:3],
        speed("fastrnn", ours="fastrnn-bf16-products"),
        bounds(1.5, 1.5, 1.4),
    ),
    Target(
        "forward + backward, one row a step shorter, vs torch.nn packed",
        ("lengths",),
        TRAINING,
        speed("torch.nn"),
        bounds(4, 4, 3),
    ),
    Target("share of the FMA peak, inference", ("inference",), LARGE, arithmetic_share, bounds(0.82, 0.80, 0.80)),
    Target(
        "share of the FMA peak, forward + backward", ("training",), LARGE, arithmetic_share, bounds(0.78, 0.73, 0.75)
    ),
    Target(
        "streaming one frame, vs torch.nn's cell",
        ("stream",),
        STEPS[:1],
        speed("torch.nn", ours="fastrnn-stream"),
        bounds(4, 4),
    ),
    Target(
        "one step of a module, vs torch.nn's cell",
        ("step",),
        STEPS,
        speed("torch.nn", ours="fastrnn-module"),
        bounds(1, 1, 1),
    ),
    Target("one step of a cell module, vs torch.nn's cell", ("step",), STEPS, speed("torch.nn"), bounds(1, 1, 1)),
    Target(
        "time with 16 threads over time with 2",
        ("inference", "training"),
        LATENCY + TRAINING,
        slowdown,
        at_most(1.5, *CELLS),
    ),
    Target(
        "peak memory of training over torch.nn's",
        ("training-memory",),
        MEMORY,
        memory("fastrnn", "torch.nn"),
        at_most(1.0, "lstm"),
    ),
    Target(
        "the same with recompute",
        ("training-memory",),
        MEMORY,
        memory("fastrnn-recompute", "torch.nn"),
        at_most(0.4, "lstm"),
    ),
    Target(
        "memory of inference that grows with T, over its output",
        ("inference-memory",),
        MEMORY,
        growth,
        at_most(1.05, *CELLS),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """The measured values of a target and a cell, by mode and shape; `expected` is how many there should be."""

    target: Target
    cell: str
    values: dict[tuple[str, Shape], float]
    expected: int

    @property
    def bound(self) -> Bound:
        return self.target.bounds[self.cell]

    @property
    def worst(self) -> tuple[str, Shape]:
        return (max if self.bound.at_most else min)(self.values, key=self.values.get)

    @property
    def mean(self) -> float:
        return geometric_mean(self.values.values())

    @property
    def is_complete(self) -> bool:
        return len(self.values) == self.expected

    @property
    def is_short(self) -> bool:
        """Whether what was measured falls short. The mean counts when it is that of all."""
        if not all(map(self.bound.holds_for, self.values.values())):
            return True
        return self.is_complete and not self.bound.mean_holds(self.values.values())

    @property
    def is_reached(self) -> bool:
        return self.is_complete and not self.is_short


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def by_key(rows: Iterable[Row]) -> Measured:
    """The rows with figures of one setting, by case and provider; the control left out."""
    cases = group_by_case(row for row in rows if row.p50 is not None)
    keyed = ((next(iter(case.values())), case) for case in cases)
    return {(row.cell, row.mode, row.shape): case for row, case in keyed}


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """What can be said from the rows of one setting, target by target."""
    measured = by_key(rows)
    found = []
    for target in TARGETS:
        for cell in target.bounds:
            places = [(mode, shape) for mode in target.modes for shape in target.shapes]
            values = {place: target.value(measured, (cell, *place)) for place in places}
            values = {place: value for place, value in values.items() if value is not None}
            if values:
                found.append(Verdict(target, cell, values, len(places)))
    return found


def print_verdicts(console: Console, rows: Iterable[Row]) -> None:
    """Prints a table of the targets that a run of float32 on the CPU has figures for."""
    rows = [row for row in rows if (row.device, row.dtype) == ("cpu", "float32")]
    found = verdicts(rows)
    if not found:
        return
    table = Table(title=f"Targets, {rows[0].machine}", show_lines=True)
    table.add_column("target")
    for cell in CELLS:
        table.add_column(cell)
    for target, group in groupby(found, key=lambda verdict: verdict.target):
        fields = {verdict.cell: describe(verdict) for verdict in group}
        table.add_row(target.title, *(fields.get(cell, "-") for cell in CELLS))
    console.print(table)
    reached = sum(verdict.is_reached for verdict in found)
    console.print(f"{reached} of {len(found)} cells are measured in full and reach their targets.")
    if any(is_unsettled(row) for row in rows):
        console.print("[yellow]The machine was not settled: none of this counts.[/]")


def describe(verdict: Verdict) -> str:
    """The bound, the values in the order of the target's shapes, the worst and the mean; with rich's colours."""
    bound, values = verdict.bound, verdict.values
    shown = {place: f"{value:.2f}" for place, value in values.items()}
    mode, shape = verdict.worst
    worst = f"{'max' if bound.at_most else 'min'} {shown[verdict.worst]}"
    lines = [str(bound)]
    if len(values) > LISTED:
        lines.append(f"{worst} ({mode} {shape})")
    elif len(values) > 1:
        marked = (text if bound.holds_for(values[place]) else f"[red]{text}[/]" for place, text in shown.items())
        lines += [" ".join(marked), worst]
    else:
        lines.append(shown[verdict.worst])
    if len(values) > 1:
        lines[-1] += f", mean {verdict.mean:.2f}"
    if not verdict.is_complete:
        lines.append(f"{len(values)} of {verdict.expected} cases measured")
    if verdict.is_short:
        lines.append("[red]SHORT[/]")
    elif verdict.is_reached:
        lines.append("[green]reached[/]")
    return "\n".join(lines)
