"""The LSTM whose cell state is kept in bounds: a cell for each bound."""

from __future__ import annotations

import functools

from fastrnn.cells import maximum, sigmoid, tanh
from fastrnn.recurrent import cell, with_numbers


@functools.cache
def lstm(clip: float) -> str:
    """The name in `fastrnn.cells.CELLS` of the cell with -clip <= c <= clip."""
    return with_numbers(_cell(), {"clip": clip}).name


@functools.cache
def _cell():
    """Made when it is first asked for, as its kernels are."""

    @cell(gates="i f g o", states="h c")
    def lstm_clipped(x, u, h, c, *, clip=1.0):
        """LSTM with bounds of its cell state (Sak et al. 2014)."""
        i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
        g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
        c = -maximum(-maximum(f * c + i * g, -clip), -clip)
        return o * tanh(c), c

    return lstm_clipped
