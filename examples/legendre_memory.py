"""The Legendre memory: a delayed signal decoded with the Legendre polynomials.

Lecture 000: a pure delay is approximated by theta m' = A m + B u with

    a_ij = (2i + 1) (-1 if i < j else (-1)^(i-j+1)),    b_i = (2i + 1) (-1)^i,

whose state holds the last theta steps of the input: u(t - r theta) ~ sum_i P_i(r) m_i(t). Nothing is trained.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import fastrnn

THETA, T = 100, 1000  # the length of the window in steps, and of the signal
ORDERS = (3, 6, 12)


def signal(steps: int) -> torch.Tensor:
    """Sines with periods of 50 steps and more."""
    t = torch.arange(steps, dtype=torch.float64)[:, None]
    periods, phases = 50 + 150 * torch.rand(8, dtype=torch.float64), 6.28 * torch.rand(8, dtype=torch.float64)
    return torch.sin(2 * torch.pi * t / periods + phases).mean(1)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    u = signal(T)
    delays = torch.linspace(0, THETA - 1, 21).round()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    right.plot(u[501 - THETA : 701 - THETA], color="black", label=f"the input of {THETA - 1} steps ago")
    for order in tqdm(ORDERS, desc="orders"):
        memory = fastrnn.LegendreMemory(order, THETA, dtype=torch.float64)
        m, _ = memory(u[:, None, None])
        found = m[:, 0, 0] @ memory.decoder(delays).T  # [T, delays]
        exact = torch.stack([u.roll(int(delay)) for delay in delays], dim=1)
        error = (found - exact)[2 * THETA :].square().mean(0).sqrt() / u.std()
        print(f"order {order}: error {error[-1]:.1%} of the signal {THETA - 1} steps ago, ", end="")
        print(f"{error.mean():.1%} over the window")
        left.plot(delays, error, marker=".", label=f"order {order}")
        right.plot(found[500:700, -1], linestyle="--", label=f"order {order}")
    left.set(xlabel="steps ago", ylabel="error / signal", yscale="log")
    right.set(xlabel="step")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out / "legendre_memory.png", dpi=100)
    two_ways(max(512, round(20000 * effort)))


def two_ways(steps: int):
    """The same states by chunks in parallel, and one step after the other."""
    memory, u = fastrnn.LegendreMemory(12, THETA), torch.randn(steps, 1, 1)
    begin = time.perf_counter()
    m, _ = memory(u)
    middle = time.perf_counter()
    step = memory.stream(copy=True)
    online = torch.stack([step(now) for now in u])
    end = time.perf_counter()
    difference = (online - m[:, :, 0]).abs().max()
    print(
        f"{steps} steps by chunks: {1e3 * (middle - begin):.1f} ms; one by one: {1e3 * (end - middle):.1f} ms; ", end=""
    )
    print(f"largest difference {difference:.1e}")
