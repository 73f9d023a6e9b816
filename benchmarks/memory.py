"""The peak memory of one call, measured in a process of its own.

What the process holds before the call, parameters and inputs among it, does not count. Three things would blur the
figure and are put aside. Libraries set up their threads and buffers beforehand, in a call of a tiny shape. malloc gives
every larger block back to the system at once: none that is free counts, and none that was free before is used unseen.
And the kernel hands out single pages, not huge ones.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import Case, Shape
from benchmarks.problem import Peer, Problem

TINY = Shape(T=4, B=2, I=16, H=16)
M_MMAP_THRESHOLD, PR_SET_THP_DISABLE = -3, 41  # of <malloc.h> and <linux/prctl.h>
LARGE = 2**16  # bytes


def peak_in_new_process(peer: Peer, case: Case) -> int:
    """Bytes at the peak of the peer's first call in a new process. Raises what the peer raises."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_first_call, peer, case).result()


def _peak_of_first_call(peer: Peer, case: Case) -> int:
    if torch.device(case.device).type != "cpu":
        raise NotImplementedError("memory is measured on the CPU only")
    _return_free_memory_at_once()
    torch.set_num_threads(case.threads)
    with torch.set_grad_enabled(case.records_gradients):
        peer.prepare(Problem.of(replace(case, shape=TINY))).run()
        return rise_of_peak(peer.prepare(Problem.of(case)).run)


def _return_free_memory_at_once() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def rise_of_peak(call: Callable[[], object]) -> int:
    """Bytes that this process holds at most during the call, over what it holds before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
