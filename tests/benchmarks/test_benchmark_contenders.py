"""The benchmark runner: that contenders compute the same thing, and what happens to those that cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmark_rows import SHAPE

import fastrnn
from benchmarks import measure as measuring
from benchmarks.cases import CELLS, MODES, Case, Shape
from benchmarks.limits import Limits
from benchmarks.measure import Result, check_agreement, difference, flatten, run_case
from benchmarks.peers import FASTRNN, PEERS, TorchNN
from benchmarks.problem import Call, Peer, Problem
from benchmarks.timing import Protocol

TIMED = [name for name, mode in MODES.items() if mode.metric == "time per call"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("mode", ["inference", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_runtimes_compute_what_torch_computes(cell, mode, runtime):
    """And what fastrnn computes where torch has no such cell."""
    pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    case = Case(cell, mode, SHAPE._replace(T=1) if mode == "step" else SHAPE)
    problem, truth = Problem.of(case), TorchNN() if case.spec.in_torch else FASTRNN
    ours, theirs = (list(flatten(peer.prepare(problem).outputs())) for peer in (PEERS[runtime], truth))
    assert len(theirs) == (2 if cell == "lstm" else 1) + (mode == "inference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("peer", "cell"), [("torch.nn-int8", "lstm"), ("torch.nn-int8", "gru"), ("onnxruntime-int8", "lstm")]
)
def test_peers_with_int8_weights_are_close(peer, cell):
    pytest.importorskip("onnxruntime")
    problem = Problem.of(Case(cell, "inference", Shape(9, 2, 20, 24)))
    with torch.no_grad():
        theirs, exact = (p.prepare(problem).outputs() for p in (PEERS[peer], TorchNN()))
    assert 1e-4 < difference(theirs, exact) < PEERS[peer].tolerance


def test_training_returns_the_gradients_of_input_and_parameters():
    problem = Problem.of(Case("lstm", "training", SHAPE, "float64"))
    layer = torch.nn.LSTM(5, 6, dtype=torch.float64)
    layer.load_state_dict(problem.weights)
    x = problem.x.clone().requires_grad_()
    y, _ = layer(x)
    (y * problem.grad).sum().backward()
    expected = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert difference(TorchNN().prepare(problem).outputs(), expected) < 1e-12


def test_training_marks_the_parameters_as_changed(monkeypatch):
    problem = Problem.of(Case("gru", "training", SHAPE))
    layer = torch.nn.GRU(5, 6)
    monkeypatch.setattr(torch.nn, "GRU", lambda *sizes: layer)
    call = TorchNN().prepare(problem)
    before = [parameter._version for parameter in layer.parameters()]
    call.run()
    assert all(parameter._version > old for parameter, old in zip(layer.parameters(), before, strict=True))
    assert difference(layer.state_dict().values(), problem.weights.values()) == 0


@pytest.mark.parametrize("mode", TIMED)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_fastrnn_agrees_with_torch_in_every_mode(cell, mode):
    shape = Shape(1, 3, 5, 6) if mode in ("step", "stream") else Shape(9, 4, 5, 6)
    problem = Problem.of(Case(cell, mode, shape))
    ours, theirs = (list(flatten(peer.prepare(problem).outputs())) for peer in (FASTRNN, TorchNN()))
    assert len(ours) >= 2 or (cell, mode) in (("gru", "step"), ("rnn", "step"))
    assert difference(ours, theirs) < 1e-5


def test_rows_that_end_early_are_compared_with_their_zeros():
    problem = Problem.of(Case("gru", "ragged", Shape(9, 4, 5, 6)))
    y, (dx, *_) = TorchNN().prepare(problem).outputs()
    ended = torch.arange(9)[:, None] >= problem.lengths
    assert y.shape == (9, 4, 6)
    assert ended.any()
    for tensor in (y, dx):
        assert (tensor[ended] == 0).all()
        assert (tensor[~ended] != 0).any()


def test_a_stream_carries_the_state_and_is_compared_from_its_start():
    problem = Problem.of(Case("lstm", "stream", Shape(1, 3, 5, 6)))
    call = TorchNN().prepare(problem)
    first = call.outputs()
    layer = torch.nn.LSTM(5, 6)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in problem.weights.items()})
    expected, _ = layer(problem.x.expand(len(first), -1, -1))
    assert difference(first, expected.unbind()) < 1e-6
    call.run()
    assert difference(call.outputs(), first) == 0


class Streaming(torch.nn.Module):
    """A stand-in for fastrnn's modules that has the options and the stream of variants."""

    def __init__(self, name: str, *sizes: int, **options):
        super().__init__()
        self.layer, self.options = getattr(torch.nn, name)(*sizes), options

    def load_state_dict(self, weights):
        return self.layer.load_state_dict(weights)

    def parameters(self):
        return self.layer.parameters()

    def forward(self, x, hx=None):
        return self.layer(x, hx)

    def stream(self, batch: int):
        return Step(self.layer, batch)


