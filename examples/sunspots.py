"""Sunspots: a windowed series, next year's number from the last years.

Lecture 001: an overlapping windowed data set makes samples of a series, here the numbers of w years,

    x_n = (s_n, s_{n+1}, ..., s_{n+w-1}),    target s_{n+w}.

A GRU reads a window year by year; a linear autoregression is a sum of the window's numbers, weighted by least squares.
Both learn from the years before those of the test. The lecture notes that a network without recurrence does not see the
order: with the years of all windows rearranged in the same way, the linear one has the same error. The recurrent one
reads one year after the other.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import statsmodels.api as sm
import torch
from torch import nn
from tqdm import trange

import fastrnn

FIRST_UNREAD, FIRST_TEST = 1900, 1940  # the years between choose when to stop training; then come the test's
WINDOWS = 3, 11, 22  # the lecture's, and one and two cycles of the sun
SHOWN = 11
SEEDS = 5


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = fastrnn.GRU(1, 32)
        self.output = nn.Linear(32, 1)

    def forward(self, windows):  # [B, w]
        return self.output(self.recurrent(windows.T[:, :, None])[0][-1])[:, 0]


def gru(windows, targets, parts, steps: int, name: str):
    """Predictions for all windows: the mean of some networks, each at its best step on the years before the test."""
    training, stopping = parts["training"], parts["stopping"]
    predictions = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, lowest = Forecaster(), float("inf")
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in trange(steps, desc=f"{name}, seed {seed}"):
            predicted = model(windows)
            error = nn.functional.mse_loss(predicted[stopping], targets[stopping]).item()
            if error < lowest:
                lowest, best = error, predicted.detach()
            loss = nn.functional.mse_loss(predicted[training], targets[training])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        predictions.append(best)
    return torch.stack(predictions).mean(0)


def linear(windows, targets, parts):
    """Predictions for all windows of the autoregression that fits best before the test."""
    inputs = torch.cat([windows, torch.ones(len(windows), 1)], dim=1)
    known = parts["training"] | parts["stopping"]
    return inputs @ torch.linalg.lstsq(inputs[known], targets[known]).solution


def main(effort: float, out: Path):
    torch.set_num_threads(1)  # networks this small are not worth a second thread
    data = sm.datasets.sunspots.load_pandas().data
    years = torch.tensor(data["YEAR"].to_numpy()).int()
    series = torch.tensor(data["SUNACTIVITY"].to_numpy(), dtype=torch.float32)
    scale = series[years < FIRST_UNREAD].std()
    steps = max(2, round(600 * effort))
    better = worse = 0

    print(f"root of the mean squared error in sunspots, {FIRST_TEST} to {years[-1]}:")
    for w in WINDOWS:
        windows, targets, when = series.unfold(0, w, 1)[:-1] / scale, series[w:] / scale, years[w:]
        parts = {
            "training": when < FIRST_UNREAD,
            "stopping": (when >= FIRST_UNREAD) & (when < FIRST_TEST),
            "test": when >= FIRST_TEST,
        }
        rearranged = windows[:, torch.randperm(w, generator=torch.Generator().manual_seed(0))]
        predictions = {
            "same as last year": windows[:, -1],
            "linear": linear(windows, targets, parts),
            "linear, rearranged": linear(rearranged, targets, parts),
            "GRU": gru(windows, targets, parts, steps, f"{w} years"),
            "GRU, rearranged": gru(rearranged, targets, parts, steps, f"{w} years, rearranged"),
        }
        test = parts["test"]
        print(f"  windows of {w} years")
        errors = {
            name: scale * nn.functional.mse_loss(predicted[test], targets[test]).sqrt()
            for name, predicted in predictions.items()
        }
        print("\n".join(f"    {error:4.1f} {name}" for name, error in errors.items()))
        better += errors["GRU"] < errors["linear"]
        worse += errors["GRU, rearranged"] > errors["GRU"]
        if w == SHOWN:
            plt.figure(figsize=(7, 3.5))
            plt.plot(when[test], scale * targets[test], "k.-", label="sunspots")
            for name in ("linear", "GRU"):
                plt.plot(when[test], scale * predictions[name][test], label=f"{name}, of {w} years")
            plt.xlabel("year")
            plt.ylabel("sunspots")
            plt.legend(fontsize=8)
            plt.tight_layout()
            plt.savefig(out / "sunspots.png", dpi=100)
    print(f"the GRU predicts better than the linear one with {better} of {len(WINDOWS)} lengths of window,")
    print(f"and worse from rearranged years than from years in order with {worse} of {len(WINDOWS)}")
    peaks = series[years < FIRST_UNREAD].max(), series[years >= FIRST_TEST].max()
    print(f"most sunspots of a year: {peaks[0]:.0f} in the years of training, {peaks[1]:.0f} in those of the test")
