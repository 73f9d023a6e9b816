"""Jordan and Elman networks: what is fed back, the output or the hidden state.

Lecture 002 (with the activations of lecture 004): the network of Elman (1990) feeds back its hidden state, that of
Jordan (1986) its output:

    Elman:  h_t = tanh(W x_t + U h_{t-1} + b),  y_t = g(V h_t + c)
    Jordan: h_t = tanh(W x_t + U y_{t-1} + b),  y_t = sigmoid(V h_t + c)

A Jordan network remembers what it has answered. The parity of all bits so far needs nothing else. The XOR of the last
two bits does: it does not tell what the last bit was. A Jordan network has no place for that bit but the small errors
of its outputs. It learns to use them, but slowly, and the bit is lost when what is fed back is rounded to 0 or 1.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn

T, B, H, SEEDS = 12, 64, 16, 5
ACTIVATIONS = [nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.GELU(), nn.Softplus(), nn.ELU(), nn.LeakyReLU(), nn.PReLU()]


class Elman(nn.Module):
    """A fed-back state of H units, and an output."""

    def __init__(self, g: nn.Module = ACTIVATIONS[0]):
        super().__init__()
        self.recurrent, self.output, self.g = fastrnn.RNN(1, H), nn.Linear(H, 1), g

    def forward(self, x):
        return self.g(self.output(self.recurrent(x)[0]))


class Jordan(nn.Module):
    """H hidden units and H outputs, all of which are to be the answer: none is free to remember other things."""

    def __init__(self):
        super().__init__()
        self.recurrent = fastrnn.JordanRNN(1, H)

    def forward(self, x, rounded=False):
        if not rounded:
            return self.recurrent(x)[0]
        ys = [x.new_zeros(1, len(x[0]), H)]
        for x_t in x.split(1):
            ys.append(self.recurrent(x_t, ys[-1])[0].round())
        return torch.cat(ys[1:])


def parity(bits):
    """Of all bits so far."""
    return bits.cumsum(0) % 2


def xor(bits):
    """Of the last two bits; before the first comes a 0."""
    return (bits + nn.functional.pad(bits, (0, 0, 0, 0, 1, 0))[:-1]) % 2


def right(y, wanted):
    return ((y > 0.5) == (wanted > 0.5)).float().mean().item()


def train(model, task, loss_of, steps, desc):
    """The share of right answers and the loss in each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    shares, losses = [], []
    for _ in trange(steps, desc=desc):
        bits = torch.randint(2, (T, B, 1)).float()
        y, wanted = model(bits), task(bits)
        loss = loss_of(y, wanted.expand_as(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(right(y, wanted))
        losses.append(loss.item())
    return torch.tensor(shares), torch.tensor(losses)


def main(effort: float, out: Path):
    steps = max(2, round(400 * effort))
    _, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for task, panel in zip((parity, xor), panels, strict=True):
        for make in (Elman, Jordan):
            name, curves, rounded = f"{task.__name__}, {make.__name__}", [], []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                model = make()
                curves.append(train(model, task, nn.functional.binary_cross_entropy, steps, f"{name}, seed {seed}")[0])
                if make is Jordan:
                    bits = torch.randint(2, (T, 1000, 1)).float()
                    with torch.no_grad():
                        rounded.append(right(model(bits, rounded=True), task(bits)))
            curve = torch.stack(curves).mean(0)
            print(f"{name}: {curve[-50:].mean():.1%} of the answers are right, 95% after {(curve < 0.95).sum()} steps")
            if rounded:
                print(f"{name}, what is fed back rounded: {sum(rounded) / SEEDS:.1%}")
            panel.plot(curve, label=make.__name__)
        panel.set_title("parity of all bits" if task is parity else "XOR of the last two bits")
        panel.set_xlabel("step of training")
    panels[0].set_ylabel(f"right answers, mean of {SEEDS} trainings")
    panels[1].legend()
    plt.tight_layout()
    plt.savefig(out / "jordan.png", dpi=100)

    print("\nElman's network with each output g of lecture 004's table, squared error, XOR:")
    for g in ACTIVATIONS:
        torch.manual_seed(0)
        shares, losses = train(Elman(g), xor, nn.functional.mse_loss, steps, type(g).__name__)
        print(f"  {type(g).__name__:10} error {losses[-50:].mean():.5f}, {shares[-50:].mean():.1%} right")