class Step:
    def __init__(self, layer: torch.nn.RNNBase, batch: int):
        self.layer, self.batch = layer, batch
        self.reset()

    def reset(self):
        self.state = None

    def __call__(self, x):
        assert len(x) == self.batch
        y, self.state = self.layer(x[None], self.state)
        return y[0]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("fastrnn-bf16", "inference", {"weights": "bf16"}),
        ("fastrnn-int8", "inference", {"weights": "int8"}),
        ("fastrnn-recompute", "training", {"recompute": True}),
        ("fastrnn-stream", "stream", {}),
        ("fastrnn-module", "step", {}),
        ("fastrnn-packed", "ragged", {}),
        ("fastrnn-packed", "ragged-inference", {}),
        ("fastrnn-4t", "training", {}),
    ],
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_variants_use_fastrnn_in_their_way(cell, name, mode, options, monkeypatch, threads):
    made = []

    def module(*sizes, **options):
        made.append(Streaming(CELLS[cell].module, *sizes, **options))
        return made[-1]

    monkeypatch.setattr(fastrnn, CELLS[cell].module, module)
    case = Case(cell, mode, Shape(1, 3, 5, 6) if mode in ("step", "stream") else SHAPE)
    problem = Problem.of(case)
    assert PEERS[name].obstacle(case) is None
    call = PEERS[name].prepare(problem)
    call.run()
    assert difference(call.outputs(), TorchNN().prepare(problem).outputs()) < 1e-6
    assert [module.options for module in made] == [options]
    assert call.threads == (4 if name == "fastrnn-4t" else None)


def test_each_contender_is_checked_and_timed_with_its_threads(monkeypatch, threads):
    threads(3)
    counts = {"fastrnn": set(), "many": set()}

    def counting(name: str, number: int | None) -> Peer:
        peer = TorchNN()
        peer.name = name

        def prepare(problem):
            call = TorchNN().prepare(problem)
            return Call(lambda: (counts[name].add(torch.get_num_threads()), call.run())[1], threads=number)

        peer.prepare = prepare
        return peer

    run_against(monkeypatch, counting("many", 2), ours=counting("fastrnn", None))
    assert counts == {"fastrnn": {1}, "many": {2}}
    assert torch.get_num_threads() == 3


def test_every_peer_says_what_it_cannot_run():
    assert PEERS["torch.nn"].obstacle(Case("gru_reset_before", "inference", SHAPE))
    assert PEERS["onnxruntime"].obstacle(Case("lstm", "training", SHAPE))
    assert PEERS["onnxruntime"].obstacle(Case("lstm", "inference", SHAPE, "float64"))
    assert PEERS["torch.compile"].obstacle(Case("lstm", "inference", SHAPE._replace(T=1000)))
    assert PEERS["torch.compile"].obstacle(Case("lstm", "lengths", SHAPE))
    assert PEERS["fastrnn-bf16"].obstacle(Case("lstm", "training", SHAPE))
    assert PEERS["fastrnn-bf16"].obstacle(Case("lstm", "inference", SHAPE, "float64"))
    assert PEERS["fastrnn-int8"].obstacle(Case("lstm", "training", SHAPE))
    assert PEERS["fastrnn-bf16-products"].obstacle(Case("lstm", "training", SHAPE, "float64"))
    assert PEERS["openvino"].obstacle(Case("lstm", "training", SHAPE))
    assert PEERS["torch.nn-int8"].obstacle(Case("rnn", "inference", SHAPE))
    assert PEERS["onnxruntime-int8"].obstacle(Case("gru", "inference", SHAPE))
    assert PEERS["fastrnn-stream"].obstacle(Case("lstm", "step", SHAPE))
    assert PEERS["fastrnn-module"].obstacle(Case("lstm", "stream", SHAPE))
    assert PEERS["fastrnn-recompute"].obstacle(Case("lstm", "inference", SHAPE))
    assert PEERS["fastrnn-packed"].obstacle(Case("lstm", "inference", SHAPE))
    assert PEERS["torch.nn-fp16"].obstacle(Case("lstm", "inference", SHAPE))
    assert PEERS["torch.nn-fp16"].obstacle(Case("lstm", "inference", SHAPE, "bfloat16")) is None
    assert PEERS["torch.nn"].obstacle(Case("gru", "inference", SHAPE)) is None


