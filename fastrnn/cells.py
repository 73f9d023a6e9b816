"""Every cell as its equation: the specification, and the only source of its kernels (codegen.py).

An equation reads like its paper. `x.g` is the input's product of gate g with its bias, `u.g(operand)` the recurrent
product of gate g with its bias: of the state h, or of something else that the step has computed. Then come the states;
the first is the output. On tensors an equation is the reference (reference.py); on the values of codegen.py it records
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        name: how the ops, the kernels and the tests call it.
        gates: their names, in the order of the row blocks of the weights.
        states: their names; the first is the output.
        equation: `equation(x, u, *states) -> states`, or the only state itself.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    equation: Callable

    @property
    def has_cell(self) -> bool:
        """Whether there is a state besides the output."""
        return len(self.states) > 1


CELLS: dict[str, Cell] = {}


def cell(*, gates: str, states: str):
    """Registers an equation under its own name; `gates` and `states` are names with blanks between them."""

    def register(equation):
        CELLS[equation.__name__] = Cell(equation.__name__, tuple(gates.split()), tuple(states.split()), equation)
        return equation

    return register


def sigmoid(value):
    return value.sigmoid()


def tanh(value):
    return value.tanh()


def relu(value):
    return value.relu()


@cell(gates="i f g o", states="h c")
def lstm(x, u, h, c):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as in `torch.nn.LSTM`."""
    i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
    g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
    c = f * c + i * g
    return o * tanh(c), c


@cell(gates="r z n", states="h")
def gru(x, u, h):
    """Gated recurrent unit with the reset after the product, as in `torch.nn.GRU`."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + r * u.n(h))
    return (1 - z) * n + z * h


@cell(gates="r z n", states="h")
def gru_reset_before(x, u, h):
    """Gated recurrent unit with the reset before the product (Cho et al. 2014)."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + u.n(r * h))
    return (1 - z) * n + z * h


@cell(gates="n", states="h")
def rnn_tanh(x, u, h):
    """Elman network (Elman 1990), as in `torch.nn.RNN`."""
    return tanh(x.n + u.n(h))


@cell(gates="n", states="h")
def rnn_relu(x, u, h):
    """Elman network with a rectifier, as in `torch.nn.RNN(nonlinearity="relu")`."""
    return relu(x.n + u.n(h))
