"""One case from start to end: prepare the contenders, check that they agree, time them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import PEAK_MEMORY, Case
from benchmarks.limits import Limits
from benchmarks.memory import peak_in_new_process
from benchmarks.peers import FASTRNN
from benchmarks.problem import Call, Peer, Problem
from benchmarks.timing import Protocol, measure

TOLERANCE = {  # relative, in the Euclidean norm
    "float64": 1e-10,
    "float32": 1e-4,
    "tf32": 1e-2,  # as many bits as float16
    "float16": 1e-2,
    "bfloat16": 5e-2,
}
GPU_FACTOR = 2  # there the peer, too, carries rounded numbers from step to step, for up to 1024 steps


@dataclass
class Result:
    """What came out of a case.

    `samples` holds seconds per call and round, or bytes, of fastrnn, each peer, and the control: a second instance of
    one of them, named by `control_name`. `failure` says why there are none.
    """

    case: Case
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> reason
    controlled: str = ""  # the contender that the control repeats
    limit: float = 0.0  # seconds; 0: not known
    limit_kind: str = ""
    failure: str = ""


def control_name(name: str) -> str:
    return f"{name} again"


def flatten(outputs: object) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from flatten(output)


def difference(outputs: object, expected: object) -> float:
    """The largest relative difference, |a - b| / |b| in the Euclidean norm, over corresponding tensors.

    Infinite where number or shapes of the tensors differ, or a value is not finite.
    """
    actual, wanted = ([tensor.double() for tensor in flatten(tensors)] for tensors in (outputs, expected))
    if [a.shape for a in actual] != [b.shape for b in wanted]:
        return float("inf")
    # A gradient may be exactly zero, such as that of the recurrent weights after a single step from the zero state.
    errors = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(actual, wanted, strict=True)])
    return errors.max().item() if errors.isfinite().all() else float("inf")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def obstacle_to(peer: Peer, case: Case) -> str | None:
    """Why a peer cannot run a case, as far as can be said beforehand."""
    return "not installed" if peer.version is None else peer.obstacle(case)


def enter(call: Call, case: Case) -> None:
    """Sets the threads that a call wants."""
    torch.set_num_threads(call.threads or case.threads)


@contextmanager
def products_of(dtype: str) -> Iterator[None]:
    """While it lasts, float32 products on a GPU, cuDNN's too, are rounded to TensorFloat-32 for "tf32" alone."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = dtype == "tf32"
        yield
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


def prepare_peers(problem: Problem, peers: list[Peer], result: Result) -> dict[str, Call]:
    """The peers' calls, each run once; what cannot run goes to `result.left_out` with the reason."""
    calls = {}
    for peer in peers:
        reason = obstacle_to(peer, problem.case)
        if reason is None:
            try:
                call = peer.prepare(problem)
                enter(call, problem.case)
                call.run()
                calls[peer.name] = call
            except Exception as error:  # a peer may fail in any way; the run goes on and says so
                reason = first_line(error)
        if reason is not None:
            result.left_out[peer.name] = reason
    return calls


def check_agreement(calls: dict[str, Call], case: Case, tolerances: Mapping[str, float | None]) -> None:
    """Raises ValueError where outputs differ from fastrnn's by more than the type's tolerance, or the peer's own."""
    usual = TOLERANCE[case.dtype] * (GPU_FACTOR if torch.device(case.device).type == "cuda" else 1)
    ours = None
    for name, call in calls.items():
        enter(call, case)
        outputs = list(flatten(call.outputs()))
        ours = outputs if ours is None else ours
        error, allowed = difference(ours, outputs), tolerances.get(name) or usual
        if error > allowed:
            raise ValueError(f"fastrnn and {name} do not agree: relative difference {error:.1e}, allowed {allowed:.0e}")


def run_case(case: Case, peers: list[Peer], limits: Limits, protocol: Protocol) -> Result:
    """Measures a case. Raises nothing that a contender raises: `Result.failure` and `Result.left_out` tell it."""
    result = Result(case)
    threads = torch.get_num_threads()
    try:
        if case.metric == PEAK_MEMORY:
            measure_memory(result, peers)
        else:
            with torch.set_grad_enabled(case.records_gradients), products_of(case.dtype):
                measure_times(result, peers, limits, protocol)
    except Exception as error:
        result.failure = str(error) if isinstance(error, ValueError) else first_line(error)
    finally:
        torch.set_num_threads(threads)
    return result


def measure_times(result: Result, peers: list[Peer], limits: Limits, protocol: Protocol) -> None:
    """Seconds per call: one sample per contender and round."""
    case = result.case
    torch.set_num_threads(case.threads)
    problem = Problem.of(case)
    calls = {FASTRNN.name: FASTRNN.prepare(problem)} | prepare_peers(problem, peers, result)
    controlled = next((peer for peer in peers if peer.name in calls), FASTRNN)
    calls[control_name(controlled.name)] = controlled.prepare(problem)
    tolerances = {peer.name: peer.tolerance for peer in peers}
    check_agreement(calls, case, tolerances | {control_name(controlled.name): controlled.tolerance})
    torch.set_num_threads(case.threads)
    result.limit, result.limit_kind = limits.of(case)
    runs = {name: call.run for name, call in calls.items()}
    result.samples = measure(runs, protocol, before=lambda name: enter(calls[name], case))
    result.controlled = controlled.name


def measure_memory(result: Result, peers: list[Peer]) -> None:
    """Bytes at the peak: one sample per contender, as little differs from one process to the next.

    The processes run at the same time, which is no disturbance: nothing is timed.
    """
    case = result.case
    obstacles = {peer.name: obstacle_to(peer, case) for peer in peers}
    result.left_out = {name: reason for name, reason in obstacles.items() if reason is not None}
    able = [FASTRNN, *(peer for peer in peers if peer.name not in result.left_out)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        peaks = {peer.name: pool.submit(peak_in_new_process, peer, case) for peer in able}
        peaks[control_name(FASTRNN.name)] = pool.submit(peak_in_new_process, FASTRNN, case)
    for name, peak in peaks.items():
        error = peak.exception()
        if error is None:
            result.samples[name] = np.array([max(peak.result(), 1.0)])
        elif name in (FASTRNN.name, control_name(FASTRNN.name)):
            raise error
        else:
            result.left_out[name] = first_line(error)
    result.controlled = FASTRNN.name
