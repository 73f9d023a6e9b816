"""Times every tile shape of the CUDA kernels, beside what their model predicts: ``python -m benchmarks.tiles``.

`choose` (csrc/cuda/choose.cpp) takes what the model ranks first among the shapes it may use; this shows whether it is
right. A figure is the time of a whole call of one layer, with its large products, divided by the number of steps.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from benchmarks.__main__ import names_from, shape
from benchmarks.cases import CELLS, DTYPES, Shape
from benchmarks.measure import products_of
from benchmarks.suites import GPU

VARIABLE = "FASTRNN_CUDA_TILE"
PASSES = ("forward", "backward")
SECONDS = 0.1  # of a tile, at least
CELL_NAMES = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "gru_reset_before": "gru_reset_before"}  # the op's


@dataclass(frozen=True)
class Measured:
    """`microseconds` of a step, or NaN: the tile cannot take the layer. `path` is what `explain` says of the pass."""

    pass_name: str
    tile: int
    microseconds: float
    path: str
    is_chosen: bool

    def __str__(self):
        mark = "*" if self.is_chosen else " "
        return f"  {self.pass_name:8} {self.tile:3}{mark} {self.microseconds:9.2f} us  {self.path}"


@contextmanager
def forced(value: str):
    """With FASTRNN_CUDA_TILE set."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


class Layer:
    """One layer of one direction, and the calls of its two passes."""

    def __init__(self, cell: str, size: Shape, dtype: torch.dtype, device: str):
        T, B, I, H = size
        gates = CELLS[cell].gates
        self.size, self.cell = size, CELL_NAMES[cell]

        def numbers(*shape):
            return torch.randn(*shape, device=device).mul(0.1).to(dtype)

        states = [numbers(1, B, H), numbers(1, B, H) if cell == "lstm" else None]
        weights = [numbers(gates * H, I), numbers(gates * H, H), numbers(gates * H), numbers(gates * H)]
        self.x = numbers(T, B, I)
        self.inputs = [self.x, *states, weights, 1, None, None, None, self.cell]
        self.outputs = self.forward()
        self.grad_y = torch.randn_like(self.outputs[0])

    def forward(self):
        return torch.ops.fastrnn.layer_forward(*self.inputs, True)

    def backward(self):
        y, _, _, saved, saved_c = self.outputs
        return torch.ops.fastrnn.layer_backward(self.grad_y, None, None, *self.inputs, y, saved, saved_c, [True] * 7)

    def path(self, pass_name: str) -> str:
        """What is said of a pass, without the reason."""
        H = self.size.H
        text = torch.ops.fastrnn.explain(self.x, self.cell, H, H, 1, False, True)
        return re.search(rf"{pass_name}: (.*?); because", text)[1]


def values_for(pass_name: str, layer: Layer) -> list[str]:
    """Of FASTRNN_CUDA_TILE, all that force a tile of one pass."""
    value = "{}," if pass_name == "forward" else ",{}"
    with forced(value.format(10**6)):
        try:
            layer.path(pass_name)
        except RuntimeError as error:
            last = int(re.search(r"expected 0 to (\d+)", str(error))[1])
    return [value.format(tile) for tile in range(last + 1)]


def microseconds(call: Callable, steps: int, seconds: float) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median / steps * 1e6


def measure(layer: Layer, seconds: float = SECONDS) -> Iterator[Measured]:
    """Every tile of both passes, in the order of csrc/cuda/tile_shapes.h."""
    for pass_name in PASSES:
        chosen = layer.path(pass_name)
        for tile, value in enumerate(values_for(pass_name, layer)):
            with forced(value):
                try:
                    path = layer.path(pass_name)
                except RuntimeError as error:
                    yield Measured(pass_name, tile, float("nan"), str(error).splitlines()[0], False)
                    continue
                time = microseconds(getattr(layer, pass_name), layer.size.T, seconds)
            yield Measured(pass_name, tile, time, path, path == chosen)


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__.split("\n\n")[0])
    command.add_argument(
        "--shape", action="append", type=shape, metavar="T,B,I,H", help="(default: those of suite gpu)"
    )
    command.add_argument("--cell", type=names_from(CELLS), default=["lstm", "gru"], help=f"of {', '.join(CELLS)}")
    command.add_argument("--dtype", type=names_from(DTYPES), default=["bfloat16"], help=f"of {', '.join(DTYPES)}")
    command.add_argument("--device", default="cuda", help="(default: %(default)s)")
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("torch sees no CUDA device")
    print("us a step, whole calls divided by T; *: what the rule takes", flush=True)
    for dtype in options.dtype:
        with products_of(dtype):
            for cell in options.cell:
                for size in options.shape or GPU:
                    print(f"{cell}, {dtype}, T,B,I,H = {','.join(map(str, size))}", flush=True)
                    for found in measure(Layer(cell, size, DTYPES[dtype], options.device)):
                        print(found, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
