"""The benchmark runner: the order it measures in, its pauses, and how it takes ratios."""

from __future__ import annotations

import numpy as np

from benchmarks.timing import MIN_ROUNDS, Protocol, Ratio, measure, rest, trial


class FakeMachine:
    """A clock that stands still except where a contender works or the protocol pauses; it logs both."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def contender(self, name, seconds):
        """A call that takes `seconds`, or the next of several when it is an iterator."""

        def call():
            self.log.append(name)
            self.now += seconds if isinstance(seconds, float) else next(seconds)

        return call

    def sleep(self, seconds):
        self.log.append("pause")
        self.now += seconds

    def stopwatch(self):
        start = self.now
        return lambda: self.now - start

    def protocol(self, **options):
        fakes = {"stopwatch": self.stopwatch, "cpu_clock": lambda: 0.0, "sleep": self.sleep}
        return Protocol(**fakes | options)


def test_the_order_rotates_and_every_block_follows_a_pause():
    machine = FakeMachine()
    contenders = {name: machine.contender(name, 1.0) for name in "abc"}
    measure(contenders, machine.protocol(rounds=4, block=1.0))
    trials = list("abc")  # a call as long as a block needs one trial run
    blocks = [name for order in ("abc", "bca", "cab", "abc") for name in order]
    assert machine.log == trials + [entry for name in blocks for entry in ("pause", name)]


def test_a_block_is_filled_with_calls_of_one_contender():
    machine = FakeMachine()
    assert trial(machine.contender("a", 0.001), machine.protocol(block=0.1))[0] == 100
    assert trial(machine.contender("a", 5.0), machine.protocol(block=0.1)) == (1, 5.0)
    machine.log.clear()
    measure({"a": machine.contender("a", 0.01), "b": machine.contender("b", 0.02)}, machine.protocol(rounds=1))
    assert machine.log[-17:] == ["pause", *["a"] * 10, "pause", *["b"] * 5]


def test_samples_are_seconds_per_call_without_the_pauses():
    machine = FakeMachine()
    durations = iter([9.0, 1.0, 3.0, 2.0])  # the first is the trial run
    samples = measure({"a": machine.contender("a", durations)}, machine.protocol(rounds=3))
    np.testing.assert_allclose(samples["a"], [1.0, 3.0, 2.0])


def test_a_ratio_is_taken_round_by_round():
    baseline = np.array([1.0, 10.0, 2.0, 4.0, 1.0])
    ratio = Ratio.of(baseline * [2.0, 3.0, 4.0, 5.0, 6.0], baseline)
    assert (ratio.low, ratio.median, ratio.high) == (3.0, 4.0, 5.0)


def test_a_pause_lasts_until_no_thread_is_busy():
    machine = FakeMachine()
    spinning_until = 0.05
    protocol = machine.protocol(pause=0.02, cpu_clock=lambda: min(machine.now, spinning_until))
    rest(protocol)
    assert machine.log == ["pause"] * 4  # the third ends at 0.06, and half of it was busy
    machine.log.clear()
    rest(machine.protocol(cpu_clock=lambda: machine.now))
    assert 1 < len(machine.log) <= 50


def test_slow_contenders_are_measured_in_fewer_rounds():
    machine = FakeMachine()
    for budget, rounds in ((1e9, 12), (8 * 2.5, 8), (1.0, MIN_ROUNDS)):
        contenders = {"a": machine.contender("a", 1.0), "b": machine.contender("b", 1.0)}
        samples = measure(contenders, machine.protocol(rounds=12, budget=budget))
        assert len(samples["a"]) == len(samples["b"])
        assert abs(len(samples["a"]) - rounds) <= 1


def test_a_contender_is_made_ready_before_its_trial_and_each_block():
    machine = FakeMachine()
    contenders = {name: machine.contender(name, 1.0) for name in "ab"}
    measure(contenders, machine.protocol(rounds=1), before=lambda name: machine.log.append(f"before {name}"))
    assert machine.log == ["before a", "a", "before b", "b", "pause", "before a", "a", "pause", "before b", "b"]
