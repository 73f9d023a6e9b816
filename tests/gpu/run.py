"""Builds, tests and measures fastrnn on a machine with a GPU: python tests/gpu/run.py FOLDER [--quick] [--steps NAMES]

Needs nothing from the network: this Python must have the packages, and the machine CUDA's compiler, unless fastrnn is
built already. Every step's log, the benchmark's rows and a summary go to FOLDER. A step that fails does not keep the
next from running; the exit status is 0 if none failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "pytest", "rich")
BUILD_PACKAGES = ("setuptools", "pybind11", "ninja")
SHORT_TABLE = "Limits of "  # how the line begins with which the benchmark's short table does
TILES = "us a step, "  # in the first line of what times the tiles
TESTED = " passed"  # in pytest's last line, unless every test was skipped
SHOWN_OF_A_FAILURE = 40  # lines

# Prints what the machine is, as JSON.
PROBE = """
import json, torch
found = {"torch": torch.__version__, "CUDA": torch.version.cuda, "GPU": None}
if torch.cuda.is_available():
    found |= {"GPU": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}
    found |= {"cuDNN": torch.backends.cudnn.version()}
print(json.dumps(found))
"""
# Fails unless fastrnn is built for this Python and has CUDA kernels.
IS_BUILT = """
import torch, fastrnn
assert torch._C._dispatch_has_kernel_for_dispatch_key("fastrnn::layer_forward", "CUDA"), "no CUDA kernels"
print(fastrnn._C.__file__)
"""


@dataclass(frozen=True)
class Step:
    """A command, or why there is nothing to run.

    It has passed if it ends within `limit` seconds, with the status 0, and has printed `proof`.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str]
    proof: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed" or "skipped"; `note` is the last line that it printed, or why it failed."""

    name: str
    status: str
    seconds: float
    note: str


