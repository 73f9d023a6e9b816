"""Types that signatures of several files name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Input: TypeAlias = Tensor | PackedSequence
Given: TypeAlias = Tensor | Sequence[Tensor] | None  # hx: the state, or one for each state of a cell
States: TypeAlias = Tensor | tuple[Tensor, ...]  # in the same form, as results
Result: TypeAlias = tuple[Any, States]  # of a layer: its output is of the class of its input
Device: TypeAlias = torch.device | str | int | None
Function: TypeAlias = Callable[..., Any]
Pair: TypeAlias = tuple[Tensor, Tensor]


# How type checkers see the call of a layer, which torch.nn.Module declares as one of anything.


class CallWithState(Protocol):
    """Of a layer with one state."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...


class CallWithPair(Protocol):
    """Of a layer with the states h and c."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Sequence[Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Pair]: ...
    @overload
    def __call__(self, input: PackedSequence, hx: Sequence[Tensor] | None = None) -> tuple[PackedSequence, Pair]: ...


class StepWithState(Protocol):
    """Of a cell with one state."""

    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class StepWithPair(Protocol):
    """Of a cell with the states h and c."""

    def __call__(self, input: Tensor, hx: Sequence[Tensor] | None = None) -> Pair: ...
