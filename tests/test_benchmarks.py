"""The benchmark runner: what it counts, the order it measures in, and that what it writes can be read back."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import measure as measuring
from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cases import CELLS, SUITES, Case, Shape, Suite, custom_suite, plan
from benchmarks.limits import Limits
from benchmarks.measure import Result, check_agreement, control_name, difference, flatten, run_case
from benchmarks.peers import FASTRNN, PEERS, OnnxRuntime, Peer, Problem, TorchNN
from benchmarks.records import Run, append_csv, read_csv, rows_of
from benchmarks.table import fastest, format_time, group_by_case, is_unsettled, print_notes
from benchmarks.timing import Protocol, Ratio, calls_per_block, measure

RUN = Run("2026-01-02T03:04:05+00:00", "abc123-dirty", "0.1", "2.13", "A CPU, with a comma", "avx2", "")
SHAPE = Shape(4, 3, 5, 6)


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

    def protocol(self, **options):
        return Protocol(clock=lambda: self.now, sleep=self.sleep, **options)


# Cases


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
    cases = plan(custom_suite(shapes), ["gru", "rnn"], ["step", "training"], "float64", "cpu", 1)
    assert len(cases) == len(set(cases)) == 2 * (1 + 2)
    assert {case.shape for case in cases if case.mode == "step"} == {Shape(1, 1, 2, 2)}
    assert {case.dtype for case in cases} == {"float64"}


def test_the_full_suite_contains_the_latency_and_training_suites():
    def cases(name):
        return set(plan(SUITES[name], ["lstm", "gru", "rnn"], None, "float32", "cpu", 2))

    assert cases("latency") | cases("training") < cases("full")


# Timing


def test_the_order_rotates_and_every_block_follows_a_pause():
    machine = FakeMachine()
    contenders = {name: machine.contender(name, 1.0) for name in "abc"}
    measure(contenders, machine.protocol(rounds=4, block=1.0))
    trials = list("abc")  # a call as long as a block needs one trial run
    blocks = [name for order in ("abc", "bca", "cab", "abc") for name in order]
    assert machine.log == trials + [entry for name in blocks for entry in ("pause", name)]


def test_a_block_is_filled_with_calls_of_one_contender():
    machine = FakeMachine()
    assert calls_per_block(machine.contender("a", 0.001), machine.protocol(block=0.1)) == 100
    assert calls_per_block(machine.contender("a", 5.0), machine.protocol(block=0.1)) == 1
    machine.log.clear()
    measure({"a": machine.contender("a", 0.01), "b": machine.contender("b", 0.02)}, machine.protocol(rounds=1))
    assert machine.log[-17:] == ["pause", *["a"] * 10, "pause", *["b"] * 5]


def test_samples_are_seconds_per_call_without_the_pauses():
    machine = FakeMachine()
    durations = iter([9.0, 1.0, 3.0, 2.0])  # the first is the trial run
    samples = measure({"a": machine.contender("a", durations)}, machine.protocol(rounds=3))
    np.testing.assert_allclose(samples["a"], [1.0, 3.0, 2.0])


def test_the_clock_is_read_after_the_device_has_finished():
    machine = FakeMachine()

    def synchronize():
        machine.now += 1.0 if machine.log and machine.log[-1] == "a" else 0.0
        machine.log.append("synchronize")

    samples = measure({"a": machine.contender("a", 1.0)}, machine.protocol(rounds=1, synchronize=synchronize))
    np.testing.assert_allclose(samples["a"], [2.0])


def test_a_ratio_is_taken_round_by_round():
    baseline = np.array([1.0, 10.0, 2.0, 4.0, 1.0])
    ratio = Ratio.of(baseline * [2.0, 3.0, 4.0, 5.0, 6.0], baseline)
    assert (ratio.low, ratio.median, ratio.high) == (3.0, 4.0, 5.0)


# Peers


@pytest.mark.parametrize("mode", ["inference", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_onnxruntime_computes_what_torch_computes(cell, mode):
    """And what fastrnn computes where torch has no such cell."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    case = Case(cell, mode, SHAPE._replace(T=1) if mode == "step" else SHAPE)
    problem, truth = Problem.of(case), TorchNN() if case.spec.in_torch else FASTRNN
    ours, theirs = (list(flatten(peer.prepare(problem)())) for peer in (OnnxRuntime(), truth))
    assert len(theirs) == (2 if cell == "lstm" else 1) + (mode == "inference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_training_returns_the_gradients_of_input_and_parameters():
    problem = Problem.of(Case("lstm", "training", SHAPE, "float64"))
    layer = torch.nn.LSTM(5, 6, dtype=torch.float64)
    layer.load_state_dict(problem.weights)
    x = problem.x.clone().requires_grad_()
    y, _ = layer(x)
    (y * problem.grad).sum().backward()
    expected = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert difference(TorchNN().prepare(problem)(), expected) < 1e-12


def test_training_marks_the_parameters_as_changed(monkeypatch):
    problem = Problem.of(Case("gru", "training", SHAPE))
    layer = torch.nn.GRU(5, 6)
    monkeypatch.setattr(torch.nn, "GRU", lambda *sizes: layer)
    call = TorchNN().prepare(problem)
    before = [parameter._version for parameter in layer.parameters()]
    call()
    assert all(parameter._version > old for parameter, old in zip(layer.parameters(), before, strict=True))
    assert difference(layer.state_dict().values(), problem.weights.values()) == 0


def test_every_peer_says_what_it_cannot_run():
    assert PEERS["torch.nn"].obstacle(Case("gru_reset_before", "inference", SHAPE))
    assert PEERS["onnxruntime"].obstacle(Case("lstm", "training", SHAPE))
    assert PEERS["onnxruntime"].obstacle(Case("lstm", "inference", SHAPE, "float64"))
    assert PEERS["torch.compile"].obstacle(Case("lstm", "inference", SHAPE._replace(T=1000)))
    assert PEERS["torch.nn"].obstacle(Case("gru", "inference", SHAPE)) is None


# One case


class Altered(TorchNN):
    """torch.nn with a first output that is off by a factor."""

    name = "altered"

    def prepare(self, problem):
        call = super().prepare(problem)

        def altered():
            first, *others = flatten(call())
            return [first * 1.001, *others]

        return altered


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
    assert not result.times
    assert "fastrnn and altered do not agree: relative difference 1.0e-03, allowed 1e-04" in result.failure


def test_peers_that_cannot_run_are_named_with_the_reason(monkeypatch):
    result = run_against(monkeypatch, Broken(), Missing(), TorchNN())
    assert result.left_out == {"broken": "RuntimeError: no kernel", "missing": "not installed"}
    assert list(result.times) == ["fastrnn", "torch.nn", "torch.nn again"]


def test_without_a_peer_the_control_repeats_ours(monkeypatch):
    result = run_against(monkeypatch)
    assert list(result.times) == ["fastrnn", "fastrnn again"]
    assert not result.failure


def test_a_failure_of_ours_ends_the_case_with_its_message(monkeypatch):
    result = run_against(monkeypatch, TorchNN(), ours=Broken())
    assert result.failure == "RuntimeError: no kernel"
    assert not result.times


def test_a_zero_tensor_equals_only_zero():
    assert difference([torch.zeros(3)], [torch.zeros(3)]) == 0
    assert difference([torch.tensor([0, 0, 1e-9])], [torch.zeros(3)]) > 1


@pytest.mark.parametrize("wrong", [[torch.ones(2)], [torch.ones(3), torch.ones(3)], [torch.tensor([1, 1, np.nan])]])
def test_missing_misshapen_or_undefined_outputs_differ(wrong):
    assert difference(wrong, [torch.ones(3)]) == float("inf")


def test_agreement_is_judged_by_the_type():
    calls = {"fastrnn": lambda: torch.ones(3), "other": lambda: torch.ones(3) * 1.01}
    check_agreement(calls, "bfloat16")
    with pytest.raises(ValueError, match="other do not agree"):
        check_agreement(calls, "float32")


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


# Records, table, report


def result_of(case: Case, ours: float, peer: float, spread: float = 0.01) -> Result:
    """A result in which fastrnn takes `ours` seconds and torch.nn `peer`, give or take `spread`."""
    wobble = np.array([1 - spread, 1.0, 1 + spread])
    times = {"fastrnn": np.full(3, ours), "torch.nn": peer * wobble, control_name("torch.nn"): peer * wobble}
    return Result(case, times, {"onnxruntime": "inference, only"}, "torch.nn", limit=ours / 4, limit_kind="compute")


def sample_rows():
    shapes = [Shape(100, 1, 64, 64), Shape(100, 1, 128, 128), Shape(128, 16, 128, 128)]
    cases = [Case(cell, "inference", shape) for cell in ("lstm", "gru") for shape in shapes]
    return [row for case in cases for row in rows_of(result_of(case, 1e-4, 3e-4), RUN)]


def test_rows_survive_the_csv(tmp_path):
    rows = sample_rows()
    append_csv(tmp_path / "new" / "results.csv", rows[:4])
    append_csv(tmp_path / "new" / "results.csv", rows[4:])
    assert read_csv(tmp_path / "new" / "results.csv") == rows


def test_a_row_holds_the_figures_of_its_contender():
    ours, peer, control, left_out = rows_of(result_of(Case("lstm", "inference", SHAPE), 1e-4, 3e-4, 0.2), RUN)
    assert (ours.p50, ours.ratio, ours.limit_share) == (100, 1, 0.25)
    assert (peer.p50, peer.baseline, peer.ratio, peer.ratio_q25, peer.ratio_q75) == (300, "fastrnn", 3, 2.7, 3.3)
    assert control.is_control
    assert (control.provider, control.baseline, control.ratio) == ("torch.nn again", "torch.nn", 1)
    assert (left_out.provider, left_out.p50, left_out.note) == ("onnxruntime", None, "inference, only")


def test_only_the_last_run_of_a_case_counts(tmp_path):
    first, second = Case("lstm", "inference", SHAPE), Case("gru", "inference", SHAPE)
    later = replace(RUN, timestamp="2026-02-02T00:00:00+00:00")
    for case, run, ours in ((first, RUN, 1e-4), (second, RUN, 2e-4), (first, later, 5e-4)):
        append_csv(tmp_path / "results.csv", rows_of(result_of(case, ours, 1e-3), run))
    times = {row.cell: row.p50 for row in read_csv(tmp_path / "results.csv") if row.provider == "fastrnn"}
    assert times == {"lstm": 500, "gru": 200}


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        read_csv(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("peer", "spread", "winner"), [(3e-4, 0.01, "fastrnn"), (5e-5, 0.01, "torch.nn"), (1.01e-4, 0.1, "even")]
)
def test_who_is_fastest(peer, spread, winner):
    (case,) = group_by_case(rows_of(result_of(Case("lstm", "inference", SHAPE), 1e-4, peer, spread), RUN))
    assert fastest(case) == winner


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.5, "0.50 us"), (1.234, "1.23 us"), (45.67, "45.7 us"), (789.1, "789 us"), (7890, "7.89 ms"), (2e6, "2.00 s")],
)
def test_times_have_three_digits(us, text):
    assert format_time(us) == text


