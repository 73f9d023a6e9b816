"""Connections between steps that lie further apart than one.

A chunk of d steps reads, through connections of d steps, only the chunk before it. So `Dilated` computes the steps of
a chunk side by side, as rows of one batch, and `Skip` gives a layer whole chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import functional
from fastrnn.far_streams import DilatedStream, SkipStream
from fastrnn.layers import Layers, _check_rows
from fastrnn.stack import output_size


class _Chunked(nn.Module):
    """What both share: one layer, and how many steps its connections reach back."""

    layer: Any
    input_size: int

    def __init__(self, layer: nn.Module, steps: int, batch_first: bool = False) -> None:
        super().__init__()
        if not isinstance(layer, Layers):
            raise TypeError(f"layer: expected a recurrent layer of fastrnn, got {type(layer).__name__}")
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first: expected a bool, got {type(batch_first).__name__}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")
        if getattr(layer, "batch_first", False):
            raise ValueError(f"layer: expected one without batch_first, which is {type(self).__name__}'s own option")
        if getattr(layer, "bidirectional", False):
            raise ValueError("layer: expected one direction, got two")
        self.layer, self.steps, self.batch_first = layer, steps, batch_first
        self.input_size, self.hidden_size, self.num_layers = layer.input_size, output_size(layer), layer.num_layers

    def _time_major(
        self, input: Tensor, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`input [T, B, I]`, lengths and resets, of a user's call; checked."""
        if not isinstance(input, Tensor) or input.dim() != 3:
            given = f"{input.dim()}D" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"{type(self).__name__}: Expected input to be a tensor of 3D, got {given} instead")
        input = input.transpose(0, 1) if self.batch_first else input
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        lengths, resets = _check_rows(input, lengths, resets, True, self.batch_first)
        if lengths is not None and lengths.is_cpu and not torch.compiler.is_compiling():
            bad = lengths[(lengths < 0) | (lengths > input.shape[0])]
            if len(bad):
                raise ValueError(f"lengths: expected values in [0, {len(input)}], got {bad[0]}")
        return input, lengths, resets

    def extra_repr(self) -> str:
        return f"steps={self.steps}" + (", batch_first=True" if self.batch_first else "")


