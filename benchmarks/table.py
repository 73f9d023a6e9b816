"""The table that a run prints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.peers import FASTRNN
from benchmarks.records import Row

UNSETTLED = 0.1  # a contender against itself should be within 10 % of 1


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


def fastest(case: dict[str, Row]) -> str:
    """Who needs the least; "even" where the quartiles of the ratio to the best peer lie on both sides of 1.

    Variants of fastrnn do not take part.
    """
    peers = [row for name, row in case.items() if name != FASTRNN.name and row.p50 is not None and not row.is_variant]
    if not peers:
        return "-"
    best = min(peers, key=lambda row: row.p50)
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
    """Prints every case of a run with its figures, ratios and share of the limit, one table per mode."""
    for mode in dict.fromkeys(row.mode for row in rows):
        _print_table(console, [row for row in rows if row.mode == mode])
    if any(row.p50 is not None for row in rows):
        console.print("Ratio: the other's time or memory over fastrnn's; above 1 fastrnn is better.")


def _print_table(console: Console, rows: list[Row]) -> None:
    first, peers = rows[0], measured_peers(rows)
    table = Table(title=f"{first.mode}, {first.machine}, {first.dtype}, torch {first.torch_version}")
    for column in ("cell", "T,B,I,H"):
        table.add_column(column, no_wrap=True)
    for name in (FASTRNN.name, *(column for peer in peers for column in (peer, "ratio (quartiles)"))):
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
    for row in rows:
        if row.note:
            reasons[row.provider, row.note].append(f"{row.cell} {row.mode} {row.shape}")
    for (name, note), cases in reasons.items():
        shown = "; ".join(cases[:3]) + ("; ..." if len(cases) > 3 else "")
        label = "[red]Failed[/]" if name == FASTRNN.name else f"Without {name}"
        console.print(f"{label}: {note} ({len(cases)} cases: {shown})", highlight=False)
