"""The benchmark runner: its command line."""

from __future__ import annotations

import pytest
from benchmark_rows import SHAPE

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cases import Shape
from benchmarks.records import read_csv
from benchmarks.suites import LATENCY, SUITES, Group, Suite
from benchmarks.variants import RoundedWeights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "shape '1,2,3' is not four positive integers T,B,I,H"),
        (["--cell", "lstm,tree"], "unknown name 'tree'; known: lstm, gru, rnn"),
        (["--peers", "torch"], "unknown name 'torch'; known: torch.nn, onnxruntime"),
        (["--mode", "train"], "unknown name 'train'; known: inference"),
        (["--threads", "0"], "'0' is not a positive number of threads"),
        (["--device", "toaster"], "'toaster' is not a device"),
        (["--suite", "quick", "--shape", "1,2,3,4"], "not allowed with argument --suite"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def run_brief(monkeypatch, suite: Suite, *arguments: str) -> int:
    """Runs a suite with one thread as the quick one."""
    monkeypatch.setitem(SUITES, "quick", suite)
    return main(["--threads", "1", *arguments])


def test_a_run_measures_and_writes_what_was_asked_for(tmp_path, capsys, monkeypatch, threads):
    brief = Suite((Group((Shape(2, 1, 3, 4),), ("step", "training")),), rounds=2, block=1e-3)
    path = tmp_path / "results.csv"
    assert run_brief(monkeypatch, brief, "--cell", "gru,gru_reset_before", "--csv", str(path)) == 0
    rows = read_csv(path)
    expected = {(cell, mode) for cell in ("gru", "gru_reset_before") for mode in ("step", "training")}
    assert {(row.cell, row.mode) for row in rows if row.provider == "fastrnn" and row.p50 > 0} == expected
    assert {row.cell for row in rows if row.note == "torch.nn has no such cell"} == {"gru_reset_before"}
    assert "Control, torch.nn against itself" in capsys.readouterr().out


def test_every_way_of_use_runs(tmp_path, capsys, monkeypatch, threads):
    groups = (
        Group((Shape(3, 2, 3, 4),), ("inference", "training", "lengths", "ragged"), ("torch.nn", "fastrnn-2t")),
        Group((Shape(1, 1, 3, 4),), ("step", "stream"), ("torch.nn", "fastrnn-module")),
    )
    path = tmp_path / "results.csv"
    brief = Suite(groups, rounds=2, block=1e-3)
    assert run_brief(monkeypatch, brief, "--cell", "lstm,rnn", "--csv", str(path)) == 0
    measured = {(row.mode, row.provider) for row in read_csv(path) if row.p50 is not None and not row.is_control}
    modes = [mode for group in groups for mode in group.modes]
    variants = {(mode, "fastrnn-2t") for mode in groups[0].modes} | {("step", "fastrnn-module")}
    assert measured == {(mode, name) for mode in modes for name in ("fastrnn", "torch.nn")} | variants
    assert "Without fastrnn-module: single steps only" in capsys.readouterr().out


def test_what_this_fastrnn_lacks_is_left_out(tmp_path, monkeypatch, threads):
    def refuse(self, problem):
        raise TypeError("unexpected keyword\nand more")

    monkeypatch.setattr(RoundedWeights, "prepare", refuse)
    brief = Suite((Group((SHAPE,), ("inference",), ("torch.nn", "fastrnn-bf16")),), rounds=2, block=1e-3)
    path = tmp_path / "results.csv"
    assert run_brief(monkeypatch, brief, "--cell", "gru", "--csv", str(path)) == 0
    assert {row.provider: row.note for row in read_csv(path)}["fastrnn-bf16"] == "TypeError: unexpected keyword"


def test_the_targets_that_a_run_has_figures_for_are_printed(capsys, monkeypatch, tmp_path, threads):
    brief = Suite((Group((LATENCY[0],), ("step",)),), rounds=2, block=1e-3)
    path = tmp_path / "results.csv"
    run_brief(monkeypatch, brief, "--cell", "gru", "--csv", str(path))
    printed = capsys.readouterr().out
    assert "1 of 5 cases measured" in printed
    assert "streaming" not in printed
    assert report.main([str(path), "--targets"]) == 0
    assert "1 of 5 cases measured" in capsys.readouterr().out
