"""Times contenders against each other on a machine that is never quite still.

One block is about 0.1 s of one contender's calls, then comes a pause, then a block of the next; a round is one block of
each, and the order rotates from round to round. Blocks, because a thread pool spins on for a while after its last
call: call by call in turn, each contender would be slowed by the threads of the one before (a library against itself
then reads anything but 1). The pause lasts until they sleep: torch's spin for about 10 ms, those of ONNX Runtime for 40
to 50 ms. Rounds, because a slow second then hits all contenders alike: the ratio of two contenders is taken within a
round, and its spread over the rounds tells how far to trust it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

PAUSE = 0.02  # seconds between blocks, at least
QUIET = 0.1  # of a core: this process rests when its threads used less than that in a pause
MAX_PAUSES = 50
MIN_ROUNDS = 4


Stopwatch = Callable[[], Callable[[], float]]  # starts; what it returns gives the seconds since then


def host_stopwatch() -> Callable[[], float]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def cuda_stopwatch(device: str) -> Stopwatch:
    """Times what the device does, between two events on its current stream; the device is idle at the start."""

    def start():
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record(stream)

        def seconds():
            end.record(stream)
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return seconds

    return start


@dataclass(frozen=True)
class Protocol:
    """How long to measure. `stopwatch`, `cpu_clock` and `sleep` are replaced in tests.

    Of slow contenders there are fewer rounds, as many as fit `budget` seconds.
    """

    rounds: int = 12
    block: float = 0.1
    budget: float = math.inf
    pause: float = PAUSE
    stopwatch: Stopwatch = host_stopwatch
    cpu_clock: Callable[[], float] = time.process_time  # seconds of all threads of this process
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def on(cls, device: str, **options) -> Protocol:
        """The protocol of a device. Contenders on a GPU have no threads to wait for, and are not paused between."""
        if torch.device(device).type == "cuda":
            options |= {"stopwatch": cuda_stopwatch(device), "pause": 0.0}
        return cls(**options)


def seconds_per_call(call: Callable[[], object], calls: int, protocol: Protocol) -> float:
    """The mean time of `calls` calls in a row."""
    seconds = protocol.stopwatch()
    for _ in range(calls):
        call()
    return seconds() / calls


def trial(call: Callable[[], object], protocol: Protocol) -> tuple[int, float]:
    """How many calls fill a block, at least one, and the seconds they take. Doubling runs also serve as the warm-up."""
    calls = 1
    while True:
        seconds = seconds_per_call(call, calls, protocol)
        if seconds * calls >= protocol.block / 4:
            calls = max(1, round(protocol.block / seconds))
            return calls, calls * seconds
        calls *= 2


def rest(protocol: Protocol) -> None:
    """Pauses until no thread of this process is busy, for at most about a second."""
    for _ in range(MAX_PAUSES):
        start = protocol.cpu_clock()
        protocol.sleep(protocol.pause)
        if protocol.cpu_clock() - start <= QUIET * protocol.pause:
            break


def rounds_within(protocol: Protocol, seconds: float) -> int:
    """How many rounds of so many seconds are measured."""
    return int(min(protocol.rounds, max(MIN_ROUNDS, protocol.budget / max(seconds, 1e-9))))


def measure(
    contenders: Mapping[str, Callable[[], object]],
    protocol: Protocol,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, np.ndarray]:
    """Seconds per call of each contender: one array of samples, a round each, per name.

    `before` is called, untimed, with the name of the contender whose block comes next.
    """
    names = list(contenders)
    calls, blocks = {}, {}
    for name in names:
        before(name)
        calls[name], blocks[name] = trial(contenders[name], protocol)
    samples = {name: [] for name in names}
    for round_ in range(rounds_within(protocol, sum(blocks.values()) + 2 * protocol.pause * len(names))):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            rest(protocol)
            before(name)
            samples[name].append(seconds_per_call(contenders[name], calls[name], protocol))
    return {name: np.array(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Ratio:
    """The median and quartiles of the ratio of two contenders' times, taken round by round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, time: np.ndarray, baseline: np.ndarray) -> Ratio:
        """How many times as long as `baseline` takes `time` is; both [rounds]."""
        low, median, high = np.quantile(time / baseline, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))
