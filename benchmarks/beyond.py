"""What is done with a layer beyond forward and backward, against the peers that can:

    python -m benchmarks --suite beyond [--csv FILE]

100 steps, 32 rows, 128 inputs and units, float32. Per-sample gradients, tangents and second derivatives against
torch.nn's layers, per-sample gradients against the layers of Opacus, too, where it is installed; noise within steps,
lengths, resets and layer normalization against the same layer without, and the last against its loop in torch's
operations, which makes the input's product for all steps at once, and against the reference, which makes it step by
step. "ratio" is the peer's time over ours, or of an option our time with it over that without.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import layer_norm

import fastrnn
from benchmarks.timing import Protocol, Ratio, measure
from fastrnn import reference

T, B, H = 100, 32, 128
KINDS = ("GRU", "LSTM", "RNN")


def twins(kind: str) -> dict[str, nn.Module]:
    ours = getattr(fastrnn, kind)(H, H)
    theirs = getattr(nn, kind)(H, H)
    theirs.load_state_dict(ours.state_dict())
    return {"fastrnn": ours, "torch.nn": theirs}


def per_sample(module: nn.Module, x: torch.Tensor):
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    zeros = torch.zeros(1, B, 1, H)  # torch.nn's layers want states that are mapped over, too

    def loss(parameters, row, state):
        state = (state, state) if isinstance(module, nn.LSTM) else state
        return functional_call(module, parameters, (row[:, None], state))[0].square().sum()

    return vmap(grad(loss), in_dims=(None, 1, 1))(parameters, x.detach(), zeros)


def tangents(module: nn.Module, x: torch.Tensor):
    return jvp(lambda x: module(x)[0], (x.detach(),), (torch.ones_like(x),))


def gradient_penalty(module: nn.Module, x: torch.Tensor):
    (of_x,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    penalty = (of_x.norm(dim=(0, 2)) - 1).square().mean()
    return torch.autograd.grad(penalty, list(module.parameters()), materialize_grads=True)


def hessian_vector_product(module: nn.Module, x: torch.Tensor):
    parameters = list(module.parameters())
    grads = torch.autograd.grad(module(x)[0].square().mean(), parameters, create_graph=True)
    return torch.autograd.grad(sum((g * p.detach()).sum() for g, p in zip(grads, parameters, strict=True)), parameters)


def norms(module: nn.Module, x: torch.Tensor):
    return fastrnn.per_sample_norms(module, x.detach(), torch.ones(T, B, H))


def training(module: nn.Module, x: torch.Tensor, **options):
    module(x, **options)[0].square().sum().backward()


USES = {
    "per-sample gradients": per_sample,
    "jvp": tangents,
    "gradient penalty": gradient_penalty,
    "Hessian-vector product": hessian_vector_product,
}


def opacus_calls(kind: str, x: torch.Tensor) -> dict[str, Callable]:
    """Per-sample gradients of Opacus' own layer of this kind."""
    if importlib.util.find_spec("opacus") is None:
        return {}
    import opacus.layers
    from opacus import GradSampleModule

    module = GradSampleModule(getattr(opacus.layers, f"DP{kind}")(H, H))

    def call():
        module.zero_grad(set_to_none=True)
        module(x.detach())[0].square().sum().backward()

    return {"opacus": call}


def against_peers(kind: str, protocol: Protocol) -> list[dict]:
    modules, rows = twins(kind), []
    x = torch.randn(T, B, H, requires_grad=True)
    for use, function in USES.items():
        calls = {name: functools.partial(function, module, x) for name, module in modules.items()}
        if function is tangents and kind == "LSTM":
            del calls["torch.nn"]  # it has no tangents: mkldnn_rnn_layer is not differentiated forward
            rows.append(row(kind, use, "torch.nn (cannot)", measure(calls, protocol)["fastrnn"], math.nan))
            continue
        for a, b in zip(*(torch.utils._pytree.tree_leaves(call()) for call in calls.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item()))
        if function is per_sample:
            calls |= {"norms alone": functools.partial(norms, modules["fastrnn"], x)} | opacus_calls(kind, x)
        times = measure(calls, protocol)
        for peer in list(calls)[1:]:
            ratio = Ratio.of(times[peer], times["fastrnn"]).median
            rows.append(row(kind, use, peer, times["fastrnn"], ratio))
    return rows