class Dilated(_Chunked):
    r"""A layer whose state comes from d steps ago (Chang et al. 2017, arXiv 1710.02224).

    .. math:: h_t = f(x_t, h_{t-d})

    Its gradients pass T / d steps, and the d steps of a chunk are computed at once.

    Args:
        layer: any of fastrnn's layers with one direction and without `batch_first`.
        steps: d.
        batch_first: as of torch.nn's layers.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def forward(
        self, input: Tensor, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Runs the layer over `input`.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with `batch_first`.
            hx: the states of the d steps before the first, in the layer's form for d*B rows, those of one step side by
                side, the earliest first. Zero if None.
            lengths, resets: as of `fastrnn.LSTM`.

        Returns:
            `output` and the states of the last d steps of each row, in the form of `hx`.
        """
        x, lengths, resets = self._time_major(input, lengths, resets)
        (T, B, I), d = x.shape, self.steps
        chunks = -(-T // d)
        x = nn.functional.pad(x, (0, 0, 0, 0, 0, chunks * d - T)).reshape(chunks, d * B, I)
        ends = x.new_full((B,), T, dtype=torch.int64) if lengths is None else lengths.clamp(0, T)
        phases, columns = torch.arange(d, device=x.device)[:, None], torch.arange(B, device=x.device)
        own = {} if lengths is None and T % d == 0 else {"lengths": ((ends - phases + d - 1) // d).flatten()}
        if resets is not None:
            own["resets"] = _resets_since(resets, d, chunks)
        output, state = self.layer(x, hx, **own)
        output = output.reshape(chunks * d, B, output.shape[-1])[:T]
        # Row p of a chunk has come to the last step that is p modulo d: from there to their order in time.
        rows = ((ends + phases) % d * B + columns).flatten()
        is_over = None if resets is None else ~_is_of_last_episode(_episodes(resets, d), ends, d).flatten()[:, None]

        def in_order(states: Tensor) -> Tensor:
            states = states[:, rows]
            return states if is_over is None else states.masked_fill(is_over, 0)

        last = tuple(map(in_order, state)) if isinstance(state, tuple) else in_order(state)
        return (output.transpose(0, 1) if self.batch_first else output), last

    def stream(self, batch: int = 1, *, copy: bool = False) -> DilatedStream:
        """As `fastrnn.LSTM.stream`."""
        return DilatedStream(self.layer.stream(batch, copy=copy), self.steps)


class Skip(_Chunked):
    r"""A layer that also reads its own output of d steps ago.

    .. math:: h_t = f([x_t, h_{t-d}], h_{t-1}), \quad \text{an RNN: }
        \tanh(W x_t + U_1 h_{t-1} + U_d h_{t-d} + b)

    Gradients reach a step through 1 / d of the factors.

    Args:
        layer: one of fastrnn's layers with one direction and without `batch_first`, whose `input_size` is that of the
            input plus that of its output: the last columns of `weight_ih_l0` are U_d.
        steps: d.
        batch_first: as of torch.nn's layers.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(self, layer: nn.Module, steps: int, batch_first: bool = False) -> None:
        super().__init__(layer, steps, batch_first)
        self.input_size = self.layer.input_size - output_size(layer)
        if self.input_size < 1:
            raise ValueError(
                f"layer: expected an input_size above {output_size(layer)}, the size of its output, which it reads "
                f"beside the input; got {layer.input_size}"
            )

    def forward(
        self, input: Tensor, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Runs the layer over `input`.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with `batch_first`.
            hx: the layer's state, and its outputs `[d, B, P]` of the d steps before, the earliest first. Zero if None.
            lengths, resets: as of `fastrnn.LSTM`.

        Returns:
            `output`, and the final state in the form of `hx`.

        Raises:
            RuntimeError: the outputs before have another shape.
        """
        x, lengths, resets = self._time_major(input, lengths, resets)
        (T, B, _), d = x.shape, self.steps
        state, first = self._state(hx, x)
        past = first
        since = None if resets is None else _episodes(resets, d)
        outputs = []
        for index, chunk in enumerate(x.split(d)):
            begin, before = index * d, past[: len(chunk)] if len(chunk) < d else past
            own = {} if lengths is None else {"lengths": (lengths - begin).clamp(0, len(chunk))}
            if since is not None and resets is not None:
                own["resets"] = resets[begin : begin + d]
                same = since[begin : begin + len(chunk)] == since[begin + d : begin + d + len(chunk)]
                before = torch.where(same[:, :, None], before, 0)
            y, state = self.layer(torch.cat([chunk, before], dim=-1), state, **own)
            past = y if len(y) == d else torch.cat([past[len(y) :].to(y.dtype), y])
            outputs.append(y)
        output = torch.cat(outputs)
        ends = x.new_full((B,), T, dtype=torch.int64) if lengths is None else lengths.clamp(0, T)
        last = self._last(torch.cat([first.to(y.dtype), output]), ends, since)
        return (output.transpose(0, 1) if self.batch_first else output), (state, last)

    def stream(self, batch: int = 1, *, copy: bool = False) -> SkipStream:
        """As `fastrnn.LSTM.stream`."""
        sizes = self.input_size, self.hidden_size
        return SkipStream(self.layer.stream(batch, copy=copy), self.steps, sizes)

    def _state(self, hx: Any, x: Tensor) -> tuple[Any, Tensor]:
        shape = (self.steps, x.shape[1], output_size(self.layer))
        if hx is None:
            return None, x.new_zeros(shape)
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            raise TypeError("hx: expected the layer's state and its outputs of the steps before")
        if not isinstance(hx[1], Tensor):
            raise TypeError(f"hx: expected a tensor of the outputs of the steps before, got {type(hx[1]).__name__}")
        if hx[1].shape != shape:
            raise RuntimeError(f"Expected hidden[1] size {shape}, got {list(hx[1].shape)}")
        if hx[1].dtype != x.dtype and not functional.may_differ(x, hx[1]):
            raise ValueError(f"hx: expected outputs of the steps before of {x.dtype}, got {hx[1].dtype}")
        return hx[0], hx[1]

    def _last(self, outputs: Tensor, ends: Tensor, since: Tensor | None) -> Tensor:
        """What the next d steps of each row may read: `[d, B, P]`."""
        times = torch.arange(self.steps, device=outputs.device)[:, None] + ends
        last = outputs[times, torch.arange(ends.shape[0], device=outputs.device)]
        return last if since is None else torch.where(_is_of_last_episode(since, ends, self.steps)[:, :, None], last, 0)


def _episodes(resets: Tensor, d: int) -> Tensor:
    """`[d + T, B]`: in which episode a step lies, from d steps before the first."""
    return torch.cat([resets.new_zeros(d, resets.shape[1], dtype=torch.int64), resets.cumsum(0)])


def _is_of_last_episode(episodes: Tensor, ends: Tensor, d: int) -> Tensor:
    """`[d, B]`: whether the d steps before the end of each row belong to its last episode."""
    times = torch.arange(d, device=ends.device)[:, None] + ends
    rows = torch.arange(ends.shape[0], device=ends.device)
    return episodes[times, rows] == episodes[ends + d - 1, rows]


def _resets_since(resets: Tensor, d: int, chunks: int) -> Tensor:
    """`[chunks, d*B]`: whether an episode has begun since d steps before."""
    T, B = resets.shape
    episodes = _episodes(resets, d)
    begun = episodes[d:] != episodes[:T]
    return nn.functional.pad(begun, (0, 0, 0, chunks * d - T)).reshape(chunks, d * B)
