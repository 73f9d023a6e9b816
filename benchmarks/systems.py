"""The recurrent systems of the lectures that are no layer of torch.nn, against the Python loop that each is otherwise:

    python -m benchmarks.systems [--csv FILE] [--bf16]

A loop is the equation as it is written, step by step in torch's operations. Forward and backward (of the spikes of a
liquid state machine, which have no gradient, forward) of 100 steps, 32 rows, 128 inputs and units. "limit" is the share
of our time that our products alone would take at the rate of a large product of matrices (torch.mm) in the same run.
With --bf16 products of bfloat16 are allowed in both, by torch's switch.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from benchmarks.timing import Protocol, Ratio, measure

T, B, H = 100, 32, 128
ORDER, STEPS = 32, 10  # of the Legendre memory, and how far a skip connection reaches
LARGE = 1024


def plain(layer):
    """W, U, and both biases of a layer's only gate."""
    return layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0


def leaky(layer, x):
    w, u, b, c = plain(layer)
    h, outputs = x.new_zeros(x.shape[1], H), []
    for now in x:
        h = (1 - layer.leak_l0) * h + layer.leak_l0 * torch.tanh(linear(now, w, b) + linear(h, u, c))
        outputs.append(h)
    return torch.stack(outputs)


def skip(module, x):
    w, u, b, c = plain(module.layer)
    outputs = [x.new_zeros(x.shape[1], H)] * module.steps
    h = outputs[-1]
    for now in x:
        h = torch.tanh(linear(torch.cat([now, outputs[-module.steps]], dim=-1), w, b) + linear(h, u, c))
        outputs.append(h)
    return torch.stack(outputs[module.steps :])


def dilated(module, x):
    w, u, b, c = plain(module.layer)
    outputs = [x.new_zeros(x.shape[1], H)] * module.steps
    for now in x:
        outputs.append(torch.tanh(linear(now, w, b) + linear(outputs[-module.steps], u, c)))
    return torch.stack(outputs[module.steps :])


def jordan(layer, x):
    w, b = layer.weight_ih_l0, layer.bias_ih_l0
    (u, v), (b_u, b_v) = layer.weight_hh_l0.chunk(2), layer.bias_hh_l0.chunk(2)
    y, outputs = x.new_zeros(x.shape[1], H), []
    for now in x:
        y = torch.sigmoid(linear(torch.tanh(linear(now, w, b) + linear(y, u, b_u)), v, b_v))
        outputs.append(y)
    return torch.stack(outputs)


def mingru(layer, x):
    (w_z, w_n), (b_z, b_n) = layer.weight_ih_l0.chunk(2), layer.bias_ih_l0.chunk(2)
    h, outputs = x.new_zeros(x.shape[1], H), []
    for now in x:
        z = torch.sigmoid(linear(now, w_z, b_z))
        h = (1 - z) * h + z * linear(now, w_n, b_n)
        outputs.append(h)
    return torch.stack(outputs)


def state_space(layer, x):
    a_re, a_im, b_re, b_im = layer.discrete()
    re = im = x.new_zeros(x.shape[1], H)
    outputs = []
    for now in x:
        re, im = a_re * re - a_im * im + linear(now, b_re), a_im * re + a_re * im + linear(now, b_im)
        outputs.append(re)
    return torch.stack(outputs)


def lmu(layer, x):
    h, m = x.new_zeros(x.shape[1], H), x.new_zeros(x.shape[1], ORDER)
    outputs = []
    for now in x:
        u = linear(now, layer.input_encoders) + linear(h, layer.hidden_encoders) + linear(m, layer.memory_encoders)
        m = linear(m, layer.A) + u * layer.B
        of_h = linear(h, layer.hidden_kernel) + linear(m, layer.memory_kernel, layer.bias)
        h = torch.tanh(linear(now, layer.input_kernel) + of_h)
        outputs.append(h)
    return torch.stack(outputs)


def spiking(layer, x):
    w, u, b, c = plain(layer)
    leak, threshold, refractory = layer.leak_l0, layer.threshold_l0, layer.refractory_l0
    h = v = rest = x.new_zeros(x.shape[1], H)
    outputs = []
    for now in x:
        v = torch.where(rest > 0, 0, v + leak * (linear(now, w, b) + linear(h, u, c) - v))
        h = (v > threshold).to(v.dtype)
        v, rest = torch.where(h > 0, 0, v), torch.where(h > 0, refractory, (rest - 1).clamp(min=0))
        outputs.append(h)
    return torch.stack(outputs)


