"""Connections between steps further apart than one: a copy across a lag that a plain network cannot learn.

Lectures 001 and 003: with connections d steps apart,

    h_t = tanh(W x_t + U_1 h_{t-1} + U_d h_{t-d} + b),

a gradient passes from step t to step t - k in k / d factors instead of k. Here ten symbols are to be repeated after a
pause. `fastrnn.Skip` has both connections, `fastrnn.Dilated` those of d steps alone; a chunk of d steps reads only the
chunk before it, so that its steps are computed together.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn

SYMBOLS, COPIED, LAG, B, H = 8, 10, 50, 64, 96
T = LAG + COPIED
NETWORKS = {
    "plain": lambda: fastrnn.RNN(SYMBOLS + 2, H),
    "skip": lambda: fastrnn.Skip(fastrnn.RNN(SYMBOLS + 2 + H, H), steps=LAG // 5),
    "dilated": lambda: fastrnn.Dilated(fastrnn.RNN(SYMBOLS + 2, H), steps=LAG // 5),
}


class Copier(nn.Module):
    def __init__(self, recurrent: nn.Module):
        super().__init__()
        self.recurrent, self.output = recurrent, nn.Linear(H, SYMBOLS)

    def forward(self, x):
        return self.output(self.recurrent(x)[0][LAG:])


def batch():
    """One-hot symbols `[T, B, SYMBOLS + 2]`: ten, a pause, and ten times the sign to answer; the ten themselves."""
    copied = torch.randint(SYMBOLS, (COPIED, B))
    x = torch.full((T, B), SYMBOLS)
    x[:COPIED], x[LAG:] = copied, SYMBOLS + 1
    return nn.functional.one_hot(x, SYMBOLS + 2).float(), copied


def main(effort: float, out: Path):
    steps = max(2, round(400 * effort))
    plt.figure(figsize=(6, 3.5))
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = Copier(make())
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        losses, begin = [], time.perf_counter()
        for _ in trange(steps, desc=name):
            x, copied = batch()
            scores = model(x)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), copied.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        each = (time.perf_counter() - begin) / steps
        right = (scores.argmax(-1) == copied).float().mean()
        print(f"{name}: {right:.0%} of the symbols right after {steps} steps of {each * 1e3:.1f} ms")
        plt.plot(losses, label=name)
    guess = torch.tensor(float(SYMBOLS)).log()
    print(f"a guess is right in {1 / SYMBOLS:.0%}")
    plt.axhline(guess, color="gray", linestyle=":", label="a guess")
    plt.xlabel("step of training")
    plt.ylabel("loss in nats per symbol")
    plt.legend()
    plt.tight_layout()
    plt.savefig(out / "skip.png", dpi=100)
