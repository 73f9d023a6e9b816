"""What is measured: a cell, a mode of use, a shape and a type; and how much work that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,  # with products rounded to TensorFloat-32, on a GPU; "float32" has exact ones
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Mode:
    """`use` is what a contender does with its layers, `lengths` which rows end early, `metric` what is measured."""

    text: str
    use: str  # "inference", "forward", "training", "update", "loop", "step" or "stream"
    lengths: str = ""  # "shorter", "ragged" or, where every row has all T steps, empty
    metric: str = "time per call"
    layers: int = 1
    directions: int = 1


PEAK_MEMORY = "peak memory"
SINGLE_STEP = ("step", "stream")
CLASSES = 32  # that a step of training tells apart

MODES = {
    "inference": Mode("a whole sequence under torch.no_grad()", "inference"),
    "forward": Mode("a whole sequence, recorded for a backward pass that is not run", "forward"),
    "training": Mode("forward and backward, with the gradients of the input and of every parameter", "training"),
    "step-of-training": Mode(
        "zero_grad, a linear layer, the recurrent one, a linear layer, cross-entropy, backward, clip_grad_norm_, Adam",
        "update",
    ),
    "loop": Mode("training of a cell module, called for one step after another, with its outputs stacked", "loop"),
    "lengths": Mode("training, one row a step shorter than the others", "training", lengths="shorter"),
    "ragged": Mode("training, lengths spread evenly from T down to T/4", "training", lengths="ragged"),
    "ragged-inference": Mode("inference, lengths spread evenly from T down to T/4", "inference", lengths="ragged"),
    "stack": Mode("training, two layers of two directions", "training", layers=2, directions=2),
    "stack-inference": Mode("inference, two layers of two directions", "inference", layers=2, directions=2),
    "step": Mode("one time step of a cell module under torch.no_grad()", "step"),
    "stream": Mode("one time step, the state carried from call to call, under torch.no_grad()", "stream"),
    "inference-memory": Mode(
        "peak memory of inference over what inputs and parameters hold", "inference", metric=PEAK_MEMORY
    ),
    "training-memory": Mode(
        "peak memory of training over what inputs and parameters hold", "training", metric=PEAK_MEMORY
    ),
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
    """One measurement. In the modes "step" and "stream" the shape has T=1."""

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
    def use(self) -> str:
        return MODES[self.mode].use

    @property
    def metric(self) -> str:
        return MODES[self.mode].metric

    @property
    def is_single_step(self) -> bool:
        return self.use in SINGLE_STEP

    @property
    def is_of_cell_modules(self) -> bool:
        """Whether a call of the module is one step."""
        return self.is_single_step or self.use == "loop"

    @property
    def records_gradients(self) -> bool:
        return self.use in ("forward", "training", "update", "loop")

    @property
    def lengths(self) -> list[int] | None:
        """The steps of each row, in no particular order; None where all have T."""
        T, B = self.shape[:2]
        if MODES[self.mode].lengths == "shorter":
            return [T - 1 if row == B // 2 else T for row in range(B)]
        if MODES[self.mode].lengths == "ragged":
            spread = [T - row * (3 * T // 4) // max(B - 1, 1) for row in range(B)]
            return spread[1::2] + spread[::2]
        return None

    @property
    def directions(self) -> int:
        return MODES[self.mode].directions

    @property
    def stack_options(self) -> dict:
        """The keywords of a module with more than one layer and direction."""
        mode = MODES[self.mode]
        return {} if mode.layers == 1 else {"num_layers": mode.layers, "bidirectional": mode.directions == 2}

    @property
    def steps(self) -> int:
        """Time steps of all rows."""
        return self.shape.T * self.shape.B if self.lengths is None else sum(self.lengths)

    @property
    def weights(self) -> int:
        """Elements of the weight matrices, each of which a step multiplies with once."""
        H, mode = self.shape.H, MODES[self.mode]
        inputs = self.shape.I + (mode.layers - 1) * mode.directions * H
        return mode.directions * self.spec.gates * H * (inputs + mode.layers * H)

    @property
    def passes(self) -> int:
        """How often the time loop runs: once forward and, in training, once backward."""
        return 2 if self.use in ("training", "update", "loop") else 1

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products; the backward pass has two products for each forward one."""
        around = self.shape.I**2 + self.directions * self.shape.H * CLASSES if self.use == "update" else 0
        return self.passes * (self.passes + 1) * self.steps * (self.weights + around)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the weights that every time step needs anew; of a cell module also the input weights."""
        H, mode = self.shape.H, MODES[self.mode]
        recurrent = mode.layers * mode.directions * self.spec.gates * H * H
        return (self.weights if self.is_of_cell_modules else recurrent) * self.torch_dtype.itemsize

    @property
    def compulsory_bytes(self) -> int:
        """Bytes of input, output and weights, each counted once per pass."""
        elements = self.steps * (self.shape.I + self.directions * self.shape.H) + self.weights
        return self.passes * elements * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.cell} {self.mode} {self.shape}"
