"""Every cell as its equation: the specification, and the only source of its kernels (codegen.py).

An equation reads like its paper. `x.g` is the input's product of gate g with its bias, `u.g(operand)` the recurrent
product of gate g with its bias: of the state h, or of something else that the step has computed. Then come the states;
the first is the output. On tensors an equation is the reference (reference.py); on the values of codegen.py it records
itself.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Function: TypeAlias = Callable[..., Any]
E = TypeVar("E", bound=Function)


class X(Protocol):
    """`x` of an equation: by the name of a gate, the input's product of it."""

    def __getattr__(self, gate: str, /) -> Tensor: ...


class U(Protocol):
    """`u` of an equation: by the name of a gate, what makes the recurrent product of it."""

    def __getattr__(self, gate: str, /) -> Callable[[Tensor], Tensor]: ...


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
        mask_gradients: whether masks have gradients, and then a value for each step.
        normalized: groups of gates whose products have layer normalization (Ba et al. 2016), the input's and the
            recurrent ones each for themselves and over all gates of a group: `x.g` and `u.g(h)` are then
            gain * (product - mean) / sqrt(variance + NORM_EPSILON) + bias. Empty: none have it.
        has_all_kernels: whether fastrnn is built with kernels of all dtypes and devices, and not of float32 on the CPU
            alone, with those of other dtypes compiled when they are first used.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    equation: Function
    unit_weights: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    mask_gradients: bool = False
    normalized: tuple[tuple[str, ...], ...] = ()
    has_all_kernels: bool = False

    @property
    def carried(self) -> int:
        """How many states there are besides the output."""
        return len(self.states) - 1

    def __deepcopy__(self, memo: object) -> Cell:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By reference, as functions are pickled: whoever loads it imports the module that defines the cell."""
        if self.name == self.equation.__name__:
            return _built_in, (self.name,)
        where = self.equation.__module__, self.equation.__qualname__, self.numbers
        try:
            is_there = _find(*where) == self
        except (ImportError, AttributeError, TypeError):
            is_there = False
        if not is_there:
            raise pickle.PicklingError(
                f"cell {self.name}: expected it to be {where[1]} of module {where[0]}, to be found there again; define "
                "it at the top of a module, under the name of its equation"
            )
        return _find, where

    def call(self, x: Any, u: Any, *values: Any) -> Any:
        """The equation, with values of the states, unit weights and masks, in this order."""
        names = *self.states, *self.unit_weights, *self.masks
        return self.equation(x, u, **dict(zip(names, values, strict=True)), **dict(self.numbers))


CELLS: dict[str, Cell] = {}
NORM_EPSILON = 1e-5  # as of torch.nn.LayerNorm; kNormEpsilon in csrc/layer.h


def _built_in(name: str) -> Cell:
    return CELLS[name]


def _find(module: str, path: str, numbers: tuple[tuple[str, float], ...]) -> Cell:
    from fastrnn.recurrent import with_numbers

    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return with_numbers(found, dict(numbers))


def describe(
    equation: Function, *, gates: str, states: str, unit_weights: str = "", masks: str = "", normalized: str = ""
) -> Cell:
    """The cell of an equation; each argument is names with blanks between them, in `normalized` groups of names with
    semicolons between the groups."""
    if not hasattr(equation, "__code__") or not equation.__name__.isidentifier() or len(equation.__name__) > 100:
        raise TypeError(f"equation: expected a function with a name of its own, got {equation!r}")
    named = {"gates": gates, "states": states, "unit_weights": unit_weights, "masks": masks, "normalized": normalized}
    for key, value in named.items():
        if not isinstance(value, str):
            raise TypeError(f"{key}: expected names with blanks between them, got {value!r}")
    parameters = inspect.signature(equation).parameters.values()
    numbers = tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)
    of_gates, of_states, of_units, of_masks = (tuple(names.split()) for names in (gates, states, unit_weights, masks))
    groups = tuple(tuple(group.split()) for group in normalized.split(";") if group.strip())
    return Cell(equation.__name__, of_gates, of_states, equation, of_units, of_masks, numbers, normalized=groups)


def cell(*, has_all_kernels: bool = False, **names: str) -> Callable[[E], E]:
    """Registers an equation under its own name; arguments as `describe` and `Cell`."""

    def register(equation: E) -> E:
        CELLS[equation.__name__] = replace(describe(equation, **names), has_all_kernels=has_all_kernels)
        return equation

    return register


# Values of an equation are tensors, or have all of these operations as methods: those of equation.py and dual.py.


def sigmoid(value: Tensor) -> Tensor:
    """1 / (1 + exp(-value))."""
    return value.sigmoid()


def tanh(value: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return value.tanh()


def relu(value: Tensor) -> Tensor:
    """The larger of the value and 0."""
    return value.relu()


def exp(value: Tensor) -> Tensor:
    """e to the power of the value."""
    return value.exp()


def logsigmoid(value: Tensor) -> Tensor:
    """log(sigmoid(value)), which is finite wherever the value is."""
    if hasattr(value, "logsigmoid"):
        found: Tensor = value.logsigmoid()
        return found
    from torch.nn.functional import logsigmoid

    return logsigmoid(value)


def step(value: Any) -> Any:
    """1 where the value is above 0, otherwise 0; its derivative is 0."""
    if hasattr(value, "logsigmoid"):
        return value.step()
    from torch import where

    return where(value > 0, 1.0, where(value <= 0, 0.0, value))


def maximum(a: Any, b: Any) -> Any:
    """The larger one, of two values or of a value and a number; equal values have half of the gradient each."""
    if isinstance(a, (int, float)):
        a, b = b, a
    return a.maximum(b) if hasattr(a, "logsigmoid") or not isinstance(b, (int, float)) else a.clamp(min=b)


def normalized(value: Tensor) -> Tensor:
    """(value - mean) / sqrt(variance + NORM_EPSILON), over all units of a row: layer normalization (Ba et al. 2016)
    without its gain and bias. An equation has at most one."""
    if hasattr(value, "normalized"):
        return value.normalized()  # type: ignore[no-any-return]
    if isinstance(value, (int, float)):
        raise TypeError(f"normalized: expected a value of the step, got {value!r}")
    # Not torch's layer_norm, to whose derivative of second order mean and variance are constants.
    centered = value - value.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()


@cell(gates="i f g o", states="h c", has_all_kernels=True)
def lstm(x: X, u: U, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as in `torch.nn.LSTM`."""
    i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
    g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
    c = f * c + i * g
    return o * tanh(c), c


