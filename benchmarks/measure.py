"""One case from start to end: prepare the contenders, check that they agree, time them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.limits import Limits
from benchmarks.peers import FASTRNN, Peer, Problem
from benchmarks.timing import Protocol, measure

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # relative, in the Euclidean norm


@dataclass
class Result:
    """What came out of a case.

    `times` holds seconds per call and round of fastrnn, each peer, and the control: a second instance of one of them,
    named by `control_name`. `failure` says why there are none.
    """

    case: Case
    times: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> reason
    controlled: str = ""  # the contender that the control repeats
    limit: float = 0.0  # seconds
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


def prepare_peers(problem: Problem, peers: list[Peer], result: Result) -> dict[str, Callable[[], object]]:
    """The peers' calls, each run once; what cannot run goes to `result.left_out` with the reason."""
    calls = {}
    for peer in peers:
        reason = "not installed" if peer.version is None else peer.obstacle(problem.case)
        if reason is None:
            try:
                call = peer.prepare(problem)
                call()
                calls[peer.name] = call
            except Exception as error:  # a peer may fail in any way; the run goes on and says so
                reason = first_line(error)
        if reason is not None:
            result.left_out[peer.name] = reason
    return calls


def check_agreement(calls: dict[str, Callable[[], object]], dtype: str) -> None:
    """Raises ValueError where a peer's outputs differ from fastrnn's by more than the type's tolerance."""
    ours = calls[FASTRNN.name]()
    for name, call in calls.items():
        error = difference(ours, call())
        if error > TOLERANCE[dtype]:
            raise ValueError(
                f"fastrnn and {name} do not agree: relative difference {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"
            )


def run_case(case: Case, peers: list[Peer], limits: Limits, protocol: Protocol) -> Result:
    """Measures a case. Raises nothing that a contender raises: `Result.failure` and `Result.left_out` tell it."""
    result = Result(case)
    problem = Problem.of(case)
    try:
        calls = {FASTRNN.name: FASTRNN.prepare(problem)} | prepare_peers(problem, peers, result)
        controlled = next((peer for peer in peers if peer.name in calls), FASTRNN)
        calls[control_name(controlled.name)] = controlled.prepare(problem)
        check_agreement(calls, case.dtype)
        result.limit, result.limit_kind = limits.of(case)
        result.times = measure(calls, protocol)
    except Exception as error:
        result.failure = str(error) if isinstance(error, ValueError) else first_line(error)
    result.controlled = controlled.name if result.times else ""
    return result
