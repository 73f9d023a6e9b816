"""Made-up results and rows for the tests of the benchmark runner."""

from __future__ import annotations

import numpy as np

from benchmarks.cases import Case, Shape
from benchmarks.measure import Result, control_name
from benchmarks.records import Row, Run, rows_of

RUN = Run("2026-01-02T03:04:05+00:00", "abc123-dirty", "0.1", "2.13", "A CPU, with a comma", "avx2", "")
SHAPE = Shape(4, 3, 5, 6)


def result_of(case: Case, ours: float, peer: float, spread: float = 0.01, **others: float) -> Result:
    """A result in which fastrnn takes `ours` seconds, torch.nn `peer`, give or take `spread`, and `others` their own.

    An underscore in a name stands for a hyphen.
    """
    wobble = np.array([1 - spread, 1.0, 1 + spread])
    samples = {"fastrnn": np.full(3, ours), "torch.nn": peer * wobble}
    samples |= {name.replace("_", "-"): np.full(3, seconds) for name, seconds in others.items()}
    samples[control_name("torch.nn")] = peer * wobble
    left_out = {} if "onnxruntime" in others else {"onnxruntime": "inference, only"}
    return Result(case, samples, left_out, "torch.nn", limit=ours / 4, limit_kind="compute")


def sample_rows() -> list[Row]:
    shapes = [Shape(100, 1, 64, 64), Shape(100, 1, 128, 128), Shape(128, 16, 128, 128)]
    cases = [Case(cell, "inference", shape) for cell in ("lstm", "gru") for shape in shapes]
    return [row for case in cases for row in rows_of(result_of(case, 1e-4, 3e-4), RUN)]
