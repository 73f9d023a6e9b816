"""Thread counts, and calls from several Python threads. Nothing here may wait for ever."""

import itertools
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
CSRC = Path(__file__).parents[2] / "csrc"
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


def compile_program(program, *arguments):
    """By the compiler that cells are compiled by."""
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", f"-I{CSRC}", "-pthread", *map(str, arguments)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=TIMEOUT)


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
  fastrnn::cpu::Barrier barrier = {};
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
    sources = [tmp_path / "late.cpp", CSRC / "cpu" / "threads.cpp", CSRC / "cpu" / "pool.cpp"]
    compile_program(tmp_path / "late", *sources)
    run = subprocess.run([tmp_path / "late"], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert run.stdout.split() == ["2", "5"]


# ---- more threads than this machine may have

SIXTEEN_CPUS = """
#include <sched.h>
extern "C" int sched_getaffinity(pid_t, size_t size, cpu_set_t* set) {
  CPU_ZERO_S(size, set);
  for (int i = 0; i < 16; ++i) CPU_SET_S(i, size, set);
  return 0;
}
"""

RUN_MANY = """
import sys, torch, fastrnn
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)

def shapes(module, I):  # several teams of threads, one team, rows alone, a single step
    for T, B in ((5, 1), (5, 8), (4, 40), (1, 20)):
        yield torch.randn(T, B, I), dict(lengths=torch.randint(0, T + 1, (B,)), resets=torch.rand(T, B) < 0.2)

found = []
for make, options in (
    (fastrnn.LSTM, {}), (fastrnn.LSTM, {"proj_size": 70}), (fastrnn.LSTM, {"recompute": True}), (fastrnn.GRU, {}),
    (fastrnn.GRU, {"reset_after": False}), (fastrnn.RNN, {}), (fastrnn.LayerNormLSTM, {}), (fastrnn.LayerNormGRU, {}),
):
    for bidirectional in (False, True):
        module = make(100, 330, bidirectional=bidirectional, **options)
        for x, rows in shapes(module, 100):
            for call in ({}, rows):
                x = x.detach().requires_grad_()
                y = module(x, **call)[0]
                found += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]
for make in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN):
    for weights in ("bf16", "int8"):
        module = make(100, 330, weights=weights).eval()
        with torch.no_grad():
            found += [module(x, **rows)[0] for x, rows in shapes(module, 100)]
torch.save(found, sys.argv[2])
print(fastrnn.explain(make(100, 330), x))
"""


tells_of_cpus = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere CPUs are counted otherwise")


@pytest.fixture(scope="module")
def on_sixteen_cpus(tmp_path_factory):
    """A function that runs RUN_MANY with so many threads in a process that is told of 16 CPUs."""
    path = tmp_path_factory.mktemp("sixteen")
    (path / "cpus.cpp").write_text(SIXTEEN_CPUS)
    compile_program(path / "cpus.so", path / "cpus.cpp", "-shared", "-fPIC")

    def run(threads, **variables):
        env = os.environ | {"LD_PRELOAD": str(path / "cpus.so"), "OMP_WAIT_POLICY": "passive"} | variables
        command = [sys.executable, "-c", RUN_MANY, str(threads), str(path / "found.pt")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=5 * TIMEOUT, check=False)
        assert done.returncode == 0, done.stderr
        assert f"at most {threads} threads" in done.stdout
        return torch.load(path / "found.pt")

    return run


@pytest.fixture(scope="module")
def on_one_thread(on_sixteen_cpus):
    return on_sixteen_cpus(1)


@tells_of_cpus
@pytest.mark.parametrize("count", [3, 8, 16])
def test_many_threads_give_the_same_bits(count, on_sixteen_cpus, on_one_thread):
    """Teams of all sizes, and several of them: rows, units, and both directions are shared."""
    assert_equal_bits(on_sixteen_cpus(count), on_one_thread)


@needs_openmp
@tells_of_cpus
@pytest.mark.parametrize("granted", [2, 7])
def test_fewer_of_many_threads_give_the_same_bits(granted, on_sixteen_cpus, on_one_thread):
    """16 are asked for; OpenMP grants less than one for each team, or an uneven number."""
    assert_equal_bits(on_sixteen_cpus(16, OMP_THREAD_LIMIT=str(granted)), on_one_thread)


# ---- who shares what

TASKS = """
#include <cstdio>
#include "cpu/rows.h"

namespace fastrnn::cpu {
int64_t cache_of_a_core() { return 1 << 20; }
}

int main() {
  using namespace fastrnn::cpu::FASTRNN_ISA;
  fastrnn::Layer layer = {};
  int gates;
  while (std::scanf("%d %ld %ld %ld %d %d", &gates, &layer.T, &layer.B, &layer.H, &layer.D, &layer.threads) == 6) {
    layer.I = layer.P = layer.H, layer.gates = layer.recurrent = gates;
    const RowTasks tasks(layer, gates, 1);
    std::printf("%d %d", tasks.threads(), tasks.team());
    for (int task = 0; task < tasks.count(); ++task) {
      const RowRange rows = tasks.range(task);
      std::printf(" %d:%ld:%ld", rows.d, long(rows.b0), long(rows.n));
    }
    std::printf("\\n");
  }
}
"""


@pytest.fixture(scope="module")
def tasks_of(tmp_path_factory):
    """A function from many (gates, T, B, H, D, threads) to each one's (threads, team, [(direction, first row, rows)]),
    of a machine with 1 MB of cache for each core."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "tasks.cpp").write_text(TASKS)
    compile_program(path / "tasks", path / "tasks.cpp", "-DFASTRNN_ISA=base")

    def run(layers):
        text = "\n".join(" ".join(map(str, layer)) for layer in layers)
        done = subprocess.run([path / "tasks"], input=text, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        for line in done.stdout.splitlines():
            threads, team, *ranges = line.split()
            yield int(threads), int(team), [tuple(map(int, part.split(":"))) for part in ranges]

    return run


def test_tasks_cover_every_row_once(tasks_of):
    sizes = itertools.product(
        (1, 3, 4), (1, 20), (0, 1, 2, 3, 7, 8, 33, 200), (1, 100, 1000), (1, 2), (1, 2, 3, 16, 100)
    )
    layers = list(sizes)
    for (_, _, B, _, D, asked), (used, team, ranges) in zip(layers, tasks_of(layers), strict=True):
        assert 1 <= used <= asked
        assert team == 1 or team * len(ranges) <= used
        for direction in range(D):
            covered = [b for d, first, count in ranges if d == direction for b in range(first, first + count)]
            assert covered == list(range(B))


@pytest.mark.parametrize(
    ("layer", "team", "teams"),
    [
        ((4, 100, 1, 1024, 1, 16), 16, 1),  # one sequence: all share its units
        ((4, 100, 1, 1024, 2, 16), 8, 2),  # in both directions
        ((4, 100, 8, 512, 1, 16), 8, 2),  # few rows: until the weights of each thread fit into its cache
        ((4, 100, 8, 512, 1, 2), 2, 1),  # and where they don't, each reads half of them
        ((4, 100, 64, 512, 1, 2), 1, 2),  # rows enough to hide that
        ((4, 100, 64, 128, 1, 16), 1, 16),  # weights in the cache: nobody has to meet
        ((4, 200, 4, 100, 1, 2), 1, 2),
        ((1, 100, 1, 64, 1, 16), 1, 1),  # too little work for a second thread
        ((4, 1, 32, 512, 1, 16), 16, 1),  # a single step reads each weight once
    ],
)
def test_teams_are_as_large_as_pays(layer, team, teams, tasks_of):
    ((_, found, ranges),) = tasks_of([layer])
    assert (found, len(ranges)) == (team, teams)


# ---- torch's threads live on

ALTERNATE = """
import os, torch, fastrnn
torch.set_num_threads(8)
large = torch.randn(400, 400)
module = fastrnn.LSTM(64, 64)
seen = set()
for call in range(30):
    large.sin()
    seen |= set(os.listdir("/proc/self/task"))
    module(torch.randn(20, 4, 64))[0].sum().backward()
    if call == 4:
        early = len(seen)
print(len(seen) - early)
"""


@needs_openmp
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_calls_of_few_threads_leave_the_others_alive():
    """A call that has work for two of torch's eight threads does not end the other six, which torch's next operation
    would have to start again (hundreds of microseconds, in every call)."""
    run = subprocess.run([sys.executable, "-c", ALTERNATE], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert int(run.stdout) == 0
