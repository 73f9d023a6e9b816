"""The benchmark runner: whether made-up rows reach the targets."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from benchmark_rows import RUN, result_of
from rich.console import Console

from benchmarks.cases import MODES, Case, Shape
from benchmarks.records import Row, rows_of
from benchmarks.suites import LATENCY, MEMORY, SUITES, TRAINING, plan
from benchmarks.targets import TARGETS, Bound, Verdict, print_verdicts, verdicts

INFERENCE = "inference vs best peer"
ROUNDED = "inference, batch 1, bf16 weights, vs best peer"


def timed(mode: str, shape: Shape, peer: float, cell: str = "lstm", **others: float) -> list[Row]:
    """Rows of a case in which fastrnn takes 1 ms; `peer` is torch.nn's time as a multiple, `others` likewise."""
    result = result_of(
        Case(cell, mode, shape, threads=2), 1e-3, peer * 1e-3, **{k: v * 1e-3 for k, v in others.items()}
    )
    return rows_of(result, RUN)


def verdict(rows: list[Row], title: str) -> Verdict:
    (found,) = [verdict for verdict in verdicts(rows) if verdict.target.title == title]
    return found


def test_a_speed_is_that_against_the_faster_peer():
    rows = timed("inference", LATENCY[0], 3.0, onnxruntime=2.0, openvino=4.0, fastrnn_bf16=0.5)
    assert list(verdict(rows, INFERENCE).values.values()) == [2.0]
    assert list(verdict(rows, ROUNDED).values.values()) == [4.0]


def test_without_one_of_the_peers_there_is_no_best_one():
    assert not verdicts(timed("inference", LATENCY[0], 3.0, openvino=2.0))


@pytest.mark.parametrize(
    ("ratios", "is_short"),
    [([1.5, 2, 3, 3.5, 4], False), ([1.49, 9, 9, 9, 9], True), ([1.5, 1.5, 1.5, 1.5, 2], True)],
)
def test_each_value_and_the_mean_must_reach_their_bounds(ratios, is_short):
    rows = [
        row
        for shape, ratio in zip(LATENCY, ratios, strict=True)
        for row in timed("inference", shape, ratio, onnxruntime=ratio + 1, openvino=ratio + 1, fastrnn_bf16=1.0)
    ]
    found = verdict(rows, ROUNDED)
    assert found.is_complete
    assert found.is_short == is_short


def test_of_a_part_of_the_cases_the_mean_does_not_count():
    found = verdict(timed("inference", LATENCY[0], 1.01, onnxruntime=1.1, openvino=1.1), INFERENCE)
    assert not found.is_complete
    assert not found.is_short
    assert not found.is_reached


def test_the_worst_of_what_may_not_pass_is_the_largest():
    rows = timed("training", LATENCY[0], 9.0, fastrnn_16t=1.4) + timed("inference", LATENCY[1], 9.0, fastrnn_16t=1.6)
    found = verdict(rows, "time with 16 threads over time with 2")
    assert found.worst == ("inference", LATENCY[1])
    assert found.is_short


def test_the_time_with_two_threads_may_be_a_variants():
    rows = timed("training", LATENCY[0], 9.0, fastrnn_2t=2.0, fastrnn_16t=3.0)
    rows = [replace(row, threads=8) for row in rows]
    assert list(verdict(rows, "time with 16 threads over time with 2").values.values()) == [1.5]
    assert not any(
        "16 threads" in found.target.title for found in verdicts(row for row in rows if "2t" not in row.provider)
    )


def test_a_share_counts_only_where_arithmetic_is_the_limit():
    rows = timed("training", Shape(100, 64, 512, 512), 2.0)
    assert list(verdict(rows, "share of the FMA peak, forward + backward").values.values()) == [0.25]
    for doubtful in ({"limit_kind": "memory"}, {"limit_share": 1.1}):
        doubted = [replace(row, **doubtful) for row in rows]
        assert not any("share" in found.target.title for found in verdicts(doubted))