def test_the_readme_table_comes_from_the_csv(tmp_path):
    append_csv(tmp_path / "results.csv", sample_rows())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # the second time finds the first one's table
        assert report.main([str(tmp_path / "results.csv"), "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert lines.count("| inference | 100,1,64,64 | 100 us (25%), 3.00x | 100 us (25%), 3.00x |") == 1
    assert any("abc123-dirty" in line and "A CPU, with a comma, 1 thread" in line for line in lines)


@pytest.mark.parametrize(("control", "warns"), [(1.05, False), (0.95, False), (1.3, True), (0.7, True)])
def test_an_unsettled_machine_is_pointed_out(control, warns):
    rows = sample_rows()
    off = next(index for index, row in enumerate(rows) if row.is_control)
    rows[off] = replace(rows[off], ratio=control)
    console = Console(record=True, width=160, file=io.StringIO())
    print_notes(console, rows)
    printed = console.export_text()
    low, high = min(control, 1), max(control, 1)
    assert f"torch.nn against itself: 1.00, from {low:.2f} to {high:.2f} over 6 cases." in printed
    assert ("not settled" in printed) == warns
    assert "Without onnxruntime: inference, only (6 cases: lstm inference 100,1,64,64; " in printed


def test_a_time_below_the_limit_is_not_believed():
    row = sample_rows()[0]
    assert is_unsettled(replace(row, limit_share=1.2))
    assert not is_unsettled(replace(row, limit_share=0.9))


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", 2 * (report.BEGIN + report.END)])
def test_a_readme_without_proper_markers_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="must contain"):
        report.update_readme(readme, "table")
    assert readme.read_text() == text


def test_a_failed_case_is_shown_as_failed():
    failed = rows_of(Result(Case("rnn", "inference", SHAPE), failure="do not agree"), RUN)
    assert failed[0].note == "do not agree"
    assert "| inference | 4,3,5,6 | failed |" in report.readme_table(failed)


def test_plots_are_drawn_from_the_rows(tmp_path):
    paths = report.draw_plots(sample_rows(), tmp_path)
    assert [path.name.split("-")[0] for path in paths] == ["time", "ratio"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "shape '1,2,3' is not four positive integers T,B,I,H"),
        (["--cell", "lstm,tree"], "unknown name 'tree'; known: lstm, gru, rnn"),
        (["--peers", "torch"], "unknown name 'torch'; known: torch.nn, onnxruntime"),
        (["--mode", "train"], "unknown name 'train'; known: inference"),
        (["--threads", "0"], "'0' is not a positive number of threads"),
        (["--device", "toaster"], "'toaster' is not a device"),
        (["--suite", "quick", "--shape", "1,2,3,4"], "not allowed with argument --suite"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_measures_and_writes_what_was_asked_for(tmp_path, capsys, monkeypatch):
    brief = Suite((((Shape(2, 1, 3, 4),), ("step", "training")),), ("torch.nn",), rounds=2, block=1e-3)
    monkeypatch.setitem(SUITES, "quick", brief)
    path, threads = tmp_path / "results.csv", torch.get_num_threads()
    try:
        assert main(["--cell", "gru,gru_reset_before", "--threads", "1", "--csv", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read_csv(path)
    expected = {(cell, mode) for cell in ("gru", "gru_reset_before") for mode in ("step", "training")}
    assert {(row.cell, row.mode) for row in rows if row.provider == "fastrnn" and row.p50 > 0} == expected
    assert {row.cell for row in rows if row.note == "torch.nn has no such cell"} == {"gru_reset_before"}
    assert "Control, torch.nn against itself" in capsys.readouterr().out
