"""Exploding and vanishing gradients in an Elman network.

Lectures 002, 003 and 004: backpropagation through time multiplies one Jacobian per step,

    dh_T / dh_k = prod_{j = k+1 .. T} diag(f'(a_j)) U,    a_j = W x_j + U h_{j-1},

so a gradient grows or shrinks exponentially with the number of steps. Which one, the lecture tells by the largest
singular value of U: above 1 or below. Here U is an orthogonal matrix times that value, where all singular values are
the same, or a random matrix scaled to it, where it is an upper bound and the spectral radius decides (the largest
absolute value of an eigenvalue). With all inputs zero f' is 1 and the network is linear. With random inputs tanh
saturates and a rectifier turns units off, which both make gradients smaller.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

import fastrnn

T, B, H = 101, 8, 64
HALF = (T - 1) // 2
SINGULAR = (0.5, 0.8, 1.0, 1.2, 1.5)  # the largest singular values of U
REGIMES = {"linear": ("tanh", 0.0), "tanh": ("tanh", 1.0), "relu": ("relu", 1.0)}  # nonlinearity, size of the inputs


def recurrent_matrix(kind: str, largest: float):
    """U `[H, H]` with this largest singular value."""
    U = torch.randn(H, H, dtype=torch.float64)
    if kind == "orthogonal":
        nn.init.orthogonal_(U)
    return U * (largest / torch.linalg.matrix_norm(U, 2))


def log_gradients(U, nonlinearity: str, size: float):
    """Log of the norm of d(v h_T)/dx_k for random directions v, at the distances T - k = 0, 1, 2, ... `[T]`."""
    layer = fastrnn.RNN(H, H, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(U)
        layer.weight_ih_l0.copy_(torch.eye(H))  # W = 1: a gradient with respect to x_k is one to U h_{k-1}
    x = (size * torch.randn(T, B, H, dtype=torch.float64)).requires_grad_()
    v = nn.functional.normalize(torch.randn(B, H, dtype=torch.float64), dim=-1)
    (gradient,) = torch.autograd.grad((layer(x)[0][-1] * v).sum(), x)
    return gradient.norm(dim=-1).log().mean(-1).flip(0)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small are not worth a second thread
    networks = max(2, round(20 * effort))
    curves, rows = {}, []
    for kind in ("orthogonal", "random"):
        for largest in tqdm(SINGULAR, desc=kind):
            matrices = [recurrent_matrix(kind, largest) for _ in range(networks)]
            radius = torch.stack([torch.linalg.eigvals(U).abs().max() for U in matrices]).mean()
            growth = []
            for regime, options in REGIMES.items():
                curve = torch.stack([log_gradients(U, *options) for U in matrices]).mean(0)
                growth.append(((curve[-1] - curve[HALF]) / (T - 1 - HALF)).exp())
                curves[kind, largest, regime] = curve.exp()
            rows.append(f"{kind:10} {largest:22.2f} {radius:16.2f} " + " ".join(f"{value:8.3f}" for value in growth))

    print(f"factor of the gradient per step, from {HALF} to {T - 1} steps back, mean of {networks} networks:")
    print("U          largest singular value  spectral radius   linear     tanh     relu", *rows, sep="\n")
    print("the lecture's prediction for the linear network is the second column")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.3), sharey=True)
    for axis, kind in zip(axes, ("orthogonal", "random"), strict=True):
        for index, largest in enumerate(SINGULAR):
            axis.plot(curves[kind, largest, "linear"], color=f"C{index}", label=f"{largest}")
            axis.plot(curves[kind, largest, "tanh"], "--", color=f"C{index}")
        axis.set_yscale("log")
        axis.set_ylim(1e-20, 1e20)
        axis.set_title(f"{kind} U; dashed: tanh, random inputs", fontsize=10)
        axis.set_xlabel("steps back")
    axes[0].set_ylabel("norm of the gradient")
    axes[1].legend(title="largest singular value", fontsize=8, title_fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(out / "gradients.png", dpi=100)
