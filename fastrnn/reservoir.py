"""Networks of which a linear readout alone is trained, as estimators with scikit-learn's conventions.

Each has `fit(X, y)`, `predict(X)` and `score(X, y)` with X `[T, features]` and y `[T]` or `[T, outputs]`: the samples
are the steps of one series, in order. States and the sums of the readout are computed chunk by chunk, in one pass, so
that memory does not grow with T. Needs scikit-learn: `pip install "fastrnn[reservoir]"`.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastrnn import functional
from fastrnn.cells import CELLS
from fastrnn.legendre import discrete
from fastrnn.reference import Weights, sizes
from fastrnn.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

try:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import ArpackError, eigs
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
    from threadpoolctl import threadpool_limits
except ImportError as error:
    raise ImportError('fastrnn.reservoir needs scikit-learn 1.6 or newer: pip install "fastrnn[reservoir]"') from error

__all__ = ["EchoStateNetwork", "LegendreRegressor", "LiquidStateMachine"]

Array: TypeAlias = NDArray[Any]
State: TypeAlias = Sequence[tuple[torch.Tensor, ...]]  # of each layer

CHUNK = 1024  # steps whose states are in memory at once
BLOCKS = 4  # in which a symmetric matrix is summed: five eighths of the work


class _Readout(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]  # which have no annotations
    """Features of a series, computed by fixed recurrent layers, and a ridge regression of them."""

    washout: int
    ridge: float
    _outputs: tuple[int, ...]
    _sums: Sums
    state_: State

    def _layers(self, dtype: torch.dtype) -> list[tuple[str, Weights]]:
        """The recurrent layers: of each the name of its cell, and its weights."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Checks the parameters and draws the weights."""
        raise NotImplementedError

    _features_are_rows = False  # whether the layers run over each feature of X by itself

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fits the readout to one series, from a state of zeros.

        Args:
            X: `[T, features]`. Computed in float32 if it is of float32, else in float64.
            y: `[T]` or `[T, outputs]`.

        Returns:
            The estimator.

        Raises:
            ValueError: a parameter, shape or value is wrong.
        """
        self._forget()
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, *, continued: bool = False) -> Self:
        """Fits the readout to one more series, or to the next part of the last one.

        Args:
            X, y: as of `fit`.
            continued: whether X follows the last call's: from its state, without a washout.
        """
        is_first = not hasattr(self, "_sums")
        X, y = validate_data(
            self, X, y, reset=is_first, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True
        )
        washout, ridge = 0 if continued else _integer("washout", self.washout, 0), _number("ridge", self.ridge, 0)
        if len(X) <= washout:
            raise ValueError(f"washout: expected fewer steps than the series has, {len(X)} samples, got {washout}")
        if is_first:
            self._outputs = y.shape[1:]
            self._prepare()
        elif y.shape[1:] != self._outputs:
            raise ValueError(f"y: expected shape {(len(y), *self._outputs)}, got {y.shape}")
        targets = torch.from_numpy(np.ascontiguousarray(y, dtype=np.float64)).reshape(len(y), -1)
        sums: Any = None if is_first else self._sums.copy()
        begin = -washout
        for features, after in self._run(X, self.state_ if continued and not is_first else None):
            kept = features[max(0, -begin) :]
            begin, state = begin + len(features), after
            if len(kept):
                now = targets[washout + begin - len(kept) : washout + begin]
                sums = sums or Sums(kept.double().mean(0), now.mean(0))
                sums.add(kept, now)
        coefficients, intercept = sums.solve(ridge)
        self._sums, self.state_, self._dtype = sums, state, X.dtype
        self.coef_ = coefficients.numpy().reshape(*self._outputs, -1)
        self.intercept_ = intercept.numpy().reshape(self._outputs) if self._outputs else intercept.item()
        return self

    def predict(self, X: ArrayLike, state: State | None = None) -> Array:
        """The readout of every step: `[T]` or `[T, outputs]`, as y was.

        Args:
            X: `[T, features]`.
            state: where the series continues, such as `state_`, the one after the last series that was fitted. Zero if
                None.
        """
        checked = self._checked(X)
        found = [self._read(features) for features, _ in self._run(checked, state)]
        return np.concatenate(found).reshape(len(checked), *self._outputs)

    def features(self, X: ArrayLike, state: State | None = None) -> Array:
        """The features of every step, `[T, n]`: what the readout is linear in."""
        return torch.cat([features for features, _ in self._run(self._checked(X), state)]).numpy()

    def state_after(self, X: ArrayLike, state: State | None = None) -> State | None:
        """The state after a series: what `predict`, `forecast` and `stream` continue from."""
        for _, after in self._run(self._checked(X), state):
            state = after
        return state

    def forecast(self, steps: int, state: State | None = None) -> Array:
        """Runs on by itself, each prediction being the next input: of an estimator that was fitted to predict the next
        step of X.

        Args:
            steps: how many.
            state: after the last known step; `state_` if None.

        Returns:
            `[steps]` or `[steps, outputs]`, as y was. The first is the prediction at `state`.

        Raises:
            ValueError: there are not as many outputs as features, or `state` is another estimator's.
        """
        check_is_fitted(self, "coef_")
        steps = _integer("steps", steps, 1)
        if math.prod(self._outputs) != self.n_features_in_:
            raise ValueError(
                f"forecast: expected as many outputs as features, got {math.prod(self._outputs)} and "
                f"{self.n_features_in_}"
            )
        online = self.stream(self.state_ if state is None else state)
        found = [online.y]
        for _ in range(steps - 1):
            found.append(online(found[-1]))
        return np.stack(found).reshape(steps, *self._outputs)

    def stream(self, state: State | None = None) -> Online:
        """Predictions one step at a time, `y = step(x)`, from a state (zero if None), in the dtype of the last fit."""
        check_is_fitted(self, "coef_")
        return Online(self, state)

    # ---- inside

    def _forget(self) -> None:
        for name in ("_sums", "state_", "coef_", "intercept_"):
            self.__dict__.pop(name, None)

    def _checked(self, X: ArrayLike) -> Array:
        """X of a fitted estimator."""
        check_is_fitted(self, "coef_")
        checked: Array = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return checked

    def _run(self, X: Array, state: State | None) -> Iterator[tuple[torch.Tensor, State]]:
        """The features of each chunk `[steps, n]`, and the state after it."""
        x = _tensor(X)
        x = x.unsqueeze(2) if self._features_are_rows else x.unsqueeze(1)
        layers, rows = self._layers(x.dtype), x.shape[1]
        states: Any = [(None, None)] * len(layers)
        if state is not None:
            states = [tuple(part.to(x.dtype) for part in own) for own in _check_state(state, layers, rows)]
        with torch.no_grad():
            for begin in range(0, len(x), CHUNK):
                y, after = x[begin : begin + CHUNK], list[tuple[torch.Tensor, ...]]()
                for (cell, weights), (h, c) in zip(layers, states, strict=True):
                    y, *last = functional.rnn(cell, y, h, c if CELLS[cell].carried else None, [[weights]])
                    after.append(tuple(last))
                states = after
                if not y.sum().isfinite():
                    raise ValueError("the states have become infinite: a leak, scaling or spectral radius is too large")
                yield y.flatten(1), states

    def _read(self, features: torch.Tensor) -> Array:
        weights = torch.from_numpy(np.atleast_2d(self.coef_).astype(features.numpy().dtype, copy=False))
        found: Array = (features @ weights.T).numpy() + self.intercept_
        return found


class Sums:
    """What a ridge regression has to know of its inputs and targets: sums over steps, of both less some value near
    their means, so that large means do not swamp what varies."""

    def __init__(self, input: torch.Tensor, target: torch.Tensor) -> None:
        self.input, self.target, n = input, target, len(input) + 1
        self.gram, self.moment = input.new_zeros(n, n), input.new_zeros(n, len(target))

    def copy(self) -> Sums:
        other = Sums(self.input, self.target)
        other.gram, other.moment = self.gram.clone(), self.moment.clone()
        return other

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Of the symmetric one only blocks on and above the diagonal."""
        n = len(self.gram)
        less = self.gram.new_ones(len(inputs), n)
        torch.sub(inputs, self.input, out=less[:, 1:])
        block = -(-n // BLOCKS)
        for begin in range(0, n, block):
            self.gram[begin : begin + block, begin:].addmm_(less[:, begin : begin + block].T, less[:, begin:])
        self.moment.addmm_(less.T, targets - self.target)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The coefficients `[outputs, n]` and the intercepts, which have no penalty."""
        gram = self.gram.triu() + self.gram.triu(1).T
        gram.diagonal()[1:].add_(ridge)
        found = torch.linalg.lstsq(gram, self.moment, driver="gelsd").solution.T
        coefficients = found[:, 1:].contiguous()
        return coefficients, found[:, 0] + self.target - coefficients @ self.input


class Online:
    """An estimator's predictions, one step per call.

    Attributes:
        y: the prediction after the last step, `[outputs]` or a number, as y was.
    """

    def __init__(self, estimator: _Readout, state: State | None) -> None:
        self._estimator = estimator
        layers = estimator._layers(torch.from_numpy(np.empty(0, estimator._dtype)).dtype)
        rows = estimator.n_features_in_ if estimator._features_are_rows else 1
        self._streams = [Stream(cell, [[weights]], rows) for cell, weights in layers]
        known = () if state is None else _check_state(state, layers, rows)
        for stream, own in zip(self._streams, known, strict=False):
            h, *others = stream.state if isinstance(stream.state, tuple) else (stream.state,)
            h.copy_(own[0])
            for part, value in zip(others, own[1].chunk(max(1, len(others)), dim=-1), strict=False):
                part.copy_(value)
        last = self._streams[-1].state
        self._predict((last[0] if isinstance(last, tuple) else last)[0])

    def __call__(self, x: ArrayLike) -> Any:
        """Advances by x `[features]`; returns `y`.

        Raises:
            ValueError: x has another shape.
        """
        array = np.asarray(x, dtype=self._estimator._dtype).reshape(-1)
        if len(array) != self._estimator.n_features_in_:
            raise ValueError(f"x: expected {self._estimator.n_features_in_} features, got {len(array)}")
        y = torch.from_numpy(array)
        y = y.unsqueeze(1) if self._estimator._features_are_rows else y.unsqueeze(0)
        for stream in self._streams:
            y = stream(y)
        self._predict(y)
        return self.y

    def _predict(self, features: torch.Tensor) -> None:
        found = self._estimator._read(features.reshape(1, -1))
        self.y = found.reshape(self._estimator._outputs) if self._estimator._outputs else float(found.item())


class EchoStateNetwork(_Readout):
    r"""Echo state network (Jaeger 2001; leaky units: Jaeger et al. 2007).

    .. math::
        h_t &= (1 - \mathrm{leak}) \odot h_{t-1} + \mathrm{leak} \odot f(W_{in} x_t + b + W h_{t-1}) \\
        y_t &= W_{out} h_t + b_{out}

    W is sparse and random, with a given spectral radius; :math:`W_{in}` is uniform in ±input_scaling, b in
    ±bias_scaling. Only :math:`W_{out}` and :math:`b_{out}` are fitted, by ridge regression.

    Parameters:
        units: how many.
        spectral_radius: the largest absolute value of W's eigenvalues.
        leak: a number, or one for each unit.
        input_scaling, bias_scaling: see above.
        connectivity: the share of the units that each one is connected to.
        activation: "tanh", "sigmoid" or "relu".
        ridge: the penalty of the squared weights of the readout.
        washout: how many steps of each series are left out of the fit.
        random_state: as of scikit-learn.

    Attributes:
        coef_, intercept_: of the readout, as of scikit-learn's Ridge.
        input_weights_, recurrent_weights_, bias_: `[units, features]`, `[units, units]` and `[units]`.
        state_: after the last series that was fitted.
    """

    def __init__(
        self,
        units: int = 100,
        *,
        spectral_radius: float = 0.9,
        leak: ArrayLike = 1.0,
        input_scaling: float = 1.0,
        bias_scaling: float = 0.0,
        connectivity: float = 0.1,
        activation: str = "tanh",
        ridge: float = 1e-6,
        washout: int = 0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.units = units
        self.spectral_radius = spectral_radius
        self.leak = leak
        self.input_scaling = input_scaling
        self.bias_scaling = bias_scaling
        self.connectivity = connectivity
        self.activation = activation
        self.ridge = ridge
        self.washout = washout
        self.random_state = random_state

    def _prepare(self) -> None:
        units, draw = _integer("units", self.units, 1), check_random_state(self.random_state)
        if self.activation not in ("tanh", "sigmoid", "relu"):
            raise ValueError(f"activation: expected 'tanh', 'sigmoid' or 'relu', got {self.activation!r}")
        self._cell, self._leak = f"leaky_{self.activation}", _shares("leak", self.leak, units)
        matrix = _sparse(draw, units, _number("connectivity", self.connectivity, 0, 1))
        radius = _spectral_radius(matrix, draw)
        if radius == 0 and matrix.any():
            warnings.warn(
                f"{units} units with a connectivity of {self.connectivity} have no cycle, and so no spectral radius: "
                "their weights are left as they are drawn, up to 1",
                UserWarning,
                stacklevel=4,
            )
        self.recurrent_weights_ = matrix * (
            _number("spectral_radius", self.spectral_radius, 0) / radius if radius else 1
        )
        scaling = _number("input_scaling", self.input_scaling, 0), _number("bias_scaling", self.bias_scaling, 0)
        self.input_weights_ = scaling[0] * draw.uniform(-1, 1, (units, self.n_features_in_))
        self.bias_ = scaling[1] * draw.uniform(-1, 1, units)

    def _layers(self, dtype: torch.dtype) -> list[tuple[str, Weights]]:
        w_in, w, b, leak = _tensors(dtype, self.input_weights_, self.recurrent_weights_, self.bias_, self._leak)
        return [(self._cell, Weights(w_in, w, b, torch.zeros_like(b), w_own=leak[None]))]


class LiquidStateMachine(_Readout):
    r"""Liquid state machine (Maass, Natschläger and Markram 2002): leaky integrate-and-fire units.

    .. math::
        v_t &= v_{t-1} + \tfrac{1}{\tau} (W_{in} x_t + b + W s_{t-1} - v_{t-1}) \text{ where a unit does not rest} \\
        s_t &= v_t > 1, \text{ whereupon } v = 0 \text{ until it has rested for } \mathrm{refractory} \text{ steps} \\
        r_t &= (1 - \tfrac{1}{\tau_r}) r_{t-1} + \tfrac{1}{\tau_r} s_t \\
        y_t &= W_{out} r_t + b_{out}

    W is sparse and random; a unit's outgoing weights are all positive, or all negative for the share `inhibitory` of
    units. A threshold of 1 is no restriction: potentials have no unit.

    Parameters:
        units, connectivity, ridge, washout, random_state: as of `EchoStateNetwork`.
        tau, trace: the time constants of the potential and of the readout's trace r of spikes, in steps.
        refractory: how many steps a unit rests after a spike.
        inhibitory: the share of the units whose spikes lower the potentials of others.
        recurrent_scaling: W's nonzero weights are uniform in 0..recurrent_scaling * tau / (connectivity * units).
        input_scaling, bias_scaling: :math:`W_{in}` is uniform in ±input_scaling, b in 0..bias_scaling.

    Attributes: as of `EchoStateNetwork`.
    """

    def __init__(
        self,
        units: int = 100,
        *,
        tau: float = 10.0,
        trace: float = 10.0,
        refractory: int = 2,
        inhibitory: float = 0.2,
        recurrent_scaling: float = 1.0,
        input_scaling: float = 2.0,
        bias_scaling: float = 1.5,
        connectivity: float = 0.1,
        ridge: float = 1e-6,
        washout: int = 0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.units = units
        self.tau = tau
        self.trace = trace
        self.refractory = refractory
        self.inhibitory = inhibitory
        self.recurrent_scaling = recurrent_scaling
        self.input_scaling = input_scaling
        self.bias_scaling = bias_scaling
        self.connectivity = connectivity
        self.ridge = ridge
        self.washout = washout
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # of samples without an order, which rarely make a unit spike
        return tags

    def spikes(self, X: ArrayLike, state: State | None = None) -> Array:
        """Which units spike at which step: bool `[T, units]`."""
        x = _tensor(self._checked(X)).unsqueeze(1)
        layers = self._layers(x.dtype)
        h, c = (None, None) if state is None else (part.to(x.dtype) for part in _check_state(state, layers, 1)[0])
        with torch.no_grad():
            s, _, _ = functional.rnn("spiking", x, h, c, [[layers[0][1]]])
        found: Array = s[:, 0].numpy() > 0.5
        return found

    def _prepare(self) -> None:
        units, draw = _integer("units", self.units, 1), check_random_state(self.random_state)
        tau, trace = _number("tau", self.tau, 1), _number("trace", self.trace, 1)
        share = _number("connectivity", self.connectivity, 0, 1)
        size = _number("recurrent_scaling", self.recurrent_scaling, 0) * tau / max(1.0, share * units)
        sign = np.where(draw.uniform(size=units) < _number("inhibitory", self.inhibitory, 0, 1), -1.0, 1.0)
        self.recurrent_weights_ = size * np.abs(_sparse(draw, units, share)) * sign
        self.input_weights_ = _number("input_scaling", self.input_scaling, 0) * draw.uniform(
            -1, 1, (units, self.n_features_in_)
        )
        self.bias_ = _number("bias_scaling", self.bias_scaling, 0) * draw.uniform(0, 1, units)
        ones = np.ones(units)
        self._own = np.stack([ones / tau, ones, ones * _integer("refractory", self.refractory, 0)])
        self._trace = 1 / trace

    def _layers(self, dtype: torch.dtype) -> list[tuple[str, Weights]]:
        w_in, w, b, own = _tensors(dtype, self.input_weights_, self.recurrent_weights_, self.bias_, self._own)
        gain = torch.eye(len(b), dtype=dtype) * self._trace
        filters = Weights(torch.cat([gain, torch.zeros_like(gain)]), None)
        keep = torch.stack([torch.full_like(b, 1 - self._trace), torch.zeros_like(b)])
        return [
            ("spiking", Weights(w_in, w, b, torch.zeros_like(b), w_own=own)),
            ("diagonal", filters._replace(w_own=keep)),
        ]


class LegendreRegressor(_Readout):
    r"""A linear readout of the Legendre coefficients of the last `theta` steps of each feature (Voelker et al. 2019).

    .. math:: m_t = \bar A m_{t-1} + \bar B x_t, \quad y_t = W_{out} m_t + b_{out}

    Parameters:
        order: how many coefficients.
        theta: the length of the window in steps.
        ridge, washout: as of `EchoStateNetwork`.

    Attributes:
        coef_, intercept_, state_: as of `EchoStateNetwork`.
    """

    _features_are_rows = True

    def __init__(self, order: int = 6, theta: float = 10.0, *, ridge: float = 1e-6, washout: int = 0) -> None:
        self.order = order
        self.theta = theta
        self.ridge = ridge
        self.washout = washout

    def _prepare(self) -> None:
        self._a, self._b = discrete(_integer("order", self.order, 1), float(_number("theta", self.theta, 0)))

    def _layers(self, dtype: torch.dtype) -> list[tuple[str, Weights]]:
        linear = torch.zeros(1, len(self._b), dtype=dtype)
        return [("lmu", Weights(self._b.to(dtype)[:, None], self._a.to(dtype), w_own=linear))]


def _check_state(state: Any, layers: list[tuple[str, Weights]], rows: int) -> Any:
    """Raises a ValueError where `state` is not what these layers leave after a series."""
    wanted: list[tuple[tuple[int, ...], ...]] = []
    for cell, weights in layers:
        (H, P), carried = sizes(CELLS[cell], weights), CELLS[cell].carried
        wanted.append(((1, rows, P), (1 if carried else 0, rows, carried * H if carried else H)))
    is_state = isinstance(state, list | tuple) and all(isinstance(own, list | tuple) for own in state)
    if not is_state or [tuple(tuple(getattr(part, "shape", ())) for part in own) for own in state] != wanted:
        raise ValueError("state: expected what this estimator has as state_, or state_after returns")
    return state


def _tensor(X: Array) -> torch.Tensor:
    """Without a copy where torch can read the array."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


def _tensors(dtype: torch.dtype, *arrays: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays]


def _sparse(draw: np.random.RandomState, units: int, connectivity: float) -> Array:
    """Uniform in ±1 where units are connected, a share `connectivity` of all pairs."""
    found: Array = draw.uniform(-1, 1, (units, units)) * (draw.uniform(size=(units, units)) < connectivity)
    return found


def _spectral_radius(matrix: Array, draw: np.random.RandomState) -> float:
    """0 of a network without cycles, whose eigenvalues' rounded values would be anything."""
    sparse = csr_array(matrix)
    if connected_components(sparse, connection="strong")[0] == len(matrix) and not matrix.diagonal().any():
        return 0.0
    if len(matrix) > 200:
        # SciPy's BLAS has threads of its own, which go on spinning where torch's are to work next.
        with contextlib.suppress(ArpackError), threadpool_limits(1, "blas"):
            return float(abs(eigs(sparse, k=1, which="LM", v0=draw.uniform(-1, 1, len(matrix)))[0][0]))
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _integer(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or math.isinf(value):
        upper = "" if math.isinf(high) else f" and at most {high}"
        raise ValueError(f"{name}: expected a number of at least {low}{upper}, got {value!r}")
    return float(value)


def _shares(name: str, value: ArrayLike, units: int) -> Array:
    array: Array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (units,)) or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name}: expected a number between 0 and 1, or {units} of them, got {value!r}")
    shares: Array = np.broadcast_to(array, (units,)).copy()
    return shares
