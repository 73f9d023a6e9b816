"""Deep recurrent networks: one to four layers, with and without residual connections, of equal and of unequal sizes.

Lectures 001, 003 and 004: each layer reads the outputs of the one below,

    h_t^(l) = f(W^(l) h_t^(l-1) + U^(l) h_{t-1}^(l)),    h_t^(0) = x_t,

and may add its input to its output. The task has levels itself: from a stream of bits, whether the last three agree,
and then whether that has happened an odd number of times so far.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn

T, B = 40, 64
NETWORKS = {  # the sizes of the layers, and whether they are residual
    "1 layer": ((48,), False),
    "2 layers": ((48, 48), False),
    "3 layers": ((48, 48, 48), False),
    "4 layers": ((48, 48, 48, 48), False),
    "4 layers, residual": ((48, 48, 48, 48), True),
    "64, 48 and 32 units": ((64, 48, 32), False),
}


class Deep(nn.Module):
    def __init__(self, sizes: tuple[int, ...], residual: bool):
        super().__init__()
        inputs = 1, *sizes[:-1]
        layers = (fastrnn.GRU(below, size) for below, size in zip(inputs, sizes, strict=True))
        self.recurrent = fastrnn.Stack(*layers, residual=residual)
        self.output = nn.Linear(sizes[-1], 1)

    def forward(self, x):
        return self.output(self.recurrent(x)[0])


def batch():
    """Bits `[T, B, 1]`, and the parity of how often three in a row have agreed."""
    bits = torch.randint(2, (T, B, 1)).float()
    agree = torch.zeros(T, B, 1)
    agree[2:] = ((bits[2:] == bits[1:-1]) & (bits[1:-1] == bits[:-2])).float()
    return bits, agree.cumsum(0) % 2


def main(effort: float, out: Path):
    steps = max(2, round(700 * effort))
    plt.figure(figsize=(6, 3.5))
    for name, (sizes, residual) in NETWORKS.items():
        torch.manual_seed(0)
        model = Deep(sizes, residual)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        right = []
        for _ in trange(steps, desc=name):
            x, target = batch()
            scores = model(x)
            loss = nn.functional.binary_cross_entropy_with_logits(scores, target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right.append(((scores > 0) == target.bool()).float().mean().item())
        last = torch.tensor(right[-20:]).mean()
        learned = next((step for step, share in enumerate(right) if share > 0.95), None)
        when = f"95 % after {learned} steps" if learned else "never 95 %"
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {last:.1%} of the answers right after {steps} steps, {when}; {count} parameters")
        smooth = torch.tensor(right).unfold(0, min(10, steps), 1).mean(1)
        plt.plot(smooth, label=name)
    plt.xlabel("step of training")
    plt.ylabel("answers right")
    plt.legend(fontsize="small")
    plt.tight_layout()
    plt.savefig(out / "depth.png", dpi=100)
