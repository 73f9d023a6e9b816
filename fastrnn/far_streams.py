"""`fastrnn.Skip` and `fastrnn.Dilated` one step per call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import _C
from fastrnn.stream import NotCopied, check_input


class _Recent:
    """The last d of the tensors `[L, B, F]` that have come, the earliest first, zero before there are any: side by side
    in a memory twice as long, so that one copy in d steps keeps them so."""

    def __init__(self, like: Tensor, steps: int) -> None:
        L, B, F = like.shape
        self._memory = like.new_zeros(L, 2 * steps, B, F)
        self._steps, self._begin = steps, 0

    @property
    def all(self) -> Tensor:
        """`[L, d, B, F]`."""
        return self._memory[:, self._begin : self._begin + self._steps]

    @property
    def earliest(self) -> Tensor:
        return self._memory[:, self._begin]

    def append(self, new: Tensor) -> None:
        if self._begin == self._steps:
            self._memory[:, : self._steps] = self.all
            self._begin = 0
        self._memory[:, self._begin + self._steps] = new
        self._begin += 1

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def reset(self, rows: Tensor | None) -> None:
        self.all[:, :, slice(None) if rows is None else rows] = 0


class SkipStream(NotCopied):
    """A `Skip` that advances by one step per call (`fastrnn.Stream`): `y = step(x)` with x `[B, I]`.

    Attributes:
        state: as the module's `hx`: the layer's, and its outputs `[d, B, P]` of the d steps before, the earliest first.
            Views of the stream's own memory, to write to in place; those of the outputs are good until the next step.
    """

    def __init__(self, stream: Any, steps: int, sizes: tuple[int, int]) -> None:
        self._stream = stream
        with torch.inference_mode(False):  # what is made inside cannot be written to outside
            like = _states(stream)[0]
            batch, (inputs, outputs) = like.shape[1], sizes
            self._outputs = _Recent(like.new_empty(1, batch, outputs), steps)
            self._operand = like.new_zeros(batch, inputs + outputs)
            self._given, self._before = self._operand[:, :inputs], self._operand[:, inputs:]

    @property
    def state(self) -> tuple[Any, Tensor]:
        return self._stream.state, self._outputs.all[0]

    @property
    def nbytes(self) -> int:
        """As `fastrnn.Stream.nbytes`."""
        total: int = self._stream.nbytes + self._outputs.nbytes + self._operand.nbytes
        return total

    def __call__(self, x: Tensor) -> Tensor:
        """As `fastrnn.Stream`."""
        check_input(x, self._given.shape, self._given.dtype)
        _C.leave_openmp_after_fork()
        self._given.copy_(x.detach())
        self._before.copy_(self._outputs.earliest[0])
        y: Tensor = self._stream(self._operand)
        self._outputs.append(y)
        return y

    def reset(self, rows: Tensor | None = None) -> None:
        """As `fastrnn.Stream.reset`."""
        self._stream.reset(rows)
        self._outputs.reset(rows)


class DilatedStream(NotCopied):
    """A `Dilated` that advances by one step per call (`fastrnn.Stream`): `y = step(x)` with x `[B, I]`.

    Attributes:
        state: as the module's `hx`: the states after the last d steps, those of one step side by side, the earliest
            first. Views of the stream's own memory, to write to in place, good until the next step.
    """

    def __init__(self, stream: Any, steps: int) -> None:
        self._stream = stream
        with torch.inference_mode(False):
            self._states = _states(stream)
            self._recent = [_Recent(state, steps) for state in self._states]

    @property
    def state(self) -> Any:
        found = tuple(recent.all.flatten(1, 2) for recent in self._recent)
        return found if isinstance(self._stream.state, tuple) else found[0]

    @property
    def nbytes(self) -> int:
        """As `fastrnn.Stream.nbytes`."""
        total: int = self._stream.nbytes + sum(recent.nbytes for recent in self._recent)
        return total

    def __call__(self, x: Tensor) -> Tensor:
        """As `fastrnn.Stream`."""
        _C.leave_openmp_after_fork()
        for state, recent in zip(self._states, self._recent, strict=True):
            state.copy_(recent.earliest)
        y: Tensor = self._stream(x)
        for state, recent in zip(self._states, self._recent, strict=True):
            recent.append(state)
        return y

    def reset(self, rows: Tensor | None = None) -> None:
        """As `fastrnn.Stream.reset`."""
        self._stream.reset(rows)
        for recent in self._recent:
            recent.reset(rows)


def _states(stream: Any) -> tuple[Tensor, ...]:
    state = stream.state
    return state if isinstance(state, tuple) else (state,)
