"""Times contenders against each other on a machine that is never quite still.

One block is about 0.1 s of one contender's calls, then comes a pause, then a block of the next; a round is one block of
each, and the order rotates from round to round. Blocks, because a thread pool spins on for a while after its last
call: call by call in turn, each contender would be slowed by the threads of the one before (a library against itself
then reads anything but 1). Rounds, because a slow second then hits all contenders alike: the ratio of two contenders is
taken within a round, and its spread over the rounds tells how far to trust it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

PAUSE = 0.02  # seconds between blocks


@dataclass(frozen=True)
class Protocol:
    """How long to measure. `clock` and `sleep` are replaced in tests; `synchronize` waits for a device to finish."""

    rounds: int = 12
    block: float = 0.1
    pause: float = PAUSE
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    synchronize: Callable[[], None] = lambda: None


def seconds_per_call(call: Callable[[], object], calls: int, protocol: Protocol) -> float:
    """The mean time of `calls` calls in a row."""
    protocol.synchronize()
    start = protocol.clock()
    for _ in range(calls):
        call()
    protocol.synchronize()
    return (protocol.clock() - start) / calls


def calls_per_block(call: Callable[[], object], protocol: Protocol) -> int:
    """How many calls fill a block; at least one. Doubling trial runs also serve as the warm-up."""
    calls = 1
    while True:
        seconds = seconds_per_call(call, calls, protocol)
        if seconds * calls >= protocol.block / 4:
            return max(1, round(protocol.block / seconds))
        calls *= 2


def measure(contenders: Mapping[str, Callable[[], object]], protocol: Protocol) -> dict[str, np.ndarray]:
    """Seconds per call of each contender: one array of `protocol.rounds` samples per name."""
    names = list(contenders)
    calls = {name: calls_per_block(contenders[name], protocol) for name in names}
    samples = {name: [] for name in names}
    for round_ in range(protocol.rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            protocol.sleep(protocol.pause)
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