# One case


class Altered(TorchNN):
    """torch.nn with a first output that is off by a factor."""

    name = "altered"

    def prepare(self, problem):
        call = super().prepare(problem)

        def altered():
            first, *others = flatten(call.outputs())
            return [first * 1.001, *others]

        return Call(altered)


class Broken(TorchNN):
    name = "broken"

    def prepare(self, problem):
        raise RuntimeError("no kernel\nand a long trace")


class Missing(TorchNN):
    name = "missing"
    package = "a-package-that-is-not-installed"


class NoLimits(Limits):
    def __init__(self):
        pass

    def of(self, case):
        return 1e-9, "compute"


def run_against(monkeypatch, *peers: Peer, ours: Peer | None = None) -> Result:
    """A case measured briefly, with torch.nn in fastrnn's place."""
    stand_in = ours or TorchNN()
    stand_in.name = "fastrnn"
    monkeypatch.setattr(measuring, "FASTRNN", stand_in)
    return run_case(Case("gru", "inference", SHAPE), list(peers), NoLimits(), Protocol(rounds=2, block=1e-4, pause=0))


def test_a_case_with_a_different_result_is_not_timed(monkeypatch):
    result = run_against(monkeypatch, Altered())
    assert not result.samples
    assert "fastrnn and altered do not agree: relative difference 1.0e-03, allowed 1e-04" in result.failure


def test_a_peer_may_have_a_tolerance_of_its_own(monkeypatch):
    peer = Altered()
    peer.tolerance = 1e-2
    assert run_against(monkeypatch, peer).samples


def test_peers_that_cannot_run_are_named_with_the_reason(monkeypatch):
    result = run_against(monkeypatch, Broken(), Missing(), TorchNN())
    assert result.left_out == {"broken": "RuntimeError: no kernel", "missing": "not installed"}
    assert list(result.samples) == ["fastrnn", "torch.nn", "torch.nn again"]


def test_without_a_peer_the_control_repeats_ours(monkeypatch):
    result = run_against(monkeypatch)
    assert list(result.samples) == ["fastrnn", "fastrnn again"]
    assert not result.failure


def test_a_failure_of_ours_ends_the_case_with_its_message(monkeypatch):
    result = run_against(monkeypatch, TorchNN(), ours=Broken())
    assert result.failure == "RuntimeError: no kernel"
    assert not result.samples


def test_a_zero_tensor_equals_only_zero():
    assert difference([torch.zeros(3)], [torch.zeros(3)]) == 0
    assert difference([torch.tensor([0, 0, 1e-9])], [torch.zeros(3)]) > 1


@pytest.mark.parametrize("wrong", [[torch.ones(2)], [torch.ones(3), torch.ones(3)], [torch.tensor([1, 1, np.nan])]])
def test_missing_misshapen_or_undefined_outputs_differ(wrong):
    assert difference(wrong, [torch.ones(3)]) == float("inf")


def test_agreement_is_judged_by_the_type():
    calls = {"fastrnn": Call(lambda: torch.ones(3)), "other": Call(lambda: torch.ones(3) * 1.01)}
    check_agreement(calls, Case("gru", "inference", SHAPE, "bfloat16"), {})
    with pytest.raises(ValueError, match="other do not agree"):
        check_agreement(calls, Case("gru", "inference", SHAPE), {})
