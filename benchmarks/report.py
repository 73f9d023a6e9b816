"""The README's speed table and the plots: ``python -m benchmarks.report FILE.csv --readme README.md``."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.peers import FASTRNN
from benchmarks.records import Row, read_csv
from benchmarks.table import control_sentences, format_share, format_value, group_by_case, measured_peers
from benchmarks.targets import print_verdicts

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows split by machine, device, threads and type."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.setting].append(row)
    return list(groups.values())


def readme_table(rows: list[Row]) -> str:
    """Markdown: for each setting one table, a line per mode and shape and a column per cell.

    Variants of fastrnn have lines of their own; other numbers of threads are left out.
    """
    return "\n\n".join(_setting_table([row for row in group if not row.is_of_threads]) for group in by_setting(rows))


def _setting_table(rows: list[Row]) -> str:
    first = rows[0]
    peers = [name for name in measured_peers(rows) if not name.startswith(f"{FASTRNN.name}-")]
    cells = list(dict.fromkeys(row.cell for row in rows))
    lines = defaultdict(dict)
    for case in group_by_case(rows):
        for row in case.values():
            if row.provider == FASTRNN.name:
                lines[row.mode, row.shape][row.cell] = _field(row, case, peers)
            elif row.is_variant and row.p50 is not None:
                lines[f"{row.mode}, {row.provider}", row.shape][row.cell] = _field(row, case, peers)
    commits = ", ".join(dict.fromkeys(row.git_sha for row in rows))
    dates = ", ".join(dict.fromkeys(row.timestamp[:10] for row in rows))
    table = [["mode", "T,B,I,H", *cells], ["---"] * (2 + len(cells))]
    modes = list(dict.fromkeys(mode for mode, _ in lines))
    table += [
        [mode, str(shape), *(line.get(cell, "") for cell in cells)]
        for (mode, shape), line in sorted(lines.items(), key=lambda line: modes.index(line[0][0]))
    ]
    return "\n".join(
        [
            f"**{first.machine}, {first.dtype}** (torch {first.torch_version}, commit {commits}, {dates})",
            "",
            f"Each field: fastrnn's time, its share of the machine's limit, and the time of "
            f"{' / '.join(peers) or 'no peer'} as a multiple of fastrnn's (below 1 the peer is faster).",
            "A mode with another name after it is fastrnn used that way; memory is read like time.",
            *(f"Control, {sentence}" for sentence in control_sentences(rows)),
            "",
            *("| " + " | ".join(line) + " |" for line in table),
        ]
    )


def _field(ours: Row, case: dict[str, Row], peers: list[str]) -> str:
    """The figures of fastrnn or a variant of it, and the ratios of the peers to them; "-" where one has none."""
    if ours.p50 is None:
        return "failed"
    others = [case[name].ratio if name in case else None for name in peers]
    ratios = ["-" if ratio is None else f"{ratio / ours.ratio:.2f}x" for ratio in others]
    share = "" if ours.limit_share is None else f" ({format_share(ours.limit_share)})"
    return f"{format_value(ours)}{share}, {' / '.join(ratios)}"


def update_readme(path: Path, table: str) -> None:
    """Puts the table between the markers. Raises ValueError unless the file has each marker once, in order."""
    text = path.read_text()
    parts = re.split(f"{BEGIN}|{END}", text)
    if re.findall(f"{BEGIN}|{END}", text) != [BEGIN, END]:
        raise ValueError(f"{path} must contain {BEGIN} and {END}, each once and in this order")
    path.write_text(f"{parts[0]}{BEGIN}\n{table}\n{END}{parts[2]}")


def draw_plots(rows: list[Row], folder: Path) -> list[Path]:
    """Draws, for each setting and mode, time against H at batch size 1, time against B where a layer was measured at
    several, and ratios at the other shapes; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [row for row in rows if row.p50 is not None and row.unit == "us" and not row.is_control]
    paths = []
    for group in by_setting(row for row in drawn if not row.is_of_threads):
        for mode in dict.fromkeys(row.mode for row in group):
            of_mode = [row for row in group if row.mode == mode]
            sweeps = batch_sweeps(of_mode)
            in_sweep = {row.shape for sweep in sweeps for row in sweep}
            small = [row for row in of_mode if row.B == 1]
            large = [row for row in of_mode if row.B > 1 and row.shape not in in_sweep]
            if len({row.H for row in small}) > 1:
                paths.append(_save(_time_plot(small, "H", "H (= I), batch size 1"), folder, "time", small[0]))
            for sweep in sweeps:
                T, _, _, H = sweep[0].shape
                figure = _time_plot(sweep, "B", f"batch size, T = {T}, H = I = {H}")
                paths.append(_save(figure, folder, f"batch-{T}-{H}", sweep[0]))
            if any(row.provider != FASTRNN.name for row in large):
                paths.append(_save(_ratio_plot(large), folder, "ratio", large[0]))
    return paths


