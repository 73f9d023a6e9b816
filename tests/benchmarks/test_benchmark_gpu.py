"""The benchmark runner on GPUs, as far as that can be tested without one: cases, types, budget, tables, messages."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from benchmark_rows import RUN, SHAPE, result_of
from rich.console import Console

from benchmarks.__main__ import device, main
from benchmarks.cases import Case, Shape
from benchmarks.limits import Limits
from benchmarks.measure import Result, difference, products_of
from benchmarks.peers import PEERS
from benchmarks.problem import Problem
from benchmarks.records import read_csv, rows_of
from benchmarks.suites import SUITES, Group, Suite, plan
from benchmarks.table import SUMMARY, print_notes, print_summary, print_tables
from benchmarks.timing import Protocol

CELLS = ["lstm", "gru", "rnn"]
GPU_RUN = replace(RUN, gpu="A GPU")


def suite_cases(name: str) -> dict[Case, list[str]]:
    suite = SUITES[name]
    return plan(suite, CELLS, None, suite.dtypes, suite.device, 1)


def printed(show, *arguments) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    show(console, *arguments)
    return console.export_text()


# What is measured


def test_the_gpu_suite_has_every_shape_in_every_type_and_use():
    cases = suite_cases("gpu")
    plain, option = 14 * 2, 2 * 2  # a stack, and unequal lengths
    assert len(cases) == 4 * 3 * (plain + option)
    assert {case.device for case in cases} == {"cuda:0"}
    for dtype in ("bfloat16", "float16", "float32", "tf32"):
        uses = {(case.mode, case.shape) for case in cases if case.dtype == dtype and case.cell == "gru"}
        assert ("training", Shape(256, 64, 2048, 2048)) in uses
        assert ("stack", Shape(512, 64, 512, 512)) in uses
        assert ("ragged-inference", Shape(512, 64, 512, 512)) in uses


def test_layers_in_bfloat16_are_measured_against_both_16_bit_types():
    for name in ("gpu", "gpu-quick"):
        for case, peers in suite_cases(name).items():
            assert peers[0] == "torch.nn"
            assert ("torch.nn-fp16" in peers) == (case.dtype == "bfloat16")
            assert ("fastrnn-packed" in peers) == case.mode.startswith("ragged")


def test_the_quick_suite_is_part_of_the_full_one():
    quick, full = suite_cases("gpu-quick"), suite_cases("gpu")
    assert quick.keys() < full.keys()
    assert all(peers == full[case] for case, peers in quick.items())
    assert {case.dtype for case in quick} == {"float32", "bfloat16"}


@pytest.mark.parametrize("cell", CELLS)
def test_the_work_of_a_stack_is_that_of_its_weights(cell):
    case = Case(cell, "stack", Shape(4, 3, 5, 6))
    weights = [weight for name, weight in Problem.of(case).weights.items() if name.startswith("weight")]
    assert len(weights) == 2 * 2 * 2
    assert case.weights == sum(weight.numel() for weight in weights)
    assert case.flops == 3 * 2 * 4 * 3 * case.weights
    assert case.compulsory_bytes == 2 * 4 * (4 * 3 * (5 + 12) + case.weights)
    recurrent = [weight for name, weight in Problem.of(case).weights.items() if "weight_hh" in name]
    assert case.recurrent_bytes == sum(weight.nbytes for weight in recurrent)


def test_finished_steps_are_no_work():
    whole, ragged = Case("gru", "inference", Shape(8, 3, 5, 6)), Case("gru", "ragged-inference", Shape(8, 3, 5, 6))
    assert ragged.flops * whole.steps == whole.flops * ragged.steps
    assert ragged.steps < whole.steps


# How it is measured


@pytest.mark.parametrize("mode", ["inference", "training", "stack", "ragged", "ragged-inference"])
def test_torch_in_float16_computes_what_it_does_in_bfloat16(mode):
    problem = Problem.of(Case("lstm", mode, Shape(9, 4, 5, 6), "bfloat16"))
    half, whole = (PEERS[name].prepare(problem) for name in ("torch.nn-fp16", "torch.nn"))
    assert difference(half.outputs(), whole.outputs()) < 5e-2


def test_tf32_is_on_for_both_libraries_in_its_own_cases_alone():
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for dtype in ("tf32", "float32", "bfloat16"):
        with products_of(dtype):
            assert [setting.allow_tf32 for setting in settings] == [dtype == "tf32"] * 2
    assert [setting.allow_tf32 for setting in settings] == before


def test_contenders_on_a_gpu_are_not_paused_between():
    assert Protocol.on("cuda:0", rounds=3).pause == 0
    assert Protocol.on("cpu", rounds=3) == Protocol(rounds=3)


def test_a_spent_budget_ends_the_run_and_names_what_is_missing(tmp_path, monkeypatch, capsys, threads):
    brief = Suite((Group((Shape(2, 1, 3, 4), Shape(3, 1, 3, 4)), ("inference",)),), rounds=2, block=1e-3)
    monkeypatch.setitem(SUITES, "quick", brief)
    path = tmp_path / "results.csv"
    assert main(["--threads", "1", "--cell", "gru", "--budget", "1e-6", "--csv", str(path)]) == 1
    notes = {row.note for row in read_csv(path) if row.provider == "fastrnn"}
    assert "not measured: the run's 1e-06 s are over" in notes
    assert "Failed: not measured" in capsys.readouterr().out


# What is printed


@pytest.mark.parametrize("arguments", [["--suite", "gpu"], ["--suite", "gpu-quick"], ["--device", "cuda"]])
def test_without_a_gpu_the_command_says_so(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "no CUDA device 'cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "tf32"], "tf32: expected a CUDA device"),
        (["--dtype", "float31"], "unknown name 'float31'; known: float32"),
        (["--budget", "0"], "'0' is not a positive number of seconds"),
        (["--budget", "soon"], "'soon' is not a positive number of seconds"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_cpu_is_a_device():
    assert device("cpu") == "cpu"


def gpu_rows() -> list:
    """Of two cells and two types; a case of float32 has failed."""
    cases = [Case(cell, "inference", SHAPE, dtype, "cuda:0") for dtype in ("bfloat16", "float32") for cell in CELLS[:2]]
    results = [result_of(case, 1e-4, 3e-4) for case in cases]
    results[0].samples["torch.nn-fp16"] = results[0].samples["torch.nn"] / 2
    results[3] = Result(cases[3], failure="OutOfMemoryError: CUDA out of memory.")
    return [row for result in results for row in rows_of(result, GPU_RUN)]


def test_each_type_has_a_table_with_the_time_of_a_step():
    text = printed(print_tables, gpu_rows())
    assert text.count("inference, A GPU, ") == 2
    assert "25.00 us" in text  # 100 us for four steps
    assert "a step" not in printed(print_tables, rows_of(result_of(Case("gru", "inference", SHAPE), 1e-4, 3e-4), RUN))


def test_the_summary_has_the_ratio_to_the_faster_16_bit_type_and_names_failures():
    limits = Limits("cpu", 1)
    limits._peaks["bfloat16"] = 7.9e14
    text = printed(print_summary, gpu_rows(), limits)
    assert "Limits of A GPU: bfloat16 790 TFLOP/s" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("inference"))
    assert line.split() == ["inference", "4,3,5,6", "1.50", "3.00", "3.00", "failed"]
    assert text.index("Limits") < text.index(SUMMARY)


def test_a_failure_names_its_type():
    assert "out of memory. (1 cases: gru inference 4,3,5,6 float32)" in printed(print_notes, gpu_rows())
