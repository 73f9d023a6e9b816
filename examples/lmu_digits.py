"""Legendre memory units: digits whose pixels come one by one, in a shuffled order.

Lecture 000 (Voelker, Kajić and Eliasmith 2019):

    u_t = e_x x_t + e_h h_{t-1} + e_m m_{t-1}
    m_t = A m_{t-1} + B u_t
    h_t = tanh(W_x x_t + W_h h_{t-1} + W_m m_t)

The paper reads the 784 pixels of MNIST in a fixed random order and gets 97.15 % right, an LSTM 89.86 %. Here are
scikit-learn's 8x8 digits, 64 steps, and networks of about equal size.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import trange

import fastrnn

PIXELS, B, TESTED = 64, 100, 360
NETWORKS = {
    "LMU": lambda: fastrnn.LMU(1, 64, order=24, theta=PIXELS),
    "LSTM": lambda: fastrnn.LSTM(1, 40),
    "RNN": lambda: fastrnn.RNN(1, 81),
}


class Classifier(nn.Module):
    def __init__(self, recurrent: nn.Module):
        super().__init__()
        self.recurrent, self.output = recurrent, nn.Linear(recurrent.hidden_size, 10)

    def forward(self, x):  # [64, B, 1]
        return self.output(self.recurrent(x)[0][-1])


def main(effort: float, out: Path):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.data).float()[:, torch.randperm(PIXELS)] / 16
    shuffled = torch.randperm(len(images))
    x, target = images[shuffled].T.unsqueeze(2), torch.from_numpy(digits.target)[shuffled]
    steps = max(2, round(1200 * effort))
    plt.figure(figsize=(6, 3.5))
    for name, make in NETWORKS.items():
        model = Classifier(make())
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        curve = []
        for step in trange(steps, desc=name):
            rows = torch.randint(TESTED, len(images), (B,))
            loss = nn.functional.cross_entropy(model(x[:, rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 49 or step == steps - 1:
                with torch.no_grad():
                    right = (model(x[:, :TESTED]).argmax(-1) == target[:TESTED]).float().mean().item()
                curve.append((step + 1, right))
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {right:.1%} of the {TESTED} digits held out, {count} parameters")
        plt.plot(*zip(*curve, strict=True), label=name)
    print("the paper, 784 pixels of MNIST: LMU 97.15 %, LSTM 89.86 %")
    plt.xlabel("step of training")
    plt.ylabel("digits right")
    plt.legend()
    plt.tight_layout()
    plt.savefig(out / "lmu_digits.png", dpi=100)
