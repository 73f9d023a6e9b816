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

PAUSE = 0.02  # seconds between blocks, at least
QUIET = 0.1  # of a core: this process rests when its threads used less than that in a pause
MAX_PAUSES = 50
MIN_ROUNDS = 4


@dataclass(frozen=True)
class Protocol:
    """How long to measure. `clock`s and `sleep` are replaced in tests; `synchronize` waits for a device to finish.

    Of slow contenders there are fewer rounds, as many as fit `budget` seconds.
    """

    rounds: int = 12
    block: float = 0.1
    budget: float = math.inf
    pause: float = PAUSE
    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.process_time  # seconds of all threads of this process
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
