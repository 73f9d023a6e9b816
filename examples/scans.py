"""Recurrences without recurrent matrices, in time order and by chunks in parallel: the same answer.

Lecture 003's state-space models, and minGRU and minLSTM (Feng et al. 2024), are all

    h_t = a_t h_{t-1} + b_t,

pointwise, with a_t and b_t known before the first step. So a sequence may be cut in chunks that are computed at the
same time, each from a state of zero; what a chunk makes of the state before it is the product of its a_t. That pays
where there are more threads than rows and units; elsewhere one pass in time order does the least work.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import fastrnn

B, I, H, CHUNK = 4, 32, 64, 64
LENGTHS = (256, 1024, 4096, 16384)


def by_chunks(a, b):
    """h of h_t = a_t h_{t-1} + b_t for a and b `[T, B, H]`, from zero: a loop over the steps of a chunk, all chunks at
    once, and one over the chunks."""
    a, b = (t.unflatten(0, (-1, CHUNK)).transpose(0, 1).contiguous() for t in (a, b))  # [CHUNK, chunks, B, H]
    product, own = [a[0]], [b[0]]
    for a_t, b_t in zip(a[1:], b[1:], strict=True):
        product.append(a_t * product[-1])
        own.append(a_t * own[-1] + b_t)
    product, own = torch.stack(product), torch.stack(own)
    before = [torch.zeros_like(own[0, 0])]
    for last_product, last in zip(product[-1, :-1], own[-1, :-1], strict=True):
        before.append(last_product * before[-1] + last)
    return (own + product * torch.stack(before)).transpose(0, 1).flatten(0, 1)


def gates(layer, x):
    """The input's products of a layer, `[T, B, H]` each."""
    return torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0).chunk(len(layer.cell.gates), dim=-1)


def mingru(layer, x):
    z, n = gates(layer, x)
    return by_chunks(1 - z.sigmoid(), z.sigmoid() * n)


def minlstm(layer, x):
    f, i, n = gates(layer, x)
    f, i = f.sigmoid(), i.sigmoid()
    return by_chunks(f / (f + i), i / (f + i) * n)


def state_space(layer, x):
    a_re, a_im, b_re, b_im = layer.discrete()
    a, b = torch.complex(a_re, a_im), torch.complex(b_re, b_im)
    driven = x.to(b.dtype) @ b.T
    return by_chunks(a.expand_as(driven), driven).real


SYSTEMS = {
    "minGRU": (fastrnn.MinGRU, mingru),
    "minLSTM": (fastrnn.MinLSTM, minlstm),
    "diagonal state space": (fastrnn.DiagonalSSM, state_space),
}


def seconds(function, *arguments) -> float:
    function(*arguments)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - begin)
    return sorted(times)[2]


@torch.no_grad()
def main(effort: float, out: Path):
    torch.manual_seed(0)
    lengths = LENGTHS[: max(1, round(len(LENGTHS) * min(1, effort)))]
    plt.figure(figsize=(6, 3.5))
    for index, (name, (kind, chunked)) in enumerate(SYSTEMS.items()):
        layer, times = kind(I, H), []
        for T in tqdm(lengths, desc=name):
            x = torch.randn(T, B, I)
            difference = (layer(x)[0] - chunked(layer, x)).abs().max()
            times.append((seconds(layer, x), seconds(chunked, layer, x)))
        ours, others = zip(*times, strict=True)
        print(
            f"{name}, {lengths[-1]} steps: in order {1e3 * ours[-1]:.1f} ms, by chunks {1e3 * others[-1]:.1f} ms; ",
            end="",
        )
        print(f"largest difference {difference:.1e}")
        plt.loglog(lengths, ours, marker="o", color=f"C{index}", label=f"{name}, in time order")
        plt.loglog(
            lengths, others, marker="o", color=f"C{index}", linestyle="--", label="by chunks, torch's operations"
        )
    plt.xlabel("steps")
    plt.ylabel("seconds, forward")
    plt.legend(fontsize="x-small")
    plt.tight_layout()
    plt.savefig(out / "scans.png", dpi=100)
