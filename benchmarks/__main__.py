"""The command line: ``python -m benchmarks --suite quick``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import beyond
from benchmarks.cases import CELLS, DTYPES, MODES, Case, Shape
from benchmarks.limits import Limits
from benchmarks.measure import Result, run_case
from benchmarks.peers import PEERS
from benchmarks.records import Row, Run, append_csv, check_csv, rows_of
from benchmarks.suites import SUITES, custom_suite, plan
from benchmarks.table import print_notes, print_summary, print_tables
from benchmarks.targets import print_verdicts
from benchmarks.timing import Protocol


def names_from(choices) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of names that must be among `choices`."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}; known: {', '.join(choices)}")
        return names

    return parse


def shape(text: str) -> Shape:
    """An argparse type that keeps the message of `Shape.parse`."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def thread_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of threads")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def device(text: str) -> str:
    try:
        wanted = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device such as cpu or cuda:0") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        seen = f"torch sees {count}" if torch.version.cuda else f"torch {torch.__version__} was built without CUDA"
        raise argparse.ArgumentTypeError(f"no CUDA device {text!r} is available: {seen}")
    return text


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times fastrnn against its peers: same weights, same inputs, results compared before timing.",
        epilog="modes: " + "; ".join(f"{name}: {mode.text}" for name, mode in MODES.items()),
    )
    what = result.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=SUITES, help="set of shapes and modes (default: quick), or beyond")
    what.add_argument("--shape", action="append", type=shape, metavar="T,B,I,H", help="instead of a suite; repeatable")
    result.add_argument("--cell", type=names_from(CELLS), default=["lstm", "gru", "rnn"], help=f"of {', '.join(CELLS)}")
    result.add_argument("--mode", type=names_from(MODES), help=f"of {', '.join(MODES)} (default: the suite's own)")
    result.add_argument("--peers", type=names_from(PEERS), help=f"of {', '.join(PEERS)} (default: the suite's own)")
    result.add_argument("--device", type=device, help="(default: the suite's own, mostly cpu)")
    result.add_argument("--dtype", type=names_from(DTYPES), help=f"of {', '.join(DTYPES)} (default: the suite's own)")
    result.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), help="default: %(default)s")
    result.add_argument("--budget", type=seconds, help="seconds; cases that do not fit are named as failed")
    result.add_argument("--csv", type=Path, metavar="FILE", help="append one row per contender and case")
    result.add_argument("--plot", type=Path, metavar="DIR", help="draw this run's PNG plots")
    return result


def measure_all(
    cases: dict[Case, Sequence[str]],
    limits: Limits,
    protocol: Protocol,
    total: float,
    csv: Path | None,
    bar: Progress,
) -> list[Row]:
    """Measures each case with the peers named; its rows are in the CSV file before the next begins.

    The run is to take `total` seconds: each case gets an equal share of what is left of them.
    """
    run = Run.now(next(iter(cases)).device)
    rows = []
    task = bar.add_task("", total=len(cases))
    end = time.monotonic() + total
    for index, (case, names) in enumerate(cases.items()):
        bar.update(task, description=str(case), refresh=True)
        left = end - time.monotonic()
        if left > 0:
            share = min(protocol.budget, left / (len(cases) - index))
            result = run_case(case, [PEERS[name] for name in names], limits, replace(protocol, budget=share))
        else:
            result = Result(case, failure=f"not measured: the run's {total:g} s are over")
        case_rows = rows_of(result, run)
        if csv is not None:
            append_csv(csv, case_rows)
        rows += case_rows
        bar.advance(task)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. 0 if every case could be measured, else 1."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:2] == ["--suite", "beyond"]:  # other contenders and another table
        return beyond.main(given[2:])
    command = parser()
    options = command.parse_args(given)
    try:
        if options.csv:
            check_csv(options.csv)
    except ValueError as error:
        command.error(str(error))
    torch.set_num_threads(options.threads)
    suite = custom_suite(options.shape) if options.shape else SUITES[options.suite or "quick"]
    try:
        where = options.device or device(suite.device)
    except argparse.ArgumentTypeError as error:
        command.error(f"--suite {options.suite}: {error}")
    dtypes = options.dtype or suite.dtypes
    if "tf32" in dtypes and torch.device(where).type != "cuda":
        command.error("tf32: expected a CUDA device, the only kind that has it")
    cases = plan(suite, options.cell, options.mode, dtypes, where, options.threads)
    if options.peers:
        cases = dict.fromkeys(cases, options.peers)
    limits = Limits(where, options.threads)
    protocol = Protocol.on(where, rounds=suite.rounds, block=suite.block, budget=suite.budget)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawn between cases only: a thread that draws while a case runs would be measured with it.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        rows = measure_all(cases, limits, protocol, options.budget or suite.total, options.csv, bar)
    print_tables(console, rows)
    print_notes(console, rows)
    print_verdicts(console, rows)
    if options.plot:
        from benchmarks.report import draw_plots  # here, as new processes that measure memory import this file as well

        for path in draw_plots(rows, options.plot):
            console.print(f"Plot: {path}", highlight=False)
    if rows[0].is_on_gpu:
        print_summary(console, rows, limits)
    return 1 if any(row.provider == "fastrnn" and row.note for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
