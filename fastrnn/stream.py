"""One step per call, for audio and control loops: nothing is allocated, and no weight is packed twice."""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastrnn import _C
from fastrnn.cells import CELLS, Cell
from fastrnn.reference import Weights, sizes
from fastrnn.schema import DTYPES, own_rows, prepare


class NotCopied:
    """What holds memory that the native core has the address of."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: cannot be copied or pickled; make another with module.stream()")


class Stream(NotCopied):
    """A stack of layers that keeps its state and advances by one step per call; `module.stream(batch)` makes one.

    It holds a packed copy of the weights as they are when it is made (`nbytes`, with its buffers) and no gradients.
    Dropout is not applied. One thread at a time may call it. It cannot be copied, traced or differentiated.

    Attributes:
        state: `h [L, B, P]`, for an LSTM `(h, c)` with `c [L, B, H]`, and so on for each other state that a cell has:
            views of the stream's own memory, zero at first.
            Write to them in place to continue from elsewhere. In 16-bit types they are rounded after every step.
    """

    def __init__(
        self, cell: str, weights: list[list[Weights]], batch: int, *, rounded: str | None = None, copy: bool = False
    ) -> None:
        batch = _check_batch(batch)
        if not isinstance(copy, bool):
            raise TypeError(f"copy should be of type bool, got: {type(copy).__name__}")
        _C.leave_openmp_after_fork()
        if len(weights[0]) != 1:
            raise ValueError("stream: expected one direction, got two; the reverse one needs the whole sequence")
        self._cell = CELLS[cell]
        if self._cell.masks:
            raise NotImplementedError(f"stream: cell {cell} has masks, which a stream is not given")
        layers = [directions[0] for directions in weights]
        _check_weights(layers, self._cell)
        first, dtype = layers[0], layers[0].w_ih.dtype
        L, (H, P) = len(layers), sizes(self._cell, first)
        self._copy = copy
        self._expected = torch.Size((batch, first.w_ih.shape[1])), dtype
        with torch.inference_mode(False):
            self._h = _zeros(dtype, L, batch, P)
            self._c = _zeros(dtype, L, batch, self._cell.carried * H) if self._cell.carried else None
            self._y = _zeros(dtype, batch, P)
        rounded = rounded if dtype == torch.float32 else None
        if not prepare(cell, dtype, "cpu", rounded):
            raise NotImplementedError(f"stream: there are no kernels of cell {cell} for {dtype} here")
        dense = [[t if t is None else t.detach().resolve_neg().contiguous() for t in layer] for layer in layers]
        self._core = _C.Stream([self._layer(cell, index, tensors, rounded) for index, tensors in enumerate(dense)])

    def _layer(self, cell: str, index: int, tensors: list[Any], rounded: str | None) -> _C.StreamLayer:
        (batch, _), dtype = self._expected
        I, (H, P) = tensors[0].shape[1], sizes(self._cell, Weights._make(tensors))
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        c = 0 if self._c is None else self._c[index].data_ptr()
        states = self._h[index].data_ptr(), c, self._y.data_ptr()
        threads = torch.get_num_threads()
        return _C.StreamLayer(cell, DTYPES[dtype], rounded, batch, I, H, P, threads, addresses, *states)

    @property
    def state(self) -> Tensor | tuple[Tensor, ...]:
        h = self._h.detach()
        return h if self._c is None else (h, *self._c.detach().chunk(self._cell.carried, dim=-1))

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and buffers that the stream holds."""
        return self._core.bytes

    def __call__(self, x: Tensor) -> Tensor:
        """Advances by `x [B, I]`; returns `y [B, P]`, whose memory the next call overwrites unless `copy` was chosen.

        Raises:
            ValueError: `x` has another shape.
            TypeError: `x` is not a tensor, or has another dtype.
            RuntimeError: `x` is not dense memory of the CPU, another thread is inside, or the call is traced.
        """
        check_input(x, *self._expected)
        if not x.is_contiguous() or x.is_neg():
            _C.leave_openmp_after_fork()
            x = x.resolve_neg().contiguous()
        self._core.step(_address(x, "x"))
        if self._copy:
            _C.leave_openmp_after_fork()
            return self._y.clone()
        increment_version(self._y)  # autograd shall see that a y which it saved is gone
        return self._y.detach()

    def reset(self, rows: Tensor | None = None) -> None:
        """Sets the state to zero: of all rows, or where `rows`, bool `[B]` on the CPU, is true.

        Raises:
            TypeError, ValueError, RuntimeError: `rows` is of another dtype, shape or device.
        """
        if rows is not None:
            batch = self._expected[0][0]
            if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
                given = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
                raise TypeError(f"rows: expected a tensor of dtype torch.bool, got {given}")
            if rows.shape != (batch,):
                raise ValueError(f"rows: expected shape ({batch},), got {tuple(rows.shape)}")
            if not rows.is_cpu:
                raise RuntimeError(f"rows: expected device cpu, got {rows.device}")
        _C.leave_openmp_after_fork()
        for state in (self._h,) if self._c is None else (self._h, self._c):
            state[:, slice(None) if rows is None else rows] = 0


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros in memory that no call on the tensor can free, since the native core keeps its address."""
    memory = np.zeros(math.prod(shape) * dtype.itemsize or 1, dtype=np.uint8)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def check_input(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Of one step."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"x: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"x: expected dtype {dtype}, got {x.dtype}")
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Stream: cannot be traced; trace the module that it was made of")
    if not x.is_cpu or x.layout != torch.strided:
        raise RuntimeError(f"x: expected a dense tensor on the CPU, got device {x.device}, layout {x.layout}")


def _address(tensor: Tensor, name: str) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise RuntimeError(f"{name}: expected a tensor with memory of its own, got one that is only traced")
    return address


def _check_batch(batch: SupportsIndex) -> int:
    try:
        number = 0 if isinstance(batch, bool) else operator.index(batch)
    except TypeError:
        number = 0
    if not 1 <= number < 2**31:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
    return number


def _check_weights(layers: list[Weights], cell: Cell) -> None:
    """Every tensor has the shape that the first layer implies, its dtype and its device."""
    like = layers[0].w_ih
    if like.device.type != "cpu":
        raise NotImplementedError(f"stream: expected weights on the CPU, got {like.device}")
    if like.dtype not in DTYPES:
        raise TypeError(f"stream: expected float32, float64, bfloat16 or float16 weights, got {like.dtype}")
    H, P = sizes(cell, layers[0])
    rows, recurrent = like.shape[0], 0 if layers[0].w_hh is None else layers[0].w_hh.shape[0]
    for index, layer in enumerate(layers):
        inputs = P if index else like.shape[1]
        shapes = (rows, inputs), (recurrent, P), (rows,), (recurrent,), (P, H), (own_rows(cell.name), H)
        for name, tensor, shape in zip(Weights._fields, layer, shapes, strict=True):
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or (layer.w_hr is None and P != H):
                raise ValueError(f"{name} of layer {index}: expected shape {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype != like.dtype:
                raise TypeError(f"{name} of layer {index}: expected dtype {like.dtype}, got {tensor.dtype}")
            if tensor.device != like.device:
                raise RuntimeError(f"{name} of layer {index}: expected device {like.device}, got {tensor.device}")
            _address(tensor, f"{name} of layer {index}")