def lstm_clipped(x: X, u: U, h: Tensor, c: Tensor, *, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """LSTM with -clip <= c <= clip (Sak et al. 2014); clipped.py makes a cell for each bound."""
    i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
    g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
    c = -maximum(-maximum(f * c + i * g, -clip), -clip)
    return o * tanh(c), c


@cell(gates="r z n", states="h", has_all_kernels=True)
def gru(x: X, u: U, h: Tensor) -> Tensor:
    """Gated recurrent unit with the reset after the product, as in `torch.nn.GRU`."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + r * u.n(h))
    return (1 - z) * n + z * h


@cell(gates="r z n", states="h", has_all_kernels=True)
def gru_reset_before(x: X, u: U, h: Tensor) -> Tensor:
    """Gated recurrent unit with the reset before the product (Cho et al. 2014)."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + u.n(r * h))
    return (1 - z) * n + z * h


@cell(gates="n", states="h", has_all_kernels=True)
def rnn_tanh(x: X, u: U, h: Tensor) -> Tensor:
    """Elman network (Elman 1990), as in `torch.nn.RNN`."""
    return tanh(x.n + u.n(h))


@cell(gates="n", states="h", has_all_kernels=True)
def rnn_relu(x: X, u: U, h: Tensor) -> Tensor:
    """Elman network with a rectifier, as in `torch.nn.RNN(nonlinearity="relu")`."""
    return relu(x.n + u.n(h))


@cell(gates="n", states="h")
def rnn_sigmoid(x: X, u: U, h: Tensor) -> Tensor:
    """Elman network with the logistic function."""
    return sigmoid(x.n + u.n(h))


@cell(gates="i f g o", states="h c", unit_weights="p_i p_f p_o")
def lstm_peephole(x: X, u: U, h: Tensor, c: Tensor, p_i: Tensor, p_f: Tensor, p_o: Tensor) -> tuple[Tensor, Tensor]:
    """Long short-term memory with peepholes (Gers, Schraudolph and Schmidhuber 2002), as in ONNX."""
    i, f = sigmoid(x.i + u.i(h) + p_i * c), sigmoid(x.f + u.f(h) + p_f * c)
    c = f * c + i * tanh(x.g + u.g(h))
    o = sigmoid(x.o + u.o(h) + p_o * c)
    return o * tanh(c), c


@cell(gates="i f z o", states="h c n m")
def slstm(x: X, u: U, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scalar LSTM of xLSTM (Beck et al. 2024): exponential gates, m keeps them in range, n normalizes. Where all of
    them have vanished so far, which is 0 / 0, the output is 0."""
    log_i, log_f = x.i + u.i(h), logsigmoid(x.f + u.f(h))
    z, o = tanh(x.z + u.z(h)), sigmoid(x.o + u.o(h))
    largest = maximum(log_f + m, log_i)
    i, f = exp(log_i - largest), exp(log_f + m - largest)
    c, n = f * c + i * z, f * n + i
    return o * (c / maximum(n, 1e-30)), c, n, largest


@cell(gates="f n", states="h")
def mgu(x: X, u: U, h: Tensor) -> Tensor:
    """Minimal gated unit (Zhou et al. 2016)."""
    f = sigmoid(x.f + u.f(h))
    n = tanh(x.n + u.n(f * h))
    return (1 - f) * h + f * n


@cell(gates="z n", states="h")
def light_gru(x: X, u: U, h: Tensor) -> Tensor:
    """Light GRU (Ravanelli et al. 2018), without the batch normalization of the input's products."""
    z, n = sigmoid(x.z + u.z(h)), relu(x.n + u.n(h))
    return z * h + (1 - z) * n


@cell(gates="n", states="h", unit_weights="leak")
def leaky_tanh(x: X, u: U, h: Tensor, leak: Tensor) -> Tensor:
    """Leaky Elman network (Jaeger et al. 2007)."""
    return (1 - leak) * h + leak * tanh(x.n + u.n(h))


@cell(gates="n", states="h", unit_weights="leak")
def leaky_relu(x: X, u: U, h: Tensor, leak: Tensor) -> Tensor:
    """Leaky Elman network with a rectifier."""
    return (1 - leak) * h + leak * relu(x.n + u.n(h))


@cell(gates="n", states="h", unit_weights="leak")
def leaky_sigmoid(x: X, u: U, h: Tensor, leak: Tensor) -> Tensor:
    """Leaky Elman network with the logistic function."""
    return (1 - leak) * h + leak * sigmoid(x.n + u.n(h))


@cell(gates="n", states="h v w", unit_weights="leak threshold refractory")
def spiking(
    x: X, u: U, h: Tensor, v: Tensor, w: Tensor, leak: Tensor, threshold: Tensor, refractory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaky integrate-and-fire units (Lapicque 1907), leak = dt / tau: h are the spikes, 0 or 1, v the potential, w how
    many steps more a unit rests. A spike sets v to 0 until the unit has rested for `refractory` steps."""
    v = (1 - step(w)) * (v + leak * (x.n + u.n(h) - v))
    h = step(v - threshold)
    return h, (1 - h) * v, refractory * h + relu(w - 1)


@cell(gates="n", states="h", unit_weights="share")
def lmu(x: X, u: U, h: Tensor, share: Tensor) -> Tensor:
    """Elman network of which the units with share 0 are linear, those with share 1 are not: a Legendre memory unit
    (Voelker et al. 2019) whose matrices are composed (fastrnn/legendre.py)."""
    n = x.n + u.n(h)
    return share * tanh(n) + (1 - share) * n


@cell(gates="n", states="h v", unit_weights="leak")
def ctrnn(x: X, u: U, h: Tensor, v: Tensor, leak: Tensor) -> tuple[Tensor, Tensor]:
    """Continuous-time network (Beer 1995), by Euler's method: tau dv/dt = -v + W x + U tanh(v), leak = dt / tau."""
    v = v + leak * (x.n + u.n(h) - v)
    return tanh(v), v


@cell(gates="n y", states="h")
def jordan(x: X, u: U, h: Tensor) -> Tensor:
    """Jordan network (Jordan 1986): what is fed back is the output."""
    return sigmoid(u.y(tanh(x.n + u.n(h))))


@cell(gates="n", states="h", unit_weights="w")
def indrnn(x: X, u: U, h: Tensor, w: Tensor) -> Tensor:
    """Independently recurrent network (Li et al. 2018)."""
    return relu(x.n + w * h)


@cell(gates="n f r p", states="h c", unit_weights="v_f v_r")
def sru(x: X, u: U, h: Tensor, c: Tensor, v_f: Tensor, v_r: Tensor) -> tuple[Tensor, Tensor]:
    """Simple recurrent unit (Lei et al. 2018), the highway of a product of the input."""
    f, r = sigmoid(x.f + v_f * c), sigmoid(x.r + v_r * c)
    c = f * c + (1 - f) * x.n
    return r * c + (1 - r) * x.p, c


@cell(gates="z f o", states="h c")
def qrnn(x: X, u: U, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Quasi-recurrent network with fo-pooling (Bradbury et al. 2017), for a window of one step."""
    f = sigmoid(x.f)
    c = f * c + (1 - f) * tanh(x.z)
    return sigmoid(x.o) * c, c


@cell(gates="p q", states="h v", unit_weights="a b")
def diagonal(x: X, u: U, h: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal linear recurrence (Gu et al. 2022; Orvieto et al. 2023): h + iv = (a + ib) (h + iv) + x.p + i x.q."""
    return a * h - b * v + x.p, b * h + a * v + x.q


@cell(gates="z n", states="h")
def mingru(x: X, u: U, h: Tensor) -> Tensor:
    """minGRU (Feng et al. 2024)."""
    z = sigmoid(x.z)
    return (1 - z) * h + z * x.n


@cell(gates="f i n", states="h")
def minlstm(x: X, u: U, h: Tensor) -> Tensor:
    """minLSTM (Feng et al. 2024): the gates divided by their sum, which holds also where both are 0 in float32."""
    f = sigmoid(logsigmoid(x.f) - logsigmoid(x.i))
    return f * h + (1 - f) * x.n


@cell(gates="i f g o", states="h c", unit_weights="gain_c bias_c", normalized="i f g o")
def layer_norm_lstm(x: X, u: U, h: Tensor, c: Tensor, gain_c: Tensor, bias_c: Tensor) -> tuple[Tensor, Tensor]:
    """LSTM with layer normalization (Ba et al. 2016): of the products, and of c where the output reads it."""
    i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
    g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
    c = f * c + i * g
    return o * tanh(gain_c * normalized(c) + bias_c), c


@cell(gates="i f g o", states="h c", unit_weights="gain_c bias_c", normalized="i f g o")
def layer_norm_lstm_carried(x: X, u: U, h: Tensor, c: Tensor, gain_c: Tensor, bias_c: Tensor) -> tuple[Tensor, Tensor]:
    """LSTM with layer normalization of the products and of c, which goes on normalized to the next step, as in
    PyTorch's benchmarks/fastrnns."""
    i, f = sigmoid(x.i + u.i(h)), sigmoid(x.f + u.f(h))
    g, o = tanh(x.g + u.g(h)), sigmoid(x.o + u.o(h))
    c = gain_c * normalized(f * c + i * g) + bias_c
    return o * tanh(c), c


@cell(gates="r z n", states="h", normalized="r z; n")
def layer_norm_gru(x: X, u: U, h: Tensor) -> Tensor:
    """GRU with layer normalization of the products (Ba et al. 2016): both gates together, the new state by itself."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + r * u.n(h))
    return (1 - z) * n + z * h


@cell(gates="r z n", states="h", normalized="r z n")
def layer_norm_gru_joint(x: X, u: U, h: Tensor) -> Tensor:
    """GRU with layer normalization of the products, all three together, as in Haste."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h))
    n = tanh(x.n + r * u.n(h))
    return (1 - z) * n + z * h
