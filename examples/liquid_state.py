"""A liquid state machine: spikes of untrained units, from which a readout tells what the input was.

Lecture 000: like an echo state network, with units that integrate, leak and fire,

    v_t = v_{t-1} + (W_in x_t + b + W s_{t-1} - v_{t-1}) / tau,    s_t = 1 where v_t > 1, whereupon v rests at 0,

of which a linear readout sees a trace r_t = r_{t-1} + (s_t - r_{t-1}) / tau_r. The input is a slow random signal; the
readout is to give it as it was some steps ago, so that the answer lies in the spikes alone.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from fastrnn.reservoir import LiquidStateMachine

UNITS, SHOWN = 300, 400
DELAYS = (0, 5, 10, 20, 40)


def signal(steps: int, draw: np.random.RandomState) -> np.ndarray:
    """Random sines with periods of 40 to 200 steps."""
    t = np.arange(steps)[:, None]
    waves = np.sin(2 * np.pi * t / draw.uniform(40, 200, 12) + draw.uniform(0, 2 * np.pi, 12))
    return waves.mean(1) * 3


def main(effort: float, out: Path):
    draw = np.random.RandomState(0)
    x = signal(max(1500, round(20000 * effort)), draw)
    half = len(x) // 2
    lsm = LiquidStateMachine(UNITS, ridge=1e-4, washout=100, random_state=0)
    for delay in tqdm(DELAYS, desc="readouts"):
        target = np.roll(x, delay)
        lsm.fit(x[:half, None], target[:half])
        found = lsm.predict(x[half:, None], lsm.state_)
        score = np.corrcoef(found, target[half:])[0, 1] ** 2
        print(f"the input of {delay} steps ago: {score:.1%} of its variance read out of the spikes")
        if delay == 10:
            shown = found[:SHOWN], target[half : half + SHOWN]
    spikes = lsm.spikes(x[half : half + SHOWN, None], lsm.state_)
    print(f"{spikes.mean():.1%} of the units spike at a step; {(spikes.sum(0) == 0).mean():.0%} never in {SHOWN} steps")

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
    times, units = np.nonzero(spikes[:, :100])
    upper.plot(times, units, ".", markersize=1.5, color="black")
    upper.set(ylabel="unit")
    lower.plot(shown[1], label="the input of 10 steps ago")
    lower.plot(shown[0], linestyle="--", label="read out of the spikes")
    lower.set(xlabel="step")
    lower.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out / "liquid_state.png", dpi=100)
