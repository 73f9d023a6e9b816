"""Gradient clipping, orthogonal matrices and the forget bias: three remedies, each with and without.

Lectures 001, 003 and 004. Against exploding gradients, clip the norm of the gradient g of all parameters:

    if ||g|| > u:  g <- g u / ||g||.

Against exploding and vanishing ones, make U orthogonal at first: all its singular values are 1. And an LSTM's gradient
shrinks by its forget gate, dc_t / dc_{t-1} = f_t, so give the gate a bias that opens it: sigmoid(0) = 0.5 leaves 1e-6
after 20 steps, sigmoid(1) = 0.73 leaves 0.002, sigmoid(3) = 0.95 leaves 0.4. The task is to name the first of many
random symbols after the last one. Clipping is shown with plain SGD; Adam scales its steps itself and needs it less.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn

SYMBOLS, B, H = 8, 32, 64
SEEDS = 3


def rnn():
    return fastrnn.RNN(SYMBOLS, H)


def orthogonal_rnn():
    return fastrnn.init.orthogonal_(fastrnn.RNN(SYMBOLS, H))


def lstm(bias: float):
    return fastrnn.init.forget_bias_(fastrnn.LSTM(SYMBOLS, H), value=bias)


def train(layer, steps: int, length: int, optimizer_of, largest: float, name: str):
    """Learns to name the first of `length` symbols; returns the losses and the norms of the gradient."""
    output, one_hot = nn.Linear(H, SYMBOLS), torch.eye(SYMBOLS)
    parameters = [*layer.parameters(), *output.parameters()]
    optimizer = optimizer_of(parameters)
    losses, norms = [], []
    for _ in trange(steps, desc=name):
        symbols = torch.randint(SYMBOLS, (length, B))
        loss = nn.functional.cross_entropy(output(layer(one_hot[symbols])[0][-1]), symbols[0])
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, largest).item())  # the norm before clipping
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


RUNS = {  # title: length, optimizer, {name: (layer, largest norm of the gradient)}
    "gradient clipping, RNN": (
        20,
        sgd,
        {"not clipped": (orthogonal_rnn, math.inf), "clipped to norm 1": (orthogonal_rnn, 1.0)},
    ),
    "orthogonal U, RNN": (40, adam, {"uniform": (rnn, 1.0), "orthogonal": (orthogonal_rnn, 1.0)}),
    "forget bias, LSTM": (
        20,
        adam,
        {f"bias {bias}": (lambda bias=bias: lstm(bias), 1.0) for bias in (0.0, 1.0, 3.0)},
    ),
}


def main(effort: float, out: Path):
    torch.set_num_threads(1)  # layers this small are not worth a second thread
    steps = max(2, round(800 * effort))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), sharey=True)
    print(f"loss at the end, with {SEEDS} seeds, and the largest norm of a gradient before clipping")
    print(f"(the loss of a guess is log {SYMBOLS} = {math.log(SYMBOLS):.2f})")
    for axis, (title, (length, optimizer_of, variants)) in zip(axes, RUNS.items(), strict=True):
        print(f"{title}, the first of {length} symbols:")
        for name, (make, largest) in variants.items():
            losses, norms = [], []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                result = train(make(), steps, length, optimizer_of, largest, f"{name}, seed {seed}")
                losses.append(result[0])
                norms.append(result[1])
            losses, norms = torch.tensor(losses), torch.tensor(norms)
            ends = "  ".join(f"{loss:6.3f}" for loss in losses[:, -steps // 8 :].mean(1))
            print(f"  {name:20} {ends}   largest norm {norms.max():.1f}")
            window = max(1, steps // 40)
            means = losses.mean(0)[: steps // window * window].view(-1, window).mean(1)
            axis.plot(torch.arange(len(means)) * window, means, label=name)
        axis.axhline(math.log(SYMBOLS), color="gray", linestyle=":", label="a guess")
        axis.set_title(f"{title}, {length} symbols", fontsize=9)
        axis.set_xlabel("step of training")
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f"loss, mean of {SEEDS} seeds")
    figure.tight_layout()
    figure.savefig(out / "initialization.png", dpi=100)