def reservoir() -> fastrnn.RNN:
    """An echo state network's: sparse, with a spectral radius of 0.9."""
    layer = fastrnn.RNN(H, H, leak=0.3)
    with torch.no_grad():
        sparse = layer.weight_hh_l0.uniform_(-1, 1) * (torch.rand(H, H) < 0.1)
        layer.weight_hh_l0.copy_(0.9 * sparse / torch.linalg.eigvals(sparse).abs().max())
    return layer.requires_grad_(False)


def liquid() -> fastrnn.Recurrent:
    layer = fastrnn.Recurrent("spiking", H, H)
    with torch.no_grad():
        layer.leak_l0.fill_(0.1)
        layer.threshold_l0.fill_(0.1)
        layer.refractory_l0.fill_(2)
    return layer.requires_grad_(False)


# Of each system the module, its loop, and whether it has a backward pass.
SYSTEMS: dict[str, tuple[Callable, Callable, bool]] = {
    "leaky": (lambda: fastrnn.RNN(H, H, leak=torch.nn.Parameter(torch.linspace(0.05, 1, H))), leaky, True),
    "echo state": (reservoir, leaky, True),
    "liquid state": (liquid, spiking, False),
    "skip": (lambda: fastrnn.Skip(fastrnn.RNN(2 * H, H), STEPS), skip, True),
    "dilated": (lambda: fastrnn.Dilated(fastrnn.RNN(H, H), STEPS), dilated, True),
    "Jordan": (lambda: fastrnn.JordanRNN(H, H), jordan, True),
    "LMU": (lambda: fastrnn.LMU(H, H, order=ORDER, theta=T), lmu, True),
    "minGRU": (lambda: fastrnn.MinGRU(H, H), mingru, True),
    "state space": (lambda: fastrnn.DiagonalSSM(H, H), state_space, True),
}


def call_of(function: Callable[[Tensor], Tensor], x: Tensor, backward: bool):
    def call():
        if backward:
            function(x).sum().backward()
        else:
            with torch.no_grad():
                function(x)

    return call


@contextlib.contextmanager
def precision(wanted: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    yield
    torch.set_float32_matmul_precision(before)


def compare(name: str, protocol: Protocol) -> dict:
    make, loop, backward = SYSTEMS[name]
    module, x = make(), torch.randn(T, B, H, requires_grad=backward)
    with precision("highest"):
        torch.testing.assert_close(module(x)[0], loop(module, x), rtol=1e-3, atol=1e-4)
    large = torch.randn(LARGE, LARGE)
    calls = {
        "ours": call_of(lambda x: module(x)[0], x, backward),
        "loop": call_of(lambda x: loop(module, x), x, backward),
        "product": lambda: large @ large,
    }
    with FlopCounterMode(display=False) as counter:
        calls["ours"]()
    times = measure(calls, protocol)
    ours, least = np.median(times["ours"]), counter.get_total_flops() * np.median(times["product"]) / (2 * LARGE**3)
    ratio = Ratio.of(times["loop"], times["ours"]).median
    return {"system": name, "ours_s": ours, "loop_over_ours": ratio, "limit": least / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="file to write to")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help='torch.set_float32_matmul_precision("medium")')
    arguments = parser.parse_args()
    torch.manual_seed(0)
    products = ", products of bfloat16" if arguments.bf16 else ""
    print(f"{T},{B},{H},{H}, float32{products}, {torch.get_num_threads()} threads")
    if arguments.bf16:
        torch.set_float32_matmul_precision("medium")
    rows = []
    for name in SYSTEMS:
        rows.append(compare(name, Protocol(rounds=arguments.rounds)))
        ours, ratio = rows[-1]["ours_s"] * 1e3, rows[-1]["loop_over_ours"]
        print(f"{name:12} {ours:6.2f} ms ({rows[-1]['limit']:.0%} of the limit), the loop {ratio:5.1f} times as long")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: v if k == "system" else f"{v:.6g}" for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
