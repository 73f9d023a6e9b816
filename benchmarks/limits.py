"""What this machine can do at all, measured in the same run, so that a time can be read as a share of the possible.

The limit of a case is the larger of two times, as if everything else were free:

- compute: the FLOPs of the matrix products (`Case.flops`) at the peak rate. On the CPU that is the rate of the FMA
  units, measured by `fastrnn._C.peak_flops`; for 16-bit types, and on a GPU, the rate of a large square `torch.mm` (on
  the CPU at least the float32 peak, as 16-bit values may always be computed with in float32).
- memory, on the CPU: each time step reads the recurrent weights once, in training once more on the way back
  (`Case.recurrent_bytes * T * passes`). The rate is that of `torch.sum` over a buffer as large as these weights, over
  and over with the same threads: the rate of whichever cache holds them. Weights of at most 1 MiB per thread are taken
  to stay in a core's own cache, and the memory limit of such a case is 0.
- memory, on a GPU: input, output and weights, each once per pass (`Case.compulsory_bytes`), as weights may stay on the
  chip. The rate is that of a copy from device memory to device memory.

Both are lower bounds: no real layer reaches 100 %, and a small GPU case is bound by latency, which is in neither.
The best of many calls counts, as a disturbance can only make a limit look lower than it is; the peak rate is measured
anew for each case, and the best so far holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.timing import Protocol, seconds_per_call
from fastrnn import _C

CACHED_BYTES_PER_THREAD = 2**20
SEARCH = 0.2  # seconds to look for the best call
MIN_CALLS = 10


def best_seconds(call: Callable[[], object], protocol: Protocol) -> float:
    """The shortest of many single calls."""
    end = time.perf_counter() + SEARCH
    seconds = [seconds_per_call(call, 1, protocol) for _ in range(MIN_CALLS)]
    while time.perf_counter() < end:
        seconds.append(seconds_per_call(call, 1, protocol))
    return min(seconds)


class Limits:
    """The limits of one device with a number of threads; each is measured when asked for."""

    def __init__(self, device: str, threads: int):
        self.device = torch.device(device)
        self.threads = threads
        self._protocol = Protocol.on(device)
        self._peaks = {}
        self._copy_rate = None
        self._mm_flops = cache(self._measure_mm_flops)
        self.read_rate = cache(self._measure_read_rate)

    def of(self, case: Case) -> tuple[float, str]:
        """The shortest possible time of a case in seconds, and which limit it is: "compute" or "memory"."""
        compute = case.flops / self.peak_flops(case.dtype)
        if self.device.type == "cpu":
            memory = self._cpu_memory_seconds(case)
        else:
            memory = case.compulsory_bytes / self.copy_rate()
        return max((compute, "compute"), (memory, "memory"))

    def __str__(self) -> str:
        """The rates that the limits of this run were made of; reading rates of the CPU's caches are left out."""
        rates = [f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in self._peaks.items()]
        if self._copy_rate is not None:
            rates.append(f"copies {self._copy_rate / 1e12:.3g} TB/s, read and written")
        return ", ".join(rates)

    def _cpu_memory_seconds(self, case: Case) -> float:
        if case.recurrent_bytes <= CACHED_BYTES_PER_THREAD * self.threads:
            return 0.0
        return case.recurrent_bytes * case.shape.T * case.passes / self.read_rate(case.recurrent_bytes)

    def peak_flops(self, dtype: str) -> float:
        """The highest rate seen so far: this call's, or that of one before."""
        self._peaks[dtype] = max(self._measure_peak_flops(dtype), self._peaks.get(dtype, 0.0))
        return self._peaks[dtype]

    def _measure_peak_flops(self, dtype: str) -> float:
        if self.device.type != "cpu":
            return self._mm_flops(dtype, 8192)
        if dtype in ("float32", "float64"):
            return _C.peak_flops(dtype, self.threads)
        return max(self.peak_flops("float32"), self._mm_flops(dtype, 1024))

    def _measure_mm_flops(self, dtype: str, size: int) -> float:
        matrix = torch.randn(size, size, device=self.device).to(DTYPES[dtype])
        return 2 * size**3 / best_seconds(lambda: torch.mm(matrix, matrix), self._protocol)

    def _measure_read_rate(self, size: int) -> float:
        buffer = torch.ones(size // 4)
        return size / best_seconds(buffer.sum, self._protocol)

    def copy_rate(self) -> float:
        """Bytes per second, those read and those written, of a copy within the device's memory."""
        if self._copy_rate is None:
            source = torch.ones(2**28, device=self.device)
            target = torch.empty_like(source)
            self._copy_rate = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), self._protocol)
        return self._copy_rate
