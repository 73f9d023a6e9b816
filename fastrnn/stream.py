"""One step per call, for audio and control loops: nothing is allocated, and no weight is packed twice."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import _C
from fastrnn.reference import CELLS, Weights

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/layer.h


class Stream:
    """A stack of layers that keeps its state and advances by one step per call; `module.stream(batch)` makes one.

    It holds a packed copy of the weights as they are when it is made (`nbytes`, with its buffers) and no gradients.
    Dropout is not applied. One thread at a time may call it; copies of it do not exist, make another.

    Attributes:
        state: `h [L, B, P]`, for an LSTM `(h, c)` with `c [L, B, H]`: the stream's own memory, zero at first. Write to
            it to continue from elsewhere. In 16-bit types it is rounded after every step.
    """

    def __init__(self, cell: str, weights: list[list[Weights]], batch: int, *, narrow: bool = False):
        first = weights[0][0]
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
        if len(weights[0]) != 1:
            raise ValueError("stream: expected one direction, got two; the reverse one needs the whole sequence")
        if first.w_ih.device.type != "cpu":
            raise NotImplementedError(f"stream: expected weights on the CPU, got {first.w_ih.device}")
        if first.w_ih.dtype not in _DTYPES:
            raise TypeError(f"stream: expected float32, float64, bfloat16 or float16 weights, got {first.w_ih.dtype}")
        L, P = len(weights), first.w_hh.shape[1]
        H = first.w_hh.shape[0] // CELLS[cell].gates
        self._expected = torch.Size((batch, first.w_ih.shape[1])), first.w_ih.dtype
        self._h = first.w_ih.new_zeros(L, batch, P).detach()
        self._c = first.w_ih.new_zeros(L, batch, H).detach() if CELLS[cell].has_cell else None
        self._y = self._h.new_empty(batch, P)
        dense = [[t if t is None else t.detach().contiguous() for t in directions[0]] for directions in weights]
        narrow = narrow and first.w_ih.dtype == torch.float32
        self._core = _C.Stream([self._layer(cell, index, tensors, narrow) for index, tensors in enumerate(dense)])

    def _layer(self, cell: str, index: int, tensors: list[Tensor | None], narrow: bool) -> _C.StreamLayer:
        (batch, _), dtype = self._expected
        gates = CELLS[cell].gates
        I, H, P = tensors[0].shape[1], tensors[1].shape[0] // gates, tensors[1].shape[1]
        c = 0 if self._c is None else self._c[index].data_ptr()
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        threads = torch.get_num_threads()
        states = self._h[index].data_ptr(), c, self._y.data_ptr()
        return _C.StreamLayer(cell, _DTYPES[dtype], narrow, batch, I, H, P, threads, addresses, *states)

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        return self._h if self._c is None else (self._h, self._c)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and buffers that the stream holds."""
        return self._core.bytes

    def __call__(self, x: Tensor) -> Tensor:
        """Advances by `x [B, I]`; returns `y [B, P]`, always the same tensor, which the next call overwrites.

        Raises:
            ValueError: `x` has another shape.
            TypeError: `x` has another dtype.
            RuntimeError: `x` is on another device, or another thread is inside.
        """
        if x.shape != self._expected[0]:
            raise ValueError(f"x: expected shape {tuple(self._expected[0])}, got {tuple(x.shape)}")
        if x.dtype != self._expected[1]:
            raise TypeError(f"x: expected dtype {self._expected[1]}, got {x.dtype}")
        if not x.is_cpu:
            raise RuntimeError(f"x: expected device cpu, got {x.device}")
        if not x.is_contiguous():
            x = x.contiguous()
        self._core.step(x.data_ptr())
        return self._y

    def reset(self, rows: Tensor | None = None) -> None:
        """Sets the state to zero: of all rows, or where `rows`, bool `[B]`, is true."""
        for state in (self._h,) if self._c is None else (self._h, self._c):
            if rows is None:
                state.zero_()
            else:
                state[:, rows] = 0
