"""The LSTM whose cell state is kept in bounds: a cell for each bound."""

from __future__ import annotations

import functools

from fastrnn import cells, recurrent


@functools.cache
def lstm(clip: float) -> str:
    """The name in `fastrnn.cells.CELLS` of the cell with -clip <= c <= clip."""
    return recurrent.with_numbers(_cell(), {"clip": clip}).name


@functools.cache
def _cell() -> cells.Cell:
    return recurrent.cell(gates="i f g o", states="h c")(cells.lstm_clipped)
