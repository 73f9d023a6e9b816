"""A cell of one's own, trained on the adding problem, and timed against the loop that it would be without fastrnn.

The equation is all there is to write:

    f_t = sigmoid(W_f x_t + U_f h_{t-1} + rate),    h_t = (1 - f_t) h_{t-1} + f_t tanh(W_n x_t + U_n (f_t h_{t-1})).
"""

import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import trange

import fastrnn

T, B, H = 60, 32, 128


@fastrnn.cell(gates="f n", states="h", unit_weights="rate")
def slow_unit(x, u, h, rate):
    """A minimal gated unit whose units each have a rate of their own."""
    f = torch.sigmoid(x.f + u.f(h) + rate)
    n = torch.tanh(x.n + u.n(f * h))
    return (1 - f) * h + f * n


def loop(layer, x):
    """The same by hand: the product of the input for all steps at once, then step by step."""
    w_f, w_n = layer.weight_hh_l0.chunk(2)
    b_f, b_n = layer.bias_hh_l0.chunk(2)
    inputs = torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    h, outputs = x.new_zeros(x.shape[1], H), []
    for x_f, x_n in (step.chunk(2, dim=-1) for step in inputs):
        f = torch.sigmoid(x_f + torch.nn.functional.linear(h, w_f, b_f) + layer.rate_l0)
        n = torch.tanh(x_n + torch.nn.functional.linear(f * h, w_n, b_n))
        h = (1 - f) * h + f * n
        outputs.append(h)
    return torch.stack(outputs)


def adding_problem():
    """Numbers of which two are marked, and the sum of these two (Hochreiter and Schmidhuber 1997)."""
    values, marks = torch.rand(T, B), torch.zeros(T, B)
    rows = torch.arange(B)
    marks[torch.randint(0, T // 2, (B,)), rows] = 1
    marks[torch.randint(T // 2, T, (B,)), rows] = 1
    return torch.stack([values, marks], dim=-1), (values * marks).sum(0)


def seconds(step, blocks=15):
    step()
    times = []
    for _ in range(blocks):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    layer, head = fastrnn.Recurrent(slow_unit, 2, H), torch.nn.Linear(H, 1)
    torch.nn.init.uniform_(layer.rate_l0, -4, 0)  # units that remember for up to some 50 steps
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)

    begin = time.perf_counter()
    layer(adding_problem()[0])
    print(f"kernels compiled, or found on disk, in {time.perf_counter() - begin:.1f} s")

    losses = []
    for _ in trange(max(2, round(800 * effort)), desc="training"):
        x, target = adding_problem()
        loss = torch.nn.functional.mse_loss(head(layer(x)[0][-1])[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    first, last = losses[:20], losses[-20:]
    print(f"loss: {statistics.mean(first):.4f} at first, {statistics.mean(last):.4f} after {len(losses)} steps")

    x, _ = adding_problem()
    torch.testing.assert_close(layer(x)[0], loop(layer, x), rtol=1e-3, atol=1e-4)
    ours = seconds(lambda: layer(x)[0].sum().backward())
    by_hand = seconds(lambda: loop(layer, x).sum().backward())
    ratio = by_hand / ours
    print(f"forward and backward: {ours * 1e3:.1f} ms, the loop {by_hand * 1e3:.1f} ms, {ratio:.1f} times as long")

    plt.figure(figsize=(6, 3.5))
    plt.semilogy(losses)
    plt.axhline(1 / 6, color="gray", linestyle=":", label="always 1, the mean")
    plt.xlabel("step of training")
    plt.ylabel("squared error")
    plt.legend()
    plt.tight_layout()
    plt.savefig(out / "own_cell.png", dpi=100)
