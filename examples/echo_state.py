"""Echo state networks: memory capacity, and the Mackey-Glass series predicted by a network that is not trained.

Lecture 000: a reservoir is an ensemble of sparsely and randomly connected units, whose weights are chosen for
stability; what is learned is a regression on its states,

    h_t = (1 - leak) h_{t-1} + leak tanh(W_in x_t + b + W h_{t-1}),    y_t = W_out h_t + b_out.

Memory capacity (Jaeger 2001) is the sum over k of the squared correlation of the input k steps ago with its best
readout: at most the number of units. The Mackey-Glass series is predicted 84 steps ahead as in Jaeger and Haas 2004,
each prediction being the next input. If reservoirpy is there, its network is fitted to the same series in the same run.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from fastrnn.reservoir import EchoStateNetwork

UNITS, AHEAD, TESTED = 500, 84, 2000


def mackey_glass(steps: int, tau: int = 17, inner: int = 10) -> np.ndarray:
    """x' = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x, by Runge and Kutta's method with steps of 1 / inner."""
    x = np.full((steps + 1000) * inner + tau * inner + 1, 1.2)
    h, lag = 1 / inner, tau * inner

    def slope(value, delayed):
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * value

    for t in range(lag, len(x) - 1):
        now, later = x[t - lag], x[t - lag + 1]
        k1 = slope(x[t], now)
        k2 = slope(x[t] + h / 2 * k1, (now + later) / 2)
        k3 = slope(x[t] + h / 2 * k2, (now + later) / 2)
        k4 = slope(x[t] + h * k3, later)
        x[t + 1] = x[t] + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return np.tanh(x[-steps * inner :: inner] - 1)


def seconds(call) -> float:
    """The median of three calls."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[1]


def memory(radius: float, steps: int, longest: int = 100) -> np.ndarray:
    """The squared correlation with the input of 1 to `longest` steps ago, of 100 units."""
    x = np.random.RandomState(1).uniform(-0.5, 0.5, steps)
    delayed = np.stack([np.roll(x, k) for k in range(1, longest + 1)], axis=1)
    esn = EchoStateNetwork(100, spectral_radius=radius, input_scaling=0.1, ridge=1e-9, washout=200, random_state=0)
    half = steps // 2
    found = esn.fit(x[:half, None], delayed[:half]).predict(x[half:, None], esn.state_)
    return np.array([np.corrcoef(a, b)[0, 1] ** 2 for a, b in zip(found.T, delayed[half:].T, strict=True)])


def error_ahead(esn: EchoStateNetwork, series: np.ndarray, trials: int) -> tuple[float, np.ndarray]:
    """The normalized root mean square error after 84 steps by itself, from many places; and one of the forecasts."""
    starts = np.linspace(500, len(series) - AHEAD - 1, trials, dtype=int)
    errors = []
    for start in tqdm(starts, desc="forecasts"):
        forecast = esn.forecast(AHEAD, esn.state_after(series[start - 500 : start, None]))
        errors.append(forecast[-1] - series[start + AHEAD - 1])
    return float(np.sqrt(np.mean(np.square(errors)) / series.var())), forecast


def main(effort: float, out: Path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    for radius in (0.5, 0.8, 0.95):
        capacity = memory(radius, max(1000, round(8000 * effort)))
        print(f"spectral radius {radius}: memory capacity {capacity.sum():.1f} of 100 units")
        left.plot(range(1, 101), capacity, label=f"radius {radius}, sum {capacity.sum():.0f}")
    left.set(xlabel="steps ago", ylabel="squared correlation")
    left.legend(fontsize="small")

    steps = max(2000, round(20000 * effort))
    series = mackey_glass(steps + TESTED + 1).astype(np.float32)
    x, y, test = series[:steps, None], series[1 : steps + 1], series[-TESTED:]
    options = {"spectral_radius": 0.9, "leak": 0.7, "input_scaling": 1.0, "bias_scaling": 0.2, "ridge": 1e-9}
    esn = EchoStateNetwork(UNITS, **options, washout=100, random_state=0)
    times = {dtype: seconds(lambda dtype=dtype: esn.fit(x.astype(dtype), y)) for dtype in ("float64", "float32")}
    error, forecast = error_ahead(esn, test, max(2, round(100 * effort)))
    print(f"Mackey-Glass, {UNITS} units, {steps} steps: fitted in {times['float32']:.2f} s", end="; ")
    print(f"in float64 {times['float64']:.2f} s")
    print(f"error after {AHEAD} steps by itself: 10^{np.log10(error):.1f}", end="; ")
    print("published for 1000 units and 3000 steps: 10^-4.2")
    compare(x, y, options, times, esn)

    right.plot(test[-AHEAD - 1 : -1], label="the series")
    right.plot(forecast, linestyle="--", label="the network by itself")
    right.set(xlabel="step", ylabel="Mackey-Glass")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out / "echo_state.png", dpi=100)


def compare(x: np.ndarray, y: np.ndarray, options: dict, times: dict, esn: EchoStateNetwork):
    """The same fit by reservoirpy: time, and the error of one step."""
    try:
        from reservoirpy.nodes import Reservoir, Ridge
    except ImportError:
        print("reservoirpy is not there to be compared with")
        return
    sizes = {"sr": options["spectral_radius"], "lr": options["leak"], "rc_connectivity": 0.1, "bias": esn.bias_}
    x, y = x.astype(np.float64), y.astype(np.float64)  # which it computes in

    def fit():
        reservoir = Reservoir(UNITS, **sizes, input_connectivity=1.0, seed=0)
        return (reservoir >> Ridge(ridge=options["ridge"])).fit(x, y[:, None], warmup=100)

    theirs = seconds(fit)
    print(f"reservoirpy: fitted in {theirs:.2f} s, {theirs / times['float32']:.1f} times as long", end="; ")
    print(f"{theirs / times['float64']:.1f} times that in float64")
    found = {"fastrnn": esn.predict(x), "reservoirpy": fit().run(x)[:, 0]}
    errors = (f"{name} {np.sqrt(np.mean((value - y)[100:] ** 2)):.1e}" for name, value in found.items())
    print("root of the mean squared error of one step: " + ", ".join(errors))
