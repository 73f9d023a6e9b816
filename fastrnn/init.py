"""Initializations that recurrent layers are known to need, in place, for any layer or cell of fastrnn."""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from fastrnn.cells import CELLS, Cell
from fastrnn.reference import products_of

M = TypeVar("M", bound=torch.nn.Module)


def orthogonal_(module: M, gain: float = 1.0, generator: torch.Generator | None = None) -> M:
    """Makes the recurrent matrix of each gate orthogonal (Saxe et al. 2014; Le et al. 2015): all of its singular values
    are `gain`, so that what passes through it neither grows nor shrinks.

    Args:
        module: a layer or cell of fastrnn, all layers and directions of it. A matrix `[H, P]` of a layer with a
            projection gets orthogonal rows or columns.
        gain, generator: as of `torch.nn.init.orthogonal_`.

    Returns:
        The module.

    Raises:
        TypeError: `module` is something else.
        ValueError: it has no recurrent matrices, or computes them (a parametrization), or `gain` is not finite.
    """
    _cell_of(module)
    if not isinstance(gain, int | float) or not math.isfinite(gain):
        raise ValueError(f"gain: expected a finite number, got {gain!r}")
    matrices = [p for name, p in module.named_parameters() if name.startswith("weight_hh")]
    if not matrices:
        raise ValueError(f"module: expected recurrent matrices, got {type(module).__name__}, which has none")
    with torch.no_grad():
        for matrix in matrices:
            for gate in matrix.split(module.hidden_size):
                torch.nn.init.orthogonal_(gate, gain, generator)
    return module


def forget_bias_(module: M, value: float = 1.0, gate: str = "f") -> M:
    """Sets the bias of the forget gate (Gers et al. 2000; Jozefowicz et al. 2015), so that an LSTM remembers at first.

    Args:
        module: a layer or cell of fastrnn, all layers and directions of it.
        value: what the gate's biases add up to; where there are two, the second becomes 0.
        gate: its name in the equation (`fastrnn.cells`). In `LSTM`, `SLSTM`, `SRU`, `QRNN` and `MinLSTM` f is the share
            of the old state that is kept; in a GRU that is z.

    Returns:
        The module.

    Raises:
        TypeError: `module` is something else, or `value` is no number.
        ValueError: the cell has no such gate, `value` is not finite, or the module has no biases, or computes them.
    """
    cell = _cell_of(module)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"value: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"value: expected a finite number, got {value}")
    if gate not in cell.gates:
        raise ValueError(f"gate: expected one of {', '.join(cell.gates)}, got {gate!r}")
    with_input, recurrent, _ = products_of(cell)
    index, is_set = cell.gates.index(gate), False
    with torch.no_grad():
        for name, bias in module.named_parameters():
            gates = with_input if name.startswith("bias_ih") else recurrent
            if not name.startswith(("bias_ih", "bias_hh")) or index not in gates:
                continue
            is_second = name.startswith("bias_hh") and index in with_input
            bias.split(module.hidden_size)[gates.index(index)].fill_(0 if is_second else value)
            is_set = True
    if not is_set:
        raise ValueError(f"module: expected biases, got {type(module).__name__} without any")
    return module


def _cell_of(module: torch.nn.Module) -> Cell:
    name = getattr(module, "_cell", None)
    if not isinstance(module, torch.nn.Module) or name not in CELLS or not hasattr(module, "hidden_size"):
        raise TypeError(f"module: expected a layer or cell of fastrnn, got {type(module).__name__}")
    computed = [name for name in getattr(module, "parametrizations", {}) if name.startswith(("weight_hh", "bias"))]
    if computed:
        raise ValueError(f"module: expected parameters to be set, got a parametrization that computes {computed[0]}")
    return CELLS[name]
