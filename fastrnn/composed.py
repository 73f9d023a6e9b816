"""One layer of which the kernels' weights are computed of the parameters: of a system that is no cell by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import _C, layers, readers
from fastrnn.recurrent import _check_size, _Module
from fastrnn.reference import Weights
from fastrnn.signatures import Given, Input, Result


class Composed(_Module, layers.Layers):
    """A layer of one direction, with all that goes through `layers.Layers`: states, lengths and resets, packed
    sequences, streams. A subclass has a `cell`, and says by `composed` which weights it is to be given."""

    num_layers, bidirectional, dropout, proj_size, weights = 1, False, 0.0, 0, None

    def __init__(self, input_size: int, hidden_size: int, batch_first: bool, recompute: bool) -> None:
        super().__init__()
        _check_size("input_size", input_size)
        _check_size("hidden_size", hidden_size)
        for name, flag in {"batch_first": batch_first, "recompute": recompute}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.batch_first, self.recompute = batch_first, recompute

    def composed(self) -> Weights:
        """The weights of the cell, from the current parameters."""
        raise NotImplementedError

    def forward(
        self, input: Input, hx: Given = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> Result:
        """Runs the layer over `input`.

        Args:
            input, lengths, resets: as of `fastrnn.LSTM`.
            hx: the states before the first step, of the class, `[1, B, .]` each. Zero if None.

        Returns:
            `output` (like `input`, with H features) and the final states, in the form of `hx`.

        Raises:
            ValueError, RuntimeError, TypeError: a dimension, size, dtype or value is wrong.
        """
        found = readers.read(self, input, hx, lengths=lengths, resets=resets)
        if found is not None:
            read: Result = found
            return read
        return self._call(input, hx, lengths, resets)

    def _weights(self) -> list[list[Weights]]:
        if not torch.compiler.is_compiling():
            _C.leave_openmp_after_fork()
        return [[self.composed()]]

    def extra_repr(self) -> str:
        options = {"batch_first": self.batch_first, "recompute": self.recompute}
        return f"{self.input_size}, {self.hidden_size}" + "".join(f", {name}=True" for name in options if options[name])