def batch_sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each layer and number of steps that was measured at three or more batch sizes."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.T, row.I, row.H].append(row)
    return [group for group in groups.values() if len({row.B for row in group}) > 2]


def _save(figure: Figure, folder: Path, kind: str, row: Row) -> Path:
    machine = re.sub(r"\W+", "-", row.gpu or row.cpu).strip("-").lower()
    path = folder / f"{kind}-{row.mode}-{row.dtype}-{machine}-{row.threads}t.png"
    figure.suptitle(f"{row.mode}, {row.dtype}, {row.machine}")
    figure.savefig(path, dpi=150)
    return path


def _axes_per_cell(rows: list[Row], height: float) -> tuple[Figure, dict[str, Axes]]:
    cells = list(dict.fromkeys(row.cell for row in rows))
    figure = Figure(figsize=(1 + 4 * len(cells), height), layout="constrained")
    axes = figure.subplots(1, len(cells), sharey=True, squeeze=False)
    for cell, ax in zip(cells, axes[0], strict=True):
        ax.set_title(cell)
    return figure, dict(zip(cells, axes[0], strict=True))


def _time_plot(rows: list[Row], size: str, label: str) -> Figure:
    """Time per step against the size named, "H" or "B", both logarithmic; the band holds 60 % of the rounds, the dashed
    line is the limit."""
    figure, axes = _axes_per_cell(rows, height=4)
    for cell, ax in axes.items():
        of_cell = sorted((row for row in rows if row.cell == cell), key=lambda row: getattr(row, size))
        for name in (FASTRNN.name, *measured_peers(rows)):
            line = [row for row in of_cell if row.provider == name]
            sizes = [getattr(row, size) for row in line]
            ax.plot(sizes, [row.p50 / row.T for row in line], marker="o", label=name)
            ax.fill_between(sizes, [row.p20 / row.T for row in line], [row.p80 / row.T for row in line], alpha=0.2)
        ours = [row for row in of_cell if row.provider == FASTRNN.name]
        sizes = [getattr(row, size) for row in ours]
        ax.plot(sizes, [row.limit / row.T for row in ours], "--", color="gray", label="limit")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sizes, map(str, sizes))
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time per step [us]")
    _legend(figure, ax)
    return figure


def _ratio_plot(rows: list[Row]) -> Figure:
    """One bar per shape and peer: the peer's time over fastrnn's, with quartiles; bars start at 1, a tie."""
    shapes, peers = sorted({row.shape for row in rows}), measured_peers(rows)
    figure, axes = _axes_per_cell(rows, height=1.5 + 0.4 * len(shapes) * len(peers))
    width = 0.8 / len(peers)
    ratios = [row for row in rows if row.provider != FASTRNN.name]
    for cell, ax in axes.items():
        for place, name in enumerate(peers):
            bars = [row for row in ratios if row.cell == cell and row.provider == name]
            lengths = [row.ratio - 1 for row in bars]
            spread = [[r.ratio - r.ratio_q25 for r in bars], [r.ratio_q75 - r.ratio for r in bars]]
            where = [shapes.index(row.shape) - 0.4 + width * (place + 0.5) for row in bars]
            drawn = ax.barh(where, lengths, width, left=1, xerr=spread, label=name, capsize=2)
            ax.bar_label(drawn, [f"{row.ratio:.2f}" for row in bars], padding=4)
        ax.axvline(1, color="black", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_yticks(range(len(shapes)), map(str, shapes))
        ax.set_xlabel("peer's time / fastrnn's")
    figure.axes[0].invert_yaxis()
    _ratio_ticks(axes.values(), ratios)
    _legend(figure, ax)
    return figure


def _legend(figure: Figure, ax: Axes) -> None:
    """One legend for all axes, which have the same lines, below them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _ratio_ticks(axes: Iterable[Axes], ratios: list[Row]) -> None:
    """The same powers of two on every axis, around all ratios and 1, with room for the bars' labels."""
    low = math.floor(math.log2(min(1, *(row.ratio_q25 for row in ratios)))) - 1
    high = math.ceil(math.log2(max(1, *(row.ratio_q75 for row in ratios)))) + 1
    ticks = [2.0**power for power in range(low, high + 1)]
    for ax in axes:
        ax.set_xlim(ticks[0], ticks[-1])
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line: reads the files, writes what was asked for, or prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Draws results from CSV files.")
    parser.add_argument("csv", type=Path, nargs="+", metavar="FILE.csv")
    parser.add_argument("--readme", type=Path, metavar="README.md", help=f"replace what is between {BEGIN} and {END}")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG plots")
    parser.add_argument("--targets", action="store_true", help="print which targets the results reach")
    options = parser.parse_args(arguments)
    try:
        rows = [row for path in options.csv for row in read_csv(path)]
        if options.readme:
            update_readme(options.readme, readme_table(rows))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path in draw_plots(rows, options.plot) if options.plot else ():
        print(path)
    if options.targets:
        for group in by_setting(rows):
            print_verdicts(Console(), group)
    if not (options.readme or options.plot or options.targets):
        print(readme_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
