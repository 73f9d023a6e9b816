"""The benchmark runner: that what it writes can be read back, and what is made of it."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from benchmark_rows import RUN, SHAPE, result_of, sample_rows
from rich.console import Console

from benchmarks import report
from benchmarks.cases import Case, Shape
from benchmarks.measure import Result
from benchmarks.records import Row, append_csv, read_csv, rows_of
from benchmarks.table import fastest, format_time, group_by_case, is_unsettled, print_notes, print_tables


def test_rows_survive_the_csv(tmp_path):
    rows = sample_rows()
    append_csv(tmp_path / "new" / "results.csv", rows[:4])
    append_csv(tmp_path / "new" / "results.csv", rows[4:])
    assert read_csv(tmp_path / "new" / "results.csv") == rows


def test_a_row_holds_the_figures_of_its_contender():
    ours, peer, control, left_out = rows_of(result_of(Case("lstm", "inference", SHAPE), 1e-4, 3e-4, 0.2), RUN)
    assert (ours.p50, ours.ratio, ours.limit_share) == (100, 1, 0.25)
    assert (peer.p50, peer.baseline, peer.ratio, peer.ratio_q25, peer.ratio_q75) == (300, "fastrnn", 3, 2.7, 3.3)
    assert control.is_control
    assert (control.provider, control.baseline, control.ratio) == ("torch.nn again", "torch.nn", 1)
    assert (left_out.provider, left_out.p50, left_out.note) == ("onnxruntime", None, "inference, only")


def test_only_the_last_run_of_a_case_counts(tmp_path):
    first, second = Case("lstm", "inference", SHAPE), Case("gru", "inference", SHAPE)
    later = replace(RUN, timestamp="2026-02-02T00:00:00+00:00")
    for case, run, ours in ((first, RUN, 1e-4), (second, RUN, 2e-4), (first, later, 5e-4)):
        append_csv(tmp_path / "results.csv", rows_of(result_of(case, ours, 1e-3), run))
    times = {row.cell: row.p50 for row in read_csv(tmp_path / "results.csv") if row.provider == "fastrnn"}
    assert times == {"lstm": 500, "gru": 200}


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        read_csv(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("peer", "spread", "winner"), [(3e-4, 0.01, "fastrnn"), (5e-5, 0.01, "torch.nn"), (1.01e-4, 0.1, "even")]
)
def test_who_is_fastest(peer, spread, winner):
    (case,) = group_by_case(rows_of(result_of(Case("lstm", "inference", SHAPE), 1e-4, peer, spread), RUN))
    assert fastest(case) == winner


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.5, "0.50 us"), (1.234, "1.23 us"), (45.67, "45.7 us"), (789.1, "789 us"), (7890, "7.89 ms"), (2e6, "2.00 s")],
)
def test_times_have_three_digits(us, text):
    assert format_time(us) == text


def test_the_readme_table_comes_from_the_csv(tmp_path):
    append_csv(tmp_path / "results.csv", sample_rows())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # the second time finds the first one's table
        assert report.main([str(tmp_path / "results.csv"), "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert lines.count("| inference | 100,1,64,64 | 100 us (25%), 3.00x | 100 us (25%), 3.00x |") == 1
    assert any("abc123-dirty" in line and "A CPU, with a comma, 1 thread" in line for line in lines)


@pytest.mark.parametrize(("control", "warns"), [(1.05, False), (0.95, False), (1.3, True), (0.7, True)])
def test_an_unsettled_machine_is_pointed_out(control, warns):
    rows = sample_rows()
    off = next(index for index, row in enumerate(rows) if row.is_control)
    rows[off] = replace(rows[off], ratio=control)
    console = Console(record=True, width=160, file=io.StringIO())
    print_notes(console, rows)
    printed = console.export_text()
    low, high = min(control, 1), max(control, 1)
    assert f"torch.nn against itself: 1.00, from {low:.2f} to {high:.2f} over 6 cases." in printed
    assert ("not settled" in printed) == warns
    assert "Without onnxruntime: inference, only (6 cases: lstm inference 100,1,64,64; " in printed


def test_a_time_below_the_limit_is_not_believed():
    row = sample_rows()[0]
    assert is_unsettled(replace(row, limit_share=1.2))
    assert not is_unsettled(replace(row, limit_share=0.9))


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", 2 * (report.BEGIN + report.END)])
def test_a_readme_without_proper_markers_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="must contain"):
        report.update_readme(readme, "table")
    assert readme.read_text() == text


def test_a_failed_case_is_shown_as_failed():
    failed = rows_of(Result(Case("rnn", "inference", SHAPE), failure="do not agree"), RUN)
    assert failed[0].note == "do not agree"
    assert "| inference | 4,3,5,6 | failed |" in report.readme_table(failed)


def memory_rows() -> list[Row]:
    samples = {"fastrnn": np.array([2e6]), "torch.nn": np.array([3e6]), "torch.nn again": np.array([3e6])}
    result = Result(Case("lstm", "training-memory", SHAPE), samples, controlled="torch.nn")
    return rows_of(result, RUN)


def test_memory_is_counted_in_megabytes_and_has_no_limit(tmp_path):
    rows = memory_rows()
    append_csv(tmp_path / "results.csv", rows)
    assert read_csv(tmp_path / "results.csv") == rows
    assert (rows[0].metric, rows[0].unit, rows[0].p50, rows[0].limit, rows[0].limit_share) == (
        "peak memory",
        "MB",
        2.0,
        None,
        None,
    )
    assert "| training-memory | 4,3,5,6 | 2.0 MB, 1.50x |" in report.readme_table(rows)
    assert not report.draw_plots(rows, tmp_path)


def variant_rows() -> list[Row]:
    case = Case("lstm", "inference", SHAPE)
    return rows_of(result_of(case, 1e-4, 3e-4, fastrnn_bf16=5e-5, fastrnn_16t=2e-4), RUN)


def test_a_variant_has_a_line_of_its_own_and_never_beats_fastrnn():
    rows = variant_rows()
    (case,) = group_by_case(rows)
    assert fastest(case) == "fastrnn"
    table = report.readme_table(rows)
    assert "| inference | 4,3,5,6 | 100 us (25%), 3.00x |" in table
    assert "| inference, fastrnn-bf16 | 4,3,5,6 | 50.0 us, 6.00x |" in table
    assert "16t" not in table


def test_each_mode_has_a_table_of_its_own():
    console = Console(record=True, width=160, file=io.StringIO())
    print_tables(console, [*variant_rows(), *memory_rows()])
    times, memory = console.export_text().split("training-memory, ")
    assert "fastrnn-bf16" in times
    assert "fastrnn-bf16" not in memory
    assert "2.0 MB" in memory


def test_plots_are_drawn_from_the_rows(tmp_path):
    paths = report.draw_plots(sample_rows(), tmp_path)
    assert [path.name.split("-")[0] for path in paths] == ["time", "ratio"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_layer_at_several_batch_sizes_is_drawn_against_them(tmp_path):
    cases = [Case("gru", "training", Shape(10, B, 8, 8)) for B in (1, 4, 16)]
    rows = [row for case in cases for row in rows_of(result_of(case, 1e-4, 3e-4, fastrnn_16t=1e-4), RUN)]
    paths = report.draw_plots(rows, tmp_path)
    assert [path.name.split("-")[:4] for path in paths] == [["batch", "10", "8", "training"]]
