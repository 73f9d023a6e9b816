"""Runs the C++ core, without torch, under sanitizers: python tests/sanitize/run.py [address] [thread]

`address` is AddressSanitizer together with UndefinedBehaviorSanitizer, on every instruction set that this machine has,
or on the one that FASTRNN_CPU_ISA names; `thread` is ThreadSanitizer, on base. CXX may name a gcc other than g++.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "fastrnn"))  # without the package, which would have to be built
from kernel_flags import generate_cells, kernel_jobs  # noqa: E402

CXX = os.environ.get("CXX", "g++")
CORE = ["dispatch", "memory", "pool", "threads"]
SOURCES = ["csrc/cells.cpp", *(f"csrc/cpu/{name}.cpp" for name in CORE), "tests/sanitize/driver.cpp"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-pthread", "-Wno-psabi"]
OPTIONS = {
    "ASAN_OPTIONS": "abort_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "abort_on_error=1:halt_on_error=1",
}


@dataclass
class Sanitizer:
    """A build of the core: its flags, the instruction sets that it has, how much the driver runs."""

    flags: list
    isas: list | None  # None: all
    rounds: int
    link_flags: list


SANITIZERS = {
    "address": Sanitizer(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], None, 4, []),
    # Threads are the same on all instruction sets. dispatch.cpp refers to the kernels of those that are left out.
    "thread": Sanitizer(["-fsanitize=thread"], ["base"], 1, ["-Wl,--unresolved-symbols=ignore-all"]),
}


def make(target, inputs, command):
    """Runs the command unless its target is newer than all inputs."""
    if target.exists() and all(target.stat().st_mtime > Path(file).stat().st_mtime for file in inputs):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([CXX, *FLAGS, *command, "-o", str(target)], check=True)


def build(name):
    """Compiles and links the driver of a sanitizer; returns its path."""
    sanitizer, folder = SANITIZERS[name], Path("build", "sanitize", name)
    shared = [__file__, "fastrnn/kernel_flags.py", *Path("csrc").rglob("*.h")]

    def compile_one(job):
        source, isa, isa_flags = job
        target = folder / isa / Path(source).with_suffix(".o").name
        make(target, [source, *shared], [*sanitizer.flags, f"-DFASTRNN_ISA={isa}", *isa_flags, "-c", source])
        return target

    jobs = [job for job in kernel_jobs() if sanitizer.isas is None or job[1] in sanitizer.isas]
    jobs += [(source, "core", []) for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    driver = folder / "driver"
    make(driver, objects, [*sanitizer.flags, *sanitizer.link_flags, *map(str, objects)])
    return driver


def isas_to_run(name, driver):
    """Those of the build that this machine has, or the one that is asked for."""
    if name == "thread":
        return SANITIZERS[name].isas
    forced = os.environ.get("FASTRNN_CPU_ISA")
    if forced:
        return [forced]
    return subprocess.run([driver, "--isas"], capture_output=True, text=True, check=True).stdout.split()


def main(names):
    os.chdir(ROOT)
    generate_cells()
    for name in names or SANITIZERS:
        driver = build(name)
        for isa in isas_to_run(name, driver):
            print(f"{name} sanitizer, {isa}", flush=True)
            environment = os.environ | OPTIONS | {"FASTRNN_CPU_ISA": isa}
            subprocess.run([driver, str(SANITIZERS[name].rounds)], env=environment, check=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (subprocess.CalledProcessError, KeyError) as error:
        sys.exit(f"This failed: {error}")
