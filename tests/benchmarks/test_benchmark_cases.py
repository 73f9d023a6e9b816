"""The benchmark runner: what a case is, how much work it counts, and the limits of the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmark_rows import SHAPE

from benchmarks.cases import Case, Shape
from benchmarks.limits import Limits
from benchmarks.suites import SUITES, custom_suite, plan

CELLS = ["lstm", "gru", "rnn"]


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2,3,0", "-1,2,3,4", "", "1.5,2,3,4"])
def test_a_bad_shape_is_refused(text):
    with pytest.raises(ValueError, match="not four positive integers T,B,I,H"):
        Shape.parse(text)


def test_a_shape_survives_text():
    assert Shape.parse(str(Shape(100, 1, 64, 128))) == Shape(T=100, B=1, I=64, H=128)


@pytest.mark.parametrize(("cell", "module"), [("lstm", "LSTMCell"), ("gru", "GRUCell"), ("rnn", "RNNCell")])
def test_flops_are_those_that_torch_counts(cell, module):
    from torch.utils.flop_counter import FlopCounterMode

    layer = getattr(torch.nn, module)(SHAPE.I, SHAPE.H)
    x = torch.randn(SHAPE[:3], requires_grad=True)
    state = torch.randn(SHAPE.B, SHAPE.H, requires_grad=True)
    state = (state, state) if cell == "lstm" else state
    with FlopCounterMode(display=False) as forward:
        for step in x:
            h = layer(step, state)
            state = h
    with FlopCounterMode(display=False) as backward:
        (h[0] if cell == "lstm" else h).sum().backward()
    assert Case(cell, "inference", SHAPE).flops == forward.get_total_flops()
    assert Case(cell, "training", SHAPE).flops == forward.get_total_flops() + backward.get_total_flops()


def test_recurrent_bytes_are_those_of_the_parameters():
    layer = torch.nn.LSTM(5, 6, dtype=torch.float64)
    assert Case("lstm", "inference", SHAPE, "float64").recurrent_bytes == layer.weight_hh_l0.nbytes
    both = layer.weight_hh_l0.nbytes + layer.weight_ih_l0.nbytes
    assert Case("lstm", "step", SHAPE, "float64").recurrent_bytes == both


def test_a_plan_has_every_combination_once():
    shapes = [Shape(7, 1, 2, 2), Shape(9, 1, 2, 2), Shape(7, 1, 2, 2)]
    cases = plan(custom_suite(shapes), ["gru", "rnn"], ["step", "training"], ["float64"], "cpu", 1)
    assert len(cases) == len(set(cases)) == 2 * (1 + 2)
    assert {case.shape for case in cases if case.mode == "step"} == {Shape(1, 1, 2, 2)}
    assert {case.dtype for case in cases} == {"float64"}


def test_the_full_suite_contains_the_latency_and_training_suites():
    def cases(name):
        return set(plan(SUITES[name], ["lstm", "gru", "rnn"], None, ["float32"], "cpu", 2))

    assert cases("latency") | cases("training") < cases("full")


# Limits


def limits_with(threads: int) -> Limits:
    """Limits of a machine with 1 GFLOP/s, and a read rate of 1 GB/s below 10 MB and 0.1 GB/s above."""
    limits = Limits("cpu", threads)
    limits.peak_flops = lambda dtype: 1e9
    limits.read_rate = lambda size: 1e9 if size < 10e6 else 1e8
    return limits


def test_the_limit_is_the_larger_of_compute_and_memory():
    large = Case("rnn", "inference", Shape(10, 1, 2048, 2048))  # 16.8 MB, 83.9 MFLOP
    assert limits_with(1).of(large) == (pytest.approx(10 * 4 * 2048**2 / 1e8), "memory")
    batched = replace(large, shape=Shape(10, 100, 2048, 2048))
    assert limits_with(1).of(batched) == (pytest.approx(batched.flops / 1e9), "compute")


def test_weights_in_a_cores_own_cache_have_no_memory_limit():
    case = Case("rnn", "inference", Shape(10, 1, 1, 600))  # 1.44 MB
    assert limits_with(1).of(case)[1] == "memory"
    assert limits_with(2).of(case)[1] == "compute"


def test_the_measured_rates_are_physically_possible():
    limits = Limits("cpu", 1)
    assert 1e8 < limits.read_rate(4 * 2**20) < 1e13
    # 6 GHz, two units, 16 lanes, two operations: no core does a teraflop. And no product runs above the peak.
    assert 1e8 < limits.peak_flops("float32") < 1e12
    assert 1e8 < limits.peak_flops("float64") < limits.peak_flops("float32") * 1.5
