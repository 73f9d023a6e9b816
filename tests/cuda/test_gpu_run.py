"""`make gpu`, as far as that can be tested without a GPU: what it would run, and what it says of what it ran."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import run
from gpu.run import SHORT_TABLE, TESTED, Outcome, Step

HOPPER = (9, 0)


def step(program: str, limit: float = 60, **options) -> Step:
    return Step("step", [sys.executable, "-c", program], limit, {}, **options)


@pytest.mark.parametrize(("capability", "text"), [((8, 0), "8.0"), ((9, 0), "9.0a"), ((12, 1), "12.1")])
def test_only_this_chip_is_built_for(capability, text):
    assert run.arch_list(capability) == text


def test_the_full_run_checks_memory_and_races_and_the_quick_one_does_not(tmp_path):
    steps = run.steps_of(tmp_path, False, HOPPER, None)
    assert [step.name for step in steps] == ["build", "tests", "memcheck", "racecheck", "benchmark", "tiles"]
    assert [step.name for step in run.steps_of(tmp_path, True, HOPPER, None)] == ["build", "tests", "benchmark"]
    assert steps[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert steps[0].environment["FASTRNN_CUDA"] == "1"


def test_the_quick_run_is_a_part_of_the_tests_and_suites(tmp_path):
    _, tests, benchmark = run.steps_of(tmp_path, True, HOPPER, "fastrnn/_C.so")
    assert tests.command[-2:] == ["-m", "quick"]
    assert "gpu-quick" in benchmark.command


def test_what_is_built_is_not_built_again(tmp_path):
    outcome = run.run_step(run.steps_of(tmp_path, True, HOPPER, "fastrnn/_C.so")[0], tmp_path)
    assert (outcome.status, outcome.note) == ("skipped", "fastrnn/_C.so is there; remove it to build anew")


def test_commands_name_programs_that_exist(tmp_path):
    """The tests and suites are there, and this Python has the modules."""
    for name in run.PACKAGES + run.BUILD_PACKAGES:
        assert not run.missing_packages((name,))
    for quick in (False, True):
        steps = {step.name: step for step in run.steps_of(tmp_path, quick, HOPPER, None)}
        asked = [*steps["benchmark"].command, "--help"]
        assert subprocess.run(asked, cwd=run.ROOT, capture_output=True, check=False).returncode == 0
        collected = subprocess.run(
            [*steps["tests"].command, "--collect-only"], cwd=run.ROOT, capture_output=True, text=True, check=False
        )
        assert collected.returncode == 0, collected.stdout


def test_a_package_that_is_missing_is_named():
    assert run.missing_packages(("torch", "no_such_package")) == ["no_such_package"]


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        run.main([str(tmp_path / "new")])
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_step_has_its_log_and_its_last_line(tmp_path):
    outcome = run.run_step(step("print('a'); print('= 3 passed in 1 s ='); print()", proof=TESTED), tmp_path)
    assert (outcome.status, outcome.note) == ("passed", "3 passed in 1 s")
    assert (tmp_path / "step.log").read_text().splitlines()[1:3] == ["a", "= 3 passed in 1 s ="]


def test_a_step_that_fails_or_proves_nothing_has_failed(tmp_path):
    assert run.run_step(step("raise SystemExit('no memory')"), tmp_path) == Outcome(
        "step", "failed", pytest.approx(0, abs=60), "no memory"
    )
    assert run.run_step(step("print('1 skipped')", proof=TESTED), tmp_path).status == "failed"


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    child = f"import pathlib, time; time.sleep(5); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    outcome = run.run_step(step(program, limit=3), tmp_path)
    assert (outcome.status, outcome.note) == ("failed", "not finished after 3 s")
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_the_summary_names_versions_steps_and_the_short_table(tmp_path):
    log = tmp_path / "benchmark.log"
    log.write_text(f"much\n{SHORT_TABLE}A GPU: copies 4 TB/s\nratios\n1.5\n")
    machine = {"torch": "2.13", "GPU": "A GPU", "capability": [9, 0], "driver": "580"}
    outcomes = [Outcome("tests", "passed", 12.34, "3 passed"), Outcome("benchmark", "failed", 100.0, "")]
    lines = run.summary(machine, outcomes, log).splitlines()
    assert lines[:3] == ["torch: 2.13", "GPU: A GPU", "driver: 580"]
    assert "tests      passed     12.3 s  3 passed" in lines
    assert lines[-3:] == [f"{SHORT_TABLE}A GPU: copies 4 TB/s", "ratios", "1.5"]
    assert run.short_table(tmp_path / "none.log") == "The benchmark printed no table."


def on_a_gpu(monkeypatch, steps: list[Step]) -> None:
    """Makes `run.main` believe in a GPU, and gives it these steps."""
    monkeypatch.setattr(run, "output_of", lambda program: '{"GPU": "A GPU", "capability": [9, 0]}')
    monkeypatch.setattr(run, "steps_of", lambda *arguments: steps)


def test_a_failed_step_does_not_keep_the_next_from_running(tmp_path, monkeypatch, capsys):
    failing = Step("tests", [sys.executable, "-c", "print('F'); raise SystemExit(1)"], 60, {})
    on_a_gpu(monkeypatch, [failing, Step("benchmark", [sys.executable, "-c", "print('Limits of it')"], 60, {})])
    assert run.main([str(tmp_path)]) == 1
    written = (tmp_path / "summary.txt").read_text()
    assert written.splitlines()[-1] == "Limits of it"
    assert capsys.readouterr().out.endswith(written)


def test_a_part_of_the_steps(tmp_path, monkeypatch, capsys):
    on_a_gpu(monkeypatch, [step("print('ran')"), Step("other", ["no-such-program"], 60, {})])
    assert run.main([str(tmp_path), "--steps", "step"]) == 0
    with pytest.raises(SystemExit):
        run.main([str(tmp_path), "--steps", "step,third"])
    assert "there is no third here" in capsys.readouterr().err


def test_the_short_table_begins_as_the_benchmark_prints_it():
    printed = (Path(run.ROOT) / "benchmarks" / "table.py").read_text()
    assert f'console.print(f"{SHORT_TABLE}{{' in printed
