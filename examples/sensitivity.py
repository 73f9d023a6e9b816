"""Preservation of gradients: how much of the first input each hidden unit still feels.

Lecture 002, figures 4.1 and 4.3 (also 000, 001 and 003): the shade of a unit at step t is its sensitivity to the input
at step one, |dh_t / dx_1|. In a plain network it decays exponentially. An LSTM's cell,

    c_t = f_t * c_{t-1} + i_t * g_t,    h_t = o_t * tanh(c_t),    so dc_t / dc_{t-1} = f_t where gates ignore h,

keeps it while the forget gate is open and the input gate closed, and the output gate shows it or hides it without
touching the cell. Gates have to be in that state: by training, by a bias, or here also by hand. Gates of random
weights are half open, and such an LSTM forgets as well.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from tqdm import trange

import fastrnn

T, H = 24, 12
SHOWN = 7, 15, 23  # steps (from 0) at which the gates by hand let the cell out
OPEN = 10.0  # sigmoid(10) = 0.99995, sigmoid(-10) = 0.00005


def inputs():
    """`[T, 3]`: a random signal; 1 where it shall be written to the cell, the first step; 1 where it shall be shown."""
    x = torch.zeros(T, 3)
    x[:, 0] = torch.randn(T)
    x[0, 1] = 1
    x[list(SHOWN), 2] = 1
    return x


@torch.no_grad()
def lstm_by_hand():
    """Input gate open where x[1] is 1, output gate where x[2] is, forget gate always; g as it was initialised."""
    layer = fastrnn.LSTM(3, H)
    i, f, o = slice(0, H), slice(H, 2 * H), slice(3 * H, 4 * H)  # the gates' order is i, f, g, o
    for gate in (i, f, o):
        for parameter in layer.parameters():
            parameter[gate] = 0
    layer.bias_ih_l0[i], layer.weight_ih_l0[i, 1] = -OPEN, 2 * OPEN
    layer.bias_ih_l0[f] = OPEN
    layer.bias_ih_l0[o], layer.weight_ih_l0[o, 2] = -OPEN, 2 * OPEN
    return layer


def sensitivity(layer, x):
    """|d state_t / dx_1| of each unit, for each state that the layer has, `[states, T, H]`."""
    result = []
    for t in range(1, T + 1):
        copies = x[:t, None].repeat(1, H, 1).requires_grad_()  # row u is for unit u: one backward pass for all
        _, state = layer(copies)
        states = state if isinstance(state, tuple) else (state,)
        gradients = [torch.autograd.grad(s[0].diagonal().sum(), copies, retain_graph=True)[0] for s in states]
        result.append(torch.stack([gradient[0, :, 0].abs() for gradient in gradients]))
    return torch.stack(result, dim=1)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    networks = {
        "RNN": lambda: fastrnn.RNN(3, H),
        "GRU": lambda: fastrnn.GRU(3, H),
        "LSTM": lambda: fastrnn.LSTM(3, H),
        "LSTM, forget bias 3": lambda: fastrnn.init.forget_bias_(fastrnn.LSTM(3, H), 3.0),
        "LSTM, gates by hand": lstm_by_hand,
    }
    maps, shares = {}, {}
    for _ in trange(max(2, round(20 * effort)), desc="networks"):
        x = inputs()
        for name, make in networks.items():
            h, *others = sensitivity(make(), x)
            found = {name: h} | ({f"{name}: its cell": others[0]} if "by hand" in name else {})
            for key, value in found.items():
                maps[key] = value / value.max()
                norm = value.norm(dim=-1)
                shares.setdefault(key, []).append(norm / norm.max())

    print("sensitivity to the first input, as a share of its largest over time (mean of all networks):")
    steps = 0, 3, 7, 11, 15, 23
    print(f"{'at step':29}", *(f"{t + 1:>9}" for t in steps))
    for name, values in shares.items():
        mean = torch.stack(values).mean(0)
        print(f"{name:29}", *(f"{mean[t]:9.2g}" for t in steps))
    print(f"by hand, h is switched on at steps {', '.join(str(t + 1) for t in SHOWN)}")

    figure, axes = plt.subplots(2, 3, figsize=(9, 4.5), sharex=True, sharey=True, layout="constrained")
    edges = 0.5, T + 0.5, H + 0.5, 0.5
    for axis, (name, value) in zip(axes.flat, maps.items(), strict=True):
        image = axis.imshow(value.T.clamp(min=1e-4), cmap="Greys", norm=LogNorm(1e-4, 1), aspect="auto", extent=edges)
        axis.set_title(name, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("unit")
    figure.colorbar(image, ax=axes, label="sensitivity to the first input")
    figure.savefig(out / "sensitivity.png", dpi=100)
