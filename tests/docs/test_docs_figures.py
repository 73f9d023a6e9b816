"""Figures on the pages are those of benchmarks/results."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows(name: str) -> list[dict]:
    with (ROOT / "benchmarks" / "results" / name).open() as file:
        return list(csv.DictReader(file))


def table(page: str, head: str) -> list[list[str]]:
    """The fields below a line of a table."""
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines]


def test_steps_of_a_stream():
    measured = {
        (row["H"], row["provider"]): f"{float(row['p50']):.1f} us"
        for row in rows("cpu-intel-emerald-rapids-options.csv")
        if row["mode"] == "stream" and row["cell"] == "gru" and row["I"] == row["H"] and row["B"] == "1"
    }
    found = table("with/vad.md", "| inputs and units |")
    assert len(found) == 3
    for units, stream, cell in found:
        assert (stream, cell) == (measured[units, "fastrnn-stream"], measured[units, "torch.nn"])


def test_steps_of_streams_of_all_cells():
    """The ranges in docs/for/audio.md."""
    ratios = {"lstm": [], "gru": [], "rnn": []}
    to_ours = {}
    for row in rows("cpu-intel-emerald-rapids-options.csv"):
        if row["mode"] == "stream":
            to_ours[row["cell"], row["T"], row["B"], row["I"], row["H"], row["provider"]] = float(row["ratio"])
    for (*case, provider), ratio in to_ours.items():
        if provider == "torch.nn":
            ratios[case[0].split("_")[0]].append(ratio / to_ours[(*case, "fastrnn-stream")])
    gated = ratios["lstm"] + ratios["gru"]
    text = " ".join((ROOT / "docs" / "for" / "audio.md").read_text().split())
    low, high, low_rnn, high_rnn = map(
        float,
        re.search(
            r"takes ([\d.]+) to ([\d.]+) times as long as a stream's .*? ([\d.]+) to ([\d.]+) times", text
        ).groups(),
    )
    found = (min(gated), max(gated), min(ratios["rnn"]), max(ratios["rnn"]))
    assert all(abs(a - b) < 0.1 for a, b in zip(found, (low, high, low_rnn, high_rnn), strict=True)), found


def test_no_figure_is_left_out():
    for page in (ROOT / "docs").rglob("*.md"):
        assert "@FIGURES@" not in page.read_text()
