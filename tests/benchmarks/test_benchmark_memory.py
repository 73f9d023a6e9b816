"""The benchmark runner: peak memory."""

from __future__ import annotations

import pytest
import torch
from benchmark_rows import SHAPE

from benchmarks import measure as measuring
from benchmarks.cases import Case
from benchmarks.measure import run_case
from benchmarks.memory import TINY, peak_in_new_process
from benchmarks.peers import PEERS
from benchmarks.problem import Call, Peer, Problem
from benchmarks.timing import Protocol

MB = 10**6
CASE = Case("gru", "training-memory", SHAPE)


def allocate(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MB // 4)


class Allocating(Peer):
    """Holds 40 MB, and held 200 more, when its call begins; the call's peak is 60 MB on top, not all at once."""

    name, package = "allocating", "torch"

    def prepare(self, problem: Problem) -> Call:
        if problem.case.shape == TINY:
            return Call(lambda: None)
        allocate(200)
        self.held = allocate(40)

        def run():
            allocate(30)
            first = allocate(20)
            second = allocate(40)
            return first, second

        return Call(run)


class Failing(Peer):
    name, package = "failing", "torch"

    def prepare(self, problem: Problem) -> Call:
        raise NotImplementedError("no such thing\nhere")


def test_the_peak_is_what_a_call_holds_at_most():
    assert peak_in_new_process(Allocating(), CASE) == pytest.approx(60 * MB, abs=1 * MB)


def test_what_fails_in_its_process_is_left_out(monkeypatch):
    def peak(peer, case):
        if isinstance(peer, Failing):
            return peak_in_new_process(peer, case)
        return 3 * MB if isinstance(peer, Allocating) else 2 * MB

    monkeypatch.setattr(measuring, "peak_in_new_process", peak)
    result = run_case(CASE, [Failing(), Allocating(), PEERS["fastrnn-bf16"]], None, Protocol())
    assert not result.failure
    assert result.left_out == {
        "failing": "NotImplementedError: no such thing",
        "fastrnn-bf16": "float32 inference only",
    }
    assert result.samples == {"fastrnn": 2e6, "allocating": 3e6, "fastrnn again": 2e6}