def in_megabytes(mode: str, shape: Shape, ours: float, peer: float, **others: float) -> list[Row]:
    rows = timed(mode, shape, peer / ours, **{name: value / ours for name, value in others.items()})
    return [
        replace(row, unit="MB", p50=row.ratio * ours) for row in rows if row.ratio is not None and not row.is_control
    ]


def test_memory_is_compared_with_the_peers():
    rows = in_megabytes("training-memory", MEMORY[0], 90.0, 100.0, fastrnn_recompute=45.0)
    training = verdict(rows, "peak memory of training over torch.nn's")
    recompute = verdict(rows, "the same with recompute")
    assert (*training.values.values(), training.is_short) == (pytest.approx(0.9, rel=1e-3), False)
    assert (*recompute.values.values(), recompute.is_short) == (pytest.approx(0.45, rel=1e-3), True)


@pytest.mark.parametrize(("outputs", "is_short"), [(1.02, False), (5.0, True)])
def test_growth_is_what_twice_the_steps_need_more(outputs, is_short):
    shape = MEMORY[0]
    output = 4e-6 * shape.T * shape.B * shape.H
    rows = in_megabytes("inference-memory", shape, 3 + output * outputs, 1.0)
    assert not verdicts(rows)
    rows += in_megabytes("inference-memory", shape._replace(T=2 * shape.T), 3 + 2 * output * outputs, 1.0)
    found = verdict(rows, "memory of inference that grows with T, over its output")
    assert list(found.values.values()) == [pytest.approx(outputs)]
    assert found.is_short == is_short


def test_the_full_suite_measures_every_target():
    rows = []
    for case, peers in plan(SUITES["full"], ["lstm", "gru", "rnn"], None, "float32", "cpu", 2).items():
        others = {name.replace("-", "_"): 1.0 for name in peers if name != "torch.nn"}
        rows += timed(case.mode, case.shape, 1.0, case.cell, **others)
    found = verdicts(rows)
    assert all(verdict.is_complete for verdict in found)
    assert {(v.target.title, v.cell) for v in found} == {(t.title, cell) for t in TARGETS for cell in t.bounds}


def test_targets_are_stated_once_and_for_known_modes():
    assert len({target.title for target in TARGETS}) == len(TARGETS)
    assert {mode for target in TARGETS for mode in target.modes} <= MODES.keys()


def test_bounds_are_readable():
    assert [str(bound) for bound in (Bound(1.0, 1.3), Bound(4), Bound(1.5, at_most=True))] == [
        ">= 1 each, 1.3 mean",
        ">= 4",
        "<= 1.5",
    ]


def test_the_table_shows_values_bounds_and_what_is_short():
    rows = [r for s in TRAINING for r in timed("lengths", s, 5.0)] + timed("lengths", TRAINING[0], 3.5, cell="gru")
    console = Console(record=True, width=160, file=io.StringIO())
    print_verdicts(console, rows)
    printed = console.export_text()
    assert "5.00 5.00 5.00 5.00 5.00" in printed
    assert "min 5.00, mean 5.00" in printed
    assert "1 of 5 cases measured" in printed
    assert printed.count("SHORT") == 1
    assert printed.count("reached") == 1
    assert "1 of 2 cells are measured in full and reach their targets" in printed
    assert "not settled" not in printed


def test_verdicts_of_an_unsettled_machine_do_not_count():
    rows = [replace(row, ratio=1.5) if row.is_control else row for row in timed("lengths", TRAINING[0], 5.0)]
    console = Console(record=True, width=160, file=io.StringIO())
    print_verdicts(console, rows)
    printed = console.export_text()
    assert "The machine was not settled: none of this counts." in printed
    assert "reached" not in printed  # one case of five


def test_other_types_have_no_targets():
    console = Console(record=True, file=io.StringIO())
    print_verdicts(console, [replace(row, dtype="float64") for row in timed("lengths", TRAINING[0], 5.0)])
    assert console.export_text() == ""
