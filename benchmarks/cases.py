"""What is measured: a cell, a mode of use, a shape and a type; and how much work that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

MODES = {
    "inference": "a whole sequence under torch.no_grad()",
    "forward": "a whole sequence, recorded for a backward pass that is not run",
    "training": "forward and backward, with the gradients of the input and of every parameter",
    "step": "one time step of a cell module under torch.no_grad()",
}


@dataclass(frozen=True)
class Cell:
    """How a cell is called. `module` is the class name in both torch.nn and fastrnn; a "Cell" is added for one step."""

    module: str
    gates: int
    options: dict = field(default_factory=dict)  # keywords that torch.nn does not have

    @property
    def in_torch(self) -> bool:
        return not self.options


CELLS = {
    "lstm": Cell("LSTM", gates=4),
    "gru": Cell("GRU", gates=3),
    "rnn": Cell("RNN", gates=1),
    "gru_reset_before": Cell("GRU", gates=3, options={"reset_after": False}),
}


class Shape(NamedTuple):
    """Steps T, batch B, input size I, hidden size H."""

    T: int
    B: int
    I: int
    H: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"T,B,I,H"`` to a shape. Raises ValueError for anything else than four positive integers."""
        try:
            sizes = [int(size) for size in text.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"shape {text!r} is not four positive integers T,B,I,H such as 100,1,128,128")
        return cls(*sizes)

    def __str__(self) -> str:
        return ",".join(map(str, self))


@dataclass(frozen=True)
class Case:
    """One measurement. In mode "step" the shape has T=1."""

    cell: str
    mode: str
    shape: Shape
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    @property
    def spec(self) -> Cell:
        return CELLS[self.cell]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def passes(self) -> int:
        """How often the time loop runs: once forward and, in training, once backward."""
        return 2 if self.mode == "training" else 1

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products; the backward pass has two products for each forward one."""
        T, B, _, H = self.shape
        forward = 2 * T * B * self.spec.gates * H * (self.shape.I + H)
        return 3 * forward if self.mode == "training" else forward

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the weights that every time step needs anew; for a single step also the input weights."""
        H = self.shape.H
        columns = self.shape.I + H if self.mode == "step" else H
        return self.spec.gates * H * columns * self.torch_dtype.itemsize

    @property
    def compulsory_bytes(self) -> int:
        """Bytes of input, output and weights, each counted once per pass."""
        T, B, _, H = self.shape
        elements = (T * B + self.spec.gates * H) * (self.shape.I + H)
        return self.passes * elements * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.cell} {self.mode} {self.shape}"


@dataclass(frozen=True)
class Suite:
    """Groups of (shapes, modes), in each of which every cell runs; the rest fits the time it may take."""

    groups: tuple[tuple[tuple[Shape, ...], tuple[str, ...]], ...]
    peers: tuple[str, ...] = ("torch.nn", "onnxruntime")
    rounds: int = 12
    block: float = 0.1  # seconds


LATENCY = tuple(Shape(100, 1, H, H) for H in (64, 128, 256, 512, 1024))
TRAINING = (
    Shape(128, 16, 128, 128),
    Shape(128, 32, 256, 256),
    Shape(100, 64, 512, 512),
    Shape(512, 32, 128, 128),
    Shape(50, 64, 1024, 1024),
)
QUICK = (Shape(100, 1, 128, 128), Shape(128, 16, 128, 128))

SUITES = {
    "quick": Suite(((QUICK, ("inference", "training")), (QUICK[:1], ("step",))), ("torch.nn",), rounds=8, block=0.05),
    "latency": Suite(((LATENCY, ("inference", "step")),)),
    "training": Suite(((TRAINING, ("training",)),)),
    "full": Suite(((LATENCY + TRAINING, ("inference", "training")), (LATENCY, ("step",)))),
}


def custom_suite(shapes: list[Shape]) -> Suite:
    """The suite of shapes given by hand."""
    return Suite(((tuple(shapes), ("inference", "training")),))


def plan(suite: Suite, cells: list[str], modes: list[str] | None, dtype: str, device: str, threads: int) -> list[Case]:
    """The cases of a suite, mode by mode, without repetition. `modes` replaces the modes that the suite would run."""
    cases = [
        Case(cell, mode, shape._replace(T=1) if mode == "step" else shape, dtype, device, threads)
        for shapes, own_modes in suite.groups
        for mode in modes or own_modes
        for cell in cells
        for shape in shapes
    ]
    return list(dict.fromkeys(cases))