def arch_list(capability: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST for one chip; of Hopper with the instructions that no later chip has."""
    major, minor = capability
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def missing_packages(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def base_environment() -> dict[str, str]:
    """This checkout comes before an installed fastrnn, and this Python's tools, such as ninja, before others."""
    paths = {"PYTHONPATH": str(ROOT), "PATH": sysconfig.get_path("scripts")}
    environment = {
        name: f"{path}{os.pathsep}{os.environ.get(name, '')}".strip(os.pathsep) for name, path in paths.items()
    }
    return os.environ | environment | {"PYTHONUNBUFFERED": "1"}


def output_of(program: str) -> str | None:
    """What a Python program prints, in a process of its own; None if it fails."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=base_environment(), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    return lines[0] if lines else "unknown"


def steps_of(folder: Path, quick: bool, capability: tuple[int, int], built: str | None) -> list[Step]:
    """Everything there is to do, in order."""
    python, tests = sys.executable, ["-m", "pytest", "tests/gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    build = {"FASTRNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch_list(capability), "MAX_JOBS": str(os.cpu_count())}
    subset = ["-m", "quick"] if quick else []
    steps = [
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            600,
            build,
            skipped=f"{built} is there; remove it to build anew" if built else "",
        ),
        Step("tests", [python, *tests, "-rs", "--durations=10", *subset], 300, {}, TESTED),
    ]
    if not quick:
        steps += [sanitizer_step(tool, [python, *tests, "-m", "sanitizer"]) for tool in ("memcheck", "racecheck")]
    suite = "gpu-quick" if quick else "gpu"
    csv = ["--csv", str(folder / "benchmark.csv")]
    steps.append(Step("benchmark", [python, "-m", "benchmarks", "--suite", suite, *csv], 500, {}, SHORT_TABLE))
    if not quick:
        steps.append(Step("tiles", [python, "-m", "benchmarks.tiles"], 300, {}, TILES))
    return steps


def sanitizer_step(tool: str, tests: list[str]) -> Step:
    """Our kernels alone are checked; each tensor is an allocation of its own, so that none is read past its end."""
    program = sanitizer()
    options = ["--tool", tool, "--error-exitcode", "1", "--kernel-regex", "kns=fastrnn"]
    skipped = "" if program else "there is no compute-sanitizer on PATH or in CUDA_HOME/bin"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, [program or "", *options, *tests], 180, environment, TESTED, skipped)


def run_step(step: Step, folder: Path) -> Outcome:
    """Runs a step with its log in the folder. At its limit the step and all that it started are ended."""
    if step.skipped:
        return Outcome(step.name, "skipped", 0.0, step.skipped)
    start = time.monotonic()
    path = folder / f"{step.name}.log"
    with path.open("w") as log:
        print(
            "$", *(f"{name}={value}" for name, value in step.environment.items()), *step.command, file=log, flush=True
        )
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=base_environment() | step.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    seconds = time.monotonic() - start
    text = path.read_text(errors="replace")
    if code is None:
        note = f"not finished after {step.limit:g} s"
    else:
        note = "" if step.proof == SHORT_TABLE else [line for line in text.splitlines() if line.strip()][-1].strip("= ")
    return Outcome(step.name, "passed" if code == 0 and step.proof in text else "failed", seconds, note)


def short_table(log: Path) -> str:
    """The end of the benchmark's log, from its limits on."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    starts = [place for place, line in enumerate(lines) if line.startswith(SHORT_TABLE)]
    return "\n".join(lines[starts[-1] :]) if starts else "The benchmark printed no table."


def summary(machine: dict, outcomes: list[Outcome], log: Path) -> str:
    """The versions, a line per step, and the benchmark's short table if it ran."""
    lines = [f"{name}: {value}" for name, value in machine.items() if name != "capability"]
    lines += ["", *(f"{o.name:<10} {o.status:<8} {o.seconds:6.1f} s  {o.note}".rstrip() for o in outcomes)]
    if any(outcome.name == "benchmark" for outcome in outcomes):
        lines += ["", short_table(log)]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="tests/gpu/run.py", description=__doc__.split("\n\n")[1])
    result.add_argument("folder", type=Path, help="for logs, rows and the summary")
    result.add_argument("--quick", action="store_true", help="a part of the tests and of the benchmark: three minutes")
    result.add_argument("--steps", help="a comma-separated part of build,tests,memcheck,racecheck,benchmark,tiles")
    return result


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    missing = missing_packages(PACKAGES)
    if missing:
        command.error(f"{sys.executable} lacks {', '.join(missing)}")
    machine = json.loads(output_of(PROBE) or "{}")
    if not machine.get("GPU"):
        command.error(f"torch {machine.get('torch')} sees no CUDA device")
    built = output_of(IS_BUILT)
    missing = [] if built else missing_packages(BUILD_PACKAGES)
    if missing:
        command.error(f"to build fastrnn, {sys.executable} lacks {', '.join(missing)}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = steps_of(folder, options.quick, machine["capability"], built)
    names = options.steps.split(",") if options.steps else [step.name for step in steps]
    unknown = set(names) - {step.name for step in steps}
    if unknown:
        command.error(f"--steps: there is no {', '.join(sorted(unknown))} here")
    outcomes = []
    for step in steps:
        if step.name in names:
            print(f"{step.name} ...", flush=True)
            outcome = run_step(step, folder)
            print(f"{outcome.name}: {outcome.status} after {outcome.seconds:.1f} s. {outcome.note}", flush=True)
            if outcome.status == "failed":
                log = (folder / f"{step.name}.log").read_text(errors="replace").splitlines()
                print(*log[-SHOWN_OF_A_FAILURE:], sep="\n", flush=True)
            outcomes.append(outcome)
    text = summary(machine | {"driver": driver_version()}, outcomes, folder / "benchmark.log")
    (folder / "summary.txt").write_text(f"{text}\n")
    print(f"\n{text}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
