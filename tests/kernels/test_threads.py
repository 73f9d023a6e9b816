"""Thread counts, and calls from several Python threads. Nothing here may wait for ever."""

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from twins import LAYERS, make

import fastrnn

TIMEOUT = 60  # seconds; a call takes milliseconds
each_layer = pytest.mark.parametrize("case", LAYERS)


def large(case, **options):
    """A module and an input large enough for several threads."""
    module = make(fastrnn, case, 64, 64, **options)
    return module, torch.randn(8, 32, 64, dtype=torch.float64)


def outputs_and_gradients(module, x):
    x = x.detach().requires_grad_()
    output, _ = module(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])]


def assert_equal_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_layer
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
def test_any_thread_count_gives_the_same_bits(case, bidirectional, threads):
    module, x = large(case, bidirectional=bidirectional)
    found = []
    for count in (1, 2, 3, 16, 64):
        threads(count)
        found.append(outputs_and_gradients(module, x))
    for other in found[1:]:
        assert_equal_bits(other, found[0])


@each_layer
@pytest.mark.parametrize("rows", [3, 8, 40, 150])
def test_any_thread_count_gives_the_same_bits_of_a_step(case, rows, threads):
    """Threads share units, or rows where there are more of them."""
    module, x = make(fastrnn, case, 160, 128), torch.randn(1, rows, 160, dtype=torch.float64)
    found = []
    for count in (1, 2, 3, 16):
        threads(count)
        found.append(outputs_and_gradients(module, x))
    for other in found[1:]:
        assert_equal_bits(other, found[0])


@each_layer
def test_the_same_call_gives_the_same_bits(case, threads):
    threads(2)
    module, x = large(case, bidirectional=True)
    first = outputs_and_gradients(module, x)
    for _ in range(5):
        assert_equal_bits(outputs_and_gradients(module, x), first)


@pytest.mark.parametrize("count", [1, 2], ids=["1-thread", "2-threads"])
def test_calls_from_several_python_threads(count, threads):
    """Four Python threads, each with a module and inputs of its own and a shared module, ten times each."""
    threads(count)
    shared, x = large("LSTM", bidirectional=True)
    own = [large("GRU") for _ in range(4)]
    expected = [(outputs_and_gradients(shared, x + i), outputs_and_gradients(*own[i])) for i in range(4)]
    results = queue.Queue()

    def work(i):
        torch.set_num_threads(count)  # the setting is one per thread
        for _ in range(10):
            results.put((i, (outputs_and_gradients(shared, x + i), outputs_and_gradients(*own[i]))))

    for i in range(4):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    for _ in range(40):
        i, found = results.get(timeout=TIMEOUT)
        assert_equal_bits(found, expected[i])


# ---- one pool of threads with torch

RUN = """
import os, re, sys, torch, fastrnn
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
threads = lambda: len(os.listdir("/proc/self/task"))
assert (torch.ones(400000) + 1).sum() == 800000  # on torch's threads
before = threads()
found = []
for make in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN):
    for B in (1, 64):  # a team of threads, and rows shared among threads
        module = make(256, 256)
        y = module(torch.randn(6, B, 256))[0]
        y.square().sum().backward()
        found += [y.detach(), *(p.grad for p in module.parameters())]
torch.save(found, sys.argv[2])
libraries = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if re.search(r"lib(g|i)?omp", line)}
print(len(libraries), threads() - before)
"""


def run_alone(path, count=2, **variables):
    """The numbers of a process of its own, how many OpenMP runtimes were in it, how many threads fastrnn added."""
    command = [sys.executable, "-c", RUN, str(count), str(path)]
    env = os.environ | variables
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr
    return torch.load(path), *map(int, run.stdout.split())


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("threads") / "usual.pt")


needs_openmp = pytest.mark.skipif(not fastrnn._C.build_info()["openmp"], reason="this torch has no OpenMP")


@needs_openmp
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_runs_on_torchs_threads(usual):
    """One runtime is in the process, and calls start no thread that torch has not started."""
    _, runtimes, added = usual
    assert (runtimes, added) == (1, 0)


def test_this_build_is_as_this_torch():
    """Of a gcc build, which is what the tests run on; clang's calls are not found in gcc's runtime."""
    info = fastrnn._C.build_info()
    assert info["openmp"] == (torch.backends.openmp.is_available() and "clang" not in info["compiler"].lower())


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "7"},
        {"OMP_WAIT_POLICY": "PASSIVE"},
        {"OMP_WAIT_POLICY": "ACTIVE"},
        {"OMP_PROC_BIND": "true"},
        {"OMP_MAX_ACTIVE_LEVELS": "0"},
    ],
    ids=lambda variables: "-".join(f"{name}={value}" for name, value in variables.items()),
)
def test_fewer_threads_than_asked_for_give_the_same_bits(variables, usual, tmp_path):
    """OpenMP may grant a team fewer threads; nobody waits for the others."""
    assert_equal_bits(run_alone(tmp_path / "other.pt", **variables)[0], usual[0])


# ---- how a team meets

LATE = """
#include <sys/resource.h>
#include <unistd.h>
#include <cstdio>
#include "cpu/threads.h"

static long sleeps() {
  rusage usage;
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;  // a yield is none of these switches
}

int main() {
  fastrnn::cpu::Barrier barrier;
  long slept = 0;
  int met = 0;
  fastrnn::cpu::team_of(2, [&](int worker, int count) {
    for (int step = 0; step < 10; ++step) {
      const int late = step % 2;
      if (worker == late) usleep(20000);
      const long before = sleeps();
      barrier.wait(worker, count);
      if (worker == 0 && late == 1) slept += sleeps() > before;
    }
    if (worker == 0) met = count;
  });
  std::printf("%d %ld\\n", met, slept);
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a wait yields")
def test_waits_for_a_late_thread_in_its_sleep(tmp_path):
    """A thread that is 20 ms late is slept for, each time. Yielding would leave the core to other programs, and not to
    the thread that is late because of them."""
    (tmp_path / "late.cpp").write_text(LATE)
    root = Path(__file__).parents[2] / "csrc"
    sources = [tmp_path / "late.cpp", root / "cpu" / "threads.cpp", root / "cpu" / "pool.cpp"]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", f"-I{root}", "-pthread", *map(str, sources)]
    subprocess.run([*command, "-o", str(tmp_path / "late")], check=True, timeout=TIMEOUT)
    run = subprocess.run([tmp_path / "late"], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert run.stdout.split() == ["2", "5"]