def against_plain(kind: str, protocol: Protocol) -> list[dict]:
    layer, x = getattr(fastrnn, kind)(H, H), torch.randn(T, B, H, requires_grad=True)
    noise = {"zoneout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.2}
    calls = {"plain": functools.partial(training, layer, x)}
    calls |= {
        name: functools.partial(training, fastrnn.Regularized(layer, **{name: p}), x) for name, p in noise.items()
    }
    lengths = torch.linspace(T / 4, T, B).long()
    calls["lengths"] = functools.partial(training, layer, x, lengths=torch.full((B,), T))
    calls["lengths from T/4 to T"] = functools.partial(training, layer, x, lengths=lengths)
    calls["resets"] = functools.partial(training, layer, x, resets=torch.rand(T, B) < 0.01)
    times = measure(calls, protocol)
    return [
        row(kind, name, "plain", times[name], Ratio.of(times[name], times["plain"]).median) for name in list(calls)[1:]
    ]


def layer_norm_loop(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The outputs of a LayerNormLSTM or LayerNormGRU(joint=True), step by step."""
    p = {name.removesuffix("_l0"): parameter for name, parameter in layer.named_parameters()}

    def product(operand, kind):
        raw = operand @ p[f"weight_{kind}"].T
        return layer_norm(raw, raw.shape[-1:], p[f"gain_{kind}"], p[f"bias_{kind}"])

    outputs, h = [], x.new_zeros(x.shape[1], layer.hidden_size)
    c = h
    for of_x in product(x, "ih").unbind():
        of_h = product(h, "hh")
        if "gain_c" in p:
            i, f, g, o = (of_x + of_h).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * layer_norm(c, c.shape[-1:], p["gain_c"], p["bias_c"]).tanh()
        else:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, dim=-1), of_h.chunk(3, dim=-1)
            z = (x_z + h_z).sigmoid()
            h = (1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * h
        outputs.append(h)
    return torch.stack(outputs)


def of_reference(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The outputs by the cell's equation, step by step: what computes a layer where there are no kernels."""
    return reference.layer(layer._cell, x, None, None, layer._weights()[0])[0]


def with_layer_norm(kind: str, protocol: Protocol) -> list[dict]:
    if kind == "RNN":
        return []
    layer = fastrnn.LayerNormLSTM(H, H) if kind == "LSTM" else fastrnn.LayerNormGRU(H, H, joint=True)
    plain, rows = getattr(fastrnn, kind)(H, H), []
    for batch in (B, 1):
        x = torch.randn(T, batch, H, requires_grad=True)
        first = x[:10]  # roundings grow from step to step
        torch.testing.assert_close(layer(first)[0], layer_norm_loop(layer, first), rtol=1e-3, atol=1e-4)
        calls = {
            "ours": functools.partial(training, layer, x),
            "plain": functools.partial(training, plain, x),
            "loop": lambda x=x: layer_norm_loop(layer, x).square().sum().backward(),
            "reference": lambda x=x: of_reference(layer, x).square().sum().backward(),
        }
        times = measure(calls, protocol)
        use = "layer norm" if batch == B else f"layer norm, batch {batch}"
        rows.append(row(kind, use, "plain", times["ours"], Ratio.of(times["ours"], times["plain"]).median))
        rows.append(row(kind, use, "its loop", times["ours"], Ratio.of(times["loop"], times["ours"]).median))
        rows.append(row(kind, use, "the reference", times["ours"], Ratio.of(times["reference"], times["ours"]).median))
    return rows


def row(kind: str, use: str, peer: str, ours: np.ndarray, ratio: float) -> dict:
    found = {"layer": kind, "use": use, "ours_s": float(np.median(ours)), "peer": peer, "ratio": ratio}
    print(f"{kind:5} {use:24} {found['ours_s'] * 1e3:8.2f} ms   {ratio:5.2f} of {peer}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks --suite beyond",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--csv", type=Path, help="file to write to")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(f"{T},{B},{H},{H}, float32, {torch.get_num_threads()} threads")
    protocol, rows = Protocol(rounds=options.rounds), []
    for kind in KINDS:
        rows += against_peers(kind, protocol)
        rows += against_plain(kind, protocol)
        rows += with_layer_norm(kind, protocol)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return 0
