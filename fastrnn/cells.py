"""Every cell as its equation: the specification, and the only source of its kernels (codegen.py).

An equation reads like its paper. `x.g` is the input's product of gate g with its bias, `u.g(operand)` the recurrent
product of gate g with its bias: of the state h, or of something else that the step has computed. Then come the states;
the first is the output. On tensors an equation is the reference (reference.py); on the values of codegen.py it records
itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        name: how the ops, the kernels and the tests call it.
        gates: their names, in the order of the row blocks of the weights.
        states: their names; the first is the output.
        equation: `equation(x, u, **everything_else) -> states`, or the only state itself.
        unit_weights: names of parameters with one number for each unit.
        masks: names of what is given for each row and unit, the same in all steps or not, without gradients.
        numbers: names and values that are fixed: the equation's keyword-only arguments.
        has_all_kernels: whether fastrnn is built with kernels of all dtypes and devices, and not of float32 on the CPU
            alone, with those of other dtypes compiled when they are first used.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    equation: Callable
    unit_weights: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    has_all_kernels: bool = False

    @property
    def carried(self) -> int:
        """How many states there are besides the output."""
        return len(self.states) - 1

    def call(self, x, u, *values):
        """The equation, with values of the states, unit weights and masks, in this order."""
        names = *self.states, *self.unit_weights, *self.masks
        return self.equation(x, u, **dict(zip(names, values, strict=True)), **dict(self.numbers))


CELLS: dict[str, Cell] = {}


def describe(equation: Callable, *, gates: str, states: str, unit_weights: str = "", masks: str = "") -> Cell:
    """The cell of an equation; each argument is names with blanks between them."""
    parameters = inspect.signature(equation).parameters.values()
    numbers = tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)
    names = (tuple(names.split()) for names in (gates, states, unit_weights, masks))
    gates, states, unit_weights, masks = names
    return Cell(equation.__name__, gates, states, equation, unit_weights, masks, numbers)


def cell(*, has_all_kernels: bool = False, **names: str):
    """Registers an equation under its own name; arguments as `describe` and `Cell`."""

    def register(equation):
        CELLS[equation.__name__] = replace(describe(equation, **names), has_all_kernels=has_all_kernels)
        return equation

    return register


def sigmoid(value):
    return value.sigmoid()


def tanh(value):
    return value.tanh()


def relu(value):
    return value.relu()


def exp(value):
    return value.exp()


def logsigmoid(value):
    """log(sigmoid(value)), which is finite wherever the value is."""
    if hasattr(value, "node"):
        return value.logsigmoid()
    from torch.nn.functional import logsigmoid

    return logsigmoid(value)


def maximum(a, b):
    """The larger one; where they are equal, each has half of the gradient."""
    return a.maximum(b)


@cell(gates="i f g o", states="h c", has_all_kernels=True)
def lstm(x, u, h, c):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as in `torch.nn.LSTM`."""
    i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
    g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
    c = f * c + i * g
    return o * tanh(c), c


@cell(gates="r z n", states="h", has_all_kernels=True)
def gru(x, u, h):
    """Gated recurrent unit with the reset after the product, as in `torch.nn.GRU`."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + r * u.n(h))
    return (1 - z) * n + z * h


@cell(gates="r z n", states="h", has_all_kernels=True)
def gru_reset_before(x, u, h):
    """Gated recurrent unit with the reset before the product (Cho et al. 2014)."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + u.n(r * h))
    return (1 - z) * n + z * h


@cell(gates="n", states="h", has_all_kernels=True)
def rnn_tanh(x, u, h):
    """Elman network (Elman 1990), as in `torch.nn.RNN`."""
    return tanh(x.n + u.n(h))


@cell(gates="n", states="h", has_all_kernels=True)
def rnn_relu(x, u, h):
    """Elman network with a rectifier, as in `torch.nn.RNN(nonlinearity="relu")`."""
    return relu(x.n + u.n(h))
