"""The table that a run prints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.limits import Limits
from benchmarks.peers import FASTRNN
from benchmarks.records import Row

UNSETTLED = 0.1  # a contender against itself should be within 10 % of 1
SUMMARY = "In short: time of the fastest peer over fastrnn's"


def group_by_case(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """For each case its rows by provider, the control left out."""
    cases = defaultdict(dict)
    for row in rows:
        if not row.is_control:
            cases[row.case][row.provider] = row
    return list(cases.values())


def measured_peers(rows: Iterable[Row]) -> list[str]:
    """The peers that have figures, in the order of their first appearance."""
    names = dict.fromkeys(row.provider for row in rows if row.ratio is not None and not row.is_control)
    return [name for name in names if name != FASTRNN.name]


def best_peer(case: dict[str, Row]) -> Row | None:
    """The peer that needs the least; variants of fastrnn do not take part."""
    peers = [row for name, row in case.items() if name != FASTRNN.name and row.p50 is not None and not row.is_variant]
    return min(peers, key=lambda row: row.p50, default=None)


def fastest(case: dict[str, Row]) -> str:
    """Who needs the least; "even" where the quartiles of the ratio to the best peer lie on both sides of 1."""
    best = best_peer(case)
    if best is None:
        return "-"
    if best.ratio_q25 <= 1 <= best.ratio_q75:
        return "even"
    return FASTRNN.name if best.ratio > 1 else best.provider


def format_time(us: float) -> str:
    """Three significant digits: 1.23 us, 45.6 us, 7.89 ms, 1.23 s."""
    value, unit = next(((us / size, unit) for size, unit in ((1e6, "s"), (1e3, "ms")) if us >= size), (us, "us"))
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def format_value(row: Row) -> str:
    return format_time(row.p50) if row.unit == "us" else f"{row.p50:.1f} {row.unit}"


def format_share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def print_tables(console: Console, rows: list[Row]) -> None:
    """Prints every case of a run with its figures, ratios and share of the limit, one table per type and mode."""
    for dtype, mode in dict.fromkeys((row.dtype, row.mode) for row in rows):
        _print_table(console, [row for row in rows if (row.dtype, row.mode) == (dtype, mode)])
    if any(row.p50 is not None for row in rows):
        console.print("Ratio: the other's time or memory over fastrnn's; above 1 fastrnn is better.")


def _print_table(console: Console, rows: list[Row]) -> None:
    first, peers = rows[0], measured_peers(rows)
    table = Table(title=f"{first.mode}, {first.machine}, {first.dtype}, torch {first.torch_version}")
    for column in ("cell", "T,B,I,H"):
        table.add_column(column, no_wrap=True)
    ratios = [column for peer in peers for column in (peer, "ratio (quartiles)")]
    for name in (FASTRNN.name, *(["a step"] if first.is_on_gpu else []), *ratios):
        table.add_column(name, justify="right")
    table.add_column("best", no_wrap=True)
    table.add_column("of the limit", justify="right", no_wrap=True)
    for case in group_by_case(rows):
        if case[FASTRNN.name].p50 is not None:
            table.add_row(*_table_row(case, peers))
    if table.row_count:
        console.print(table)


def _table_row(case: dict[str, Row], peers: list[str]) -> list[str]:
    ours = case[FASTRNN.name]
    fields = [ours.cell, str(ours.shape), format_value(ours)]
    if ours.is_on_gpu:
        fields.append(f"{ours.p50 / ours.T:.2f} us")
    for name in peers:
        peer = case.get(name)
        if peer is None or peer.p50 is None:
            fields += ["-", "-"]
        else:
            fields += [format_value(peer), f"{peer.ratio:.2f} ({peer.ratio_q25:.2f}-{peer.ratio_q75:.2f})"]
    winner = fastest(case)
    colour = {FASTRNN.name: "green", "even": "default", "-": "default"}.get(winner, "red")
    share = "-" if ours.limit_share is None else f"{format_share(ours.limit_share)} {ours.limit_kind}"
    return [*fields, f"[{colour}]{winner}[/]", share]


def control_sentences(rows: Iterable[Row]) -> list[str]:
    """For each controlled contender, how far from 1 the ratio to itself was."""
    ratios = defaultdict(list)
    for row in rows:
        if row.is_control:
            ratios[row.baseline].append(row.ratio)
    return [
        f"{name} against itself: {np.median(values):.2f}, from {min(values):.2f} to {max(values):.2f} "
        f"over {len(values)} case{'s' if len(values) > 1 else ''}."
        for name, values in ratios.items()
    ]


def is_unsettled(row: Row) -> bool:
    """Whether a figure cannot be right: a contender that differs from itself, or is faster than the limit."""
    if row.is_control and abs(math.log(row.ratio)) > UNSETTLED:
        return True
    return row.limit_share is not None and row.limit_share > 1


def print_notes(console: Console, rows: list[Row]) -> None:
    """Prints the controls, a warning where figures cannot be right, and who was left out of what and why."""
    for sentence in control_sentences(rows):
        console.print(f"Control, {sentence}", highlight=False)
    if any(is_unsettled(row) for row in rows):
        console.print("[yellow]The machine was not settled: run this again with nothing else running.[/]")
    reasons = defaultdict(list)
    several = len({row.dtype for row in rows}) > 1
    for row in rows:
        if row.note:
            dtype = f" {row.dtype}" if several else ""
            reasons[row.provider, row.note].append(f"{row.cell} {row.mode} {row.shape}{dtype}")
    for (name, note), cases in reasons.items():
        shown = "; ".join(cases[:3]) + ("; ..." if len(cases) > 3 else "")
        label = "[red]Failed[/]" if name == FASTRNN.name else f"Without {name}"
        console.print(f"{label}: {note} ({len(cases)} cases: {shown})", highlight=False)


def print_summary(console: Console, rows: list[Row], limits: Limits) -> None:
    """Prints a run of several types in short: one number per case, the time of the fastest peer over fastrnn's."""
    console.print(f"Limits of {rows[0].machine}: {limits}", highlight=False)
    dtypes, cells = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("dtype", "cell"))
    lines = defaultdict(dict)
    for case in group_by_case(rows):
        ours = next(iter(case.values()))
        lines[ours.mode, str(ours.shape)][ours.dtype, ours.cell] = _ratio_to_best(case)
    table = Table(title=SUMMARY, box=box.SIMPLE, padding=(0, 0, 0, 1))
    for column in ("mode", "T,B,I,H"):
        table.add_column(column, no_wrap=True)
    for dtype in dtypes:
        for place, cell in enumerate(cells):
            table.add_column(f"{'' if place else dtype}\n{cell}", justify="right", no_wrap=True)
    for place, line in lines.items():
        table.add_row(*place, *(line.get((dtype, cell), "") for dtype in dtypes for cell in cells))
    console.print(table)


def _ratio_to_best(case: dict[str, Row]) -> str:
    if case[FASTRNN.name].p50 is None:
        return "failed"
    best = best_peer(case)
    return "-" if best is None else f"{best.ratio:.2f}"
