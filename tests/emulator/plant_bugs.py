"""Plants bugs in a copy of the CUDA sources, one at a time, and prints which test notices each of them.

usage: python tests/emulator/plant_bugs.py [regular expression of names] [--jobs N]

To be quick, the copy has three cells. A bug that changes results or choices is shown to test_cuda_kernels.py and
test_cuda_choice.py of tests/cuda, beginning with the test that is the likeliest to notice; one that only a race
detector can see, to the driver under ThreadSanitizer.
Exits with 1 if a bug is missed, is not in the sources any more or does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from bugs import BUGS, Bug

from fastrnn.cells import CELLS

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/cuda/test_cuda_kernels.py", "tests/cuda/test_cuda_choice.py"
# Of the first of these: what needs all cells, and what is run for races alone.
COVERAGE_TEST, RACE_TEST = "test_every_kernel_is_executed", "test_threads_do_not_race"
# Of a run of all tests, and of the first ones alone: several times what they take. A bug may be noticed by a test that
# does not end.
CPU_SECONDS, FIRST_CPU_SECONDS = 900, 120


def address(test: str) -> str:
    """Of a test of TESTS, or what it is already: a file of tests."""
    for file in TESTS:
        if f"def {test}(" in (ROOT / file).read_text():
            return f"{file}::{test}"
    return test


class Copy:
    """A copy of the repository with few cells, in which bugs are planted."""

    def __init__(self, folder: Path, cells: set[str]):
        self.root, self.clean = folder / "copy", folder / "clean"
        for part in ("csrc", "fastrnn", "tests"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", self.root)
        others = "|".join(name for name, cell in CELLS.items() if cell.has_all_kernels and name not in cells)
        self.edit("csrc/cells/generated.h", rf"ALL\(({others}),", r"FLOAT(\1,", times=others.count("|") + 1)
        self.edit("tests/cases.py", r"if cell.has_all_kernels\]", f"if name in {cells}]")
        # Rounds without progress after which the emulator reports a dead-lock.
        self.edit("tests/emulator/emulate.h", r"idle > 200000", "idle > 5000")

    def edit(self, file: str, pattern: str, to: str, times: int = 1):
        path = self.root / file
        text, count = re.subn(pattern, to, path.read_text())
        assert count == times, f"{file}: {pattern}"
        path.write_text(text)

    def keep(self):
        """What is there now, with all that is built, is what restore() restores."""
        shutil.copytree(self.root, self.clean)

    def restore(self):
        shutil.rmtree(self.root)
        shutil.copytree(self.clean, self.root)

    def plant(self, bug: Bug):
        path = self.root / "csrc" / "cuda" / bug.file
        path.write_text(path.read_text().replace(bug.old, bug.new))

    def test(self, *arguments: str, cpu_seconds: int = CPU_SECONDS) -> tuple[int, str]:
        """Runs pytest; returns its exit status and what it printed."""
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-x", "--tb=short", "-p", "no:cacheprovider", *arguments],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(self.root), "FASTRNN_CACHE": str(self.root / "build" / "cells")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 10)),
        )
        if -process.returncode in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            raise RuntimeError("Somebody ended the tests.")
        if process.returncode > 1:  # pytest's own errors, such as a test that does not exist
            raise RuntimeError(process.stdout)
        return process.returncode, process.stdout


class Worker:
    """Copies for the two kinds of bugs."""

    def __init__(self, folder: Path):
        self.results = Copy(folder / "results", {"lstm", "gru", "gru_reset_before"})
        self.races = Copy(folder / "races", {"lstm", "gru", "rnn_tanh"})

    def run_results(self, first: str = "") -> tuple[int, str]:
        if first:
            status, output = self.results.test(address(first), cpu_seconds=FIRST_CPU_SECONDS)
            if status:
                return status, output
        return self.results.test(*(f"--deselect={address(name)}" for name in (COVERAGE_TEST, RACE_TEST)), *TESTS)

    def run_races(self) -> tuple[int, str]:
        return self.races.test(address(RACE_TEST))

    def build(self):
        """What bugs are planted in: compiled without optimization, since most end the tests early."""
        self.results.edit("tests/emulator/__init__.py", r'"-O1", "-g0"', '"-O0", "-g0"')
        status, output = self.results.test(address("test_lengths_are_clamped"))
        if status:
            raise RuntimeError(f"The unchanged copy does not build.\n{output}")
        self.results.keep()
        self.races.keep()

    def check_unchanged(self, kinds: set[bool]):
        for race, run in ((False, self.run_results), (True, self.run_races)):
            if race not in kinds:
                continue
            status, output = run()
            if status:
                raise RuntimeError(f"The unchanged copy fails.\n{output}")

    def notice(self, bug: Bug) -> str | None:
        """Who notices the bug, or None."""
        copy = self.races if bug.race else self.results
        copy.restore()
        copy.plant(bug)
        status, output = self.run_races() if bug.race else self.run_results(bug.first)
        if "Error building extension" in output or "CalledProcessError" in output:
            raise RuntimeError(f"{bug.name}: does not compile.\n{output}")
        if bug.race:
            return "ThreadSanitizer" if "ThreadSanitizer: data race" in output else None
        tests = re.findall(
            r"^tests/cuda/test_\w+.py::(.+?)(?: (?:PASSED|FAILED|ERROR|Fatal).*| )?$", output, re.MULTILINE
        )
        return tests[-1] if status else None


def check_bugs(bugs: list[Bug]):
    for bug in bugs:
        count = (ROOT / "csrc" / "cuda" / bug.file).read_text().count(bug.old)
        if count != 1:
            sys.exit(f"{bug.name}: {count} times in {bug.file}: {bug.old}")
    if not bugs:
        sys.exit("There is no bug of this name.")


def main():
    parser = argparse.ArgumentParser(description="Plants bugs in the CUDA kernels; prints which test notices each.")
    parser.add_argument("names", nargs="?", default="", help="a regular expression: the bugs to plant (default: all)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at the same time")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if re.search(options.names, bug.name)]
    check_bugs(bugs)
    jobs = max(1, min(options.jobs, len(bugs)))
    width = max(len(bug.name) for bug in bugs)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        workers = [Worker(Path(folder) / str(i)) for i in range(jobs)]
        workers[0].check_unchanged({bug.race for bug in bugs})
        print("the unchanged copy passes", flush=True)
        list(pool.map(Worker.build, workers))
        free = Queue()
        for worker in workers:
            free.put(worker)

        def notice(bug):
            worker, start = free.get(), time.monotonic()
            try:
                noticed = worker.notice(bug)
            finally:
                free.put(worker)
            print(f"{bug.name:{width}}  {time.monotonic() - start:5.0f} s  {noticed or 'MISSED'}", flush=True)
            return noticed

        missed = [bug for bug, noticed in zip(bugs, pool.map(notice, bugs), strict=True) if not noticed]
    print(f"{len(bugs)} bugs planted, {len(missed)} missed")
    for bug in missed:
        print(f"missed: {bug.name} ({bug.reason})")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
