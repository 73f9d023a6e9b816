"""Leaky units and continuous time: units that follow their input slowly.

Lectures 001 and 002: a leaky unit keeps a running average of the past; lecture 001's alpha is 1 - leak.

    h_t = (1 - leak) h_{t-1} + leak f(W x_t + U h_{t-1} + b)

With U = 0 it forgets by a factor e in -1 / log(1 - leak) steps, about 1 / leak, and passes sqrt(leak / (2 - leak)) of a
noise's standard deviation. A trained leak finds the time scale of a task: of a signal that walks at random and is seen
in noise, the average that predicts best has Kalman's gain as its leak. A continuous-time network,

    tau dv/dt = -v + W x + U tanh(v),

is the limit of small steps: with leak = dt / tau, Euler's method, its step response nears 1 - exp(-t / tau).
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn


def averages(leak):
    """One leaky unit for each input: relu, of numbers that are positive, changes nothing."""
    layer = fastrnn.RNN(len(leak), len(leak), nonlinearity="relu", bias=False, leak=leak)
    nn.init.eye_(layer.weight_ih_l0)
    nn.init.zeros_(layer.weight_hh_l0)
    return layer.requires_grad_(False)


def time_constant(response, dt=1.0):
    """When a step response `[T]` from 0 to 1 crosses 1 - 1/e, its first value at dt; exponential between values."""
    missing = 1 - torch.cat([torch.zeros(1), response])
    after = int((missing < torch.e**-1).nonzero()[0])
    before, now = -missing[after - 1 : after + 1].log()
    return float(after - 1 + (1 - before) / (now - before)) * dt


def step_of_several_scales(panel):
    leak, noise, T, begin = torch.tensor([0.5, 0.1, 0.02]), 0.2, 180, 40
    step = 1 + (torch.arange(T) >= begin).float()
    layer, start = averages(leak), torch.ones(1, 3)
    clean, noisy = step[:, None].expand(T, 3), (step + noise * torch.randn(T))[:, None].expand(T, 3)
    long_noise = 2 + noise * torch.randn(20000, 1).expand(20000, 3)
    responses, ripple = layer(clean, start)[0][begin:] - 1, layer(long_noise)[0][2000:].std(0) / noise
    for i, a in enumerate(leak):
        scale, passed = -1 / (1 - a).log(), (a / (2 - a)).sqrt()
        print(f"leak {a:.2f}: time constant {time_constant(responses[:, i]):.2f} steps, expected {scale:.2f};", end=" ")
        print(f"passes {ripple[i]:.3f} of the noise, expected {passed:.3f}")
    panel.plot(noisy[:, 0], color="0.8", label="input")
    for a, curve in zip(leak, layer(noisy, start)[0].T, strict=True):
        panel.plot(curve, label=f"leak {a:.2f}")
    panel.set_xlabel("step")
    panel.set_title("averages of a noisy step")
    panel.legend(fontsize=8)


def trained_leaks(steps, panel):
    """Of three walks, each in another noise, the average predicts the next observation."""
    walk, noise = 0.1, torch.tensor([0.1, 0.3, 1.0])
    layer = averages(nn.Parameter(torch.full((3,), 0.5)))
    layer.leak_l0.requires_grad_(True)
    optimizer = torch.optim.Adam([layer.leak_l0], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    leaks = []
    for _ in trange(steps):
        signal = 10 + (walk * torch.randn(200, 32, 3)).cumsum(0)
        observed = signal + noise * torch.randn(200, 32, 3)
        predicted, _ = layer(observed[:-1], torch.full((1, 32, 3), 10.0))
        loss = ((predicted - observed[1:]) / noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        leaks.append(layer.leak_l0.detach().clone())
    q = (walk / noise) ** 2
    gain = ((q**2 + 4 * q).sqrt() - q) / 2
    for i, n in enumerate(noise):
        print(f"walk of 0.1 a step in noise of {n:.1f}: trained leak {leaks[-1][i]:.3f}, Kalman's gain {gain[i]:.3f}")
        panel.plot([leak[i] for leak in leaks], color=f"C{i}", label=f"noise {n:.1f}")
        panel.axhline(gain[i], color=f"C{i}", linestyle=":")
    panel.set_xlabel("step of training")
    panel.set_title("trained leaks, Kalman's gains")
    panel.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.72))


@torch.no_grad()
def continuous_time(panel):
    tau = torch.tensor([0.5, 1.0, 2.0])
    for dt in (0.25, 0.05, 0.01):
        layer, steps = fastrnn.CTRNN(1, 3, bias=False), round(5 / dt)
        nn.init.ones_(layer.weight_ih_l0)
        nn.init.zeros_(layer.weight_hh_l0)
        layer.leak_l0.copy_(dt / tau)
        v = layer(torch.ones(steps, 1))[0].atanh()  # its output is tanh(v)
        time = dt * torch.arange(1, steps + 1)
        exact = 1 - (-time[:, None] / tau).exp()
        measured = ", ".join(f"{time_constant(curve, dt):.3f}" for curve in v.T)
        error = (v - exact).abs().max()
        print(f"CTRNN, dt {dt}: tau {measured} (set: 0.5, 1, 2); off the exact response by at most {error:.4f}")
        if dt == 0.25:
            panel.plot(time, v, ".", markersize=4)
    for i in range(3):
        panel.plot(time, exact[:, i], color=f"C{i}", label=f"tau {tau[i]:.1f}", linewidth=1)
    panel.set_xlabel("time (dots: dt 0.25, lines: exact)")
    panel.set_title("CTRNN's step response")
    panel.legend(fontsize=8)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    _, panels = plt.subplots(1, 3, figsize=(9, 3))
    step_of_several_scales(panels[0])
    trained_leaks(max(2, round(300 * effort)), panels[1])
    continuous_time(panels[2])
    plt.tight_layout()
    plt.savefig(out / "leaky.png", dpi=100)
