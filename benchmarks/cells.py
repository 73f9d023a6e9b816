"""The cells that torch.nn does not have, forward and backward, against the Python loop that each would be without
kernels; and those without recurrent products, in inference, against the memory.

    python -m benchmarks.cells [--csv FILE]

The loop makes the product of the input for all steps at once, and takes the equation step by step in torch's
operations. "per product" is the time by product of a step, the input's and the recurrent ones, over the same of
fastrnn.LSTM. A cell without recurrent products is a product of the input and then one pass over memory: "product" is
the time of that product alone (torch.addmm), and "rate" what such a cell moves with one input, where the product is
nothing: its gates and its output, in bytes per second, as a share of the rate of torch's copy.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import linear

import fastrnn
from benchmarks.timing import Protocol, Ratio, measure
from fastrnn.equation import record
from fastrnn.reference import gate_products

T, B, H = 128, 32, 256  # of the first table, with as many inputs
SCAN = 1024, 16, 512  # of the second


def loop(layer: fastrnn.Recurrent, x: torch.Tensor) -> torch.Tensor:
    """One layer, step by step."""
    made, (w,) = record(layer.cell), layer._weights()[0]
    cell, size = layer.cell, layer.hidden_size
    gates, rows = cell.gates, () if w.w_own is None else w.w_own.unbind()
    own, gains = rows[: len(cell.unit_weights)], rows[len(cell.unit_weights) :]
    of_x, of_h = gains[: len(made.input_gates)], gains[len(made.input_gates) :]
    inputs = gate_products(cell, x, w.w_ih, w.b_ih, made.input_gates, of_x)
    weights = [] if w.w_hh is None else list(zip(w.w_hh.split(size), w.b_hh.split(size), strict=True))
    recurrent = {
        gates[g]: (lambda operand, w=w: linear(operand, *w)) for g, w in zip(made.recurrent, weights, strict=True)
    }
    states, outputs = [x.new_zeros(x.shape[1], size)] * len(cell.states), []
    for t in range(len(x)):
        now = {gates[g]: product[t] for g, product in zip(made.input_gates, inputs, strict=True)}
        if cell.normalized:  # all products of h together
            found = gate_products(cell, states[0], w.w_hh, w.b_hh, made.recurrent, of_h)
            recurrent = {gates[g]: (lambda _, p=p: p) for g, p in zip(made.recurrent, found, strict=True)}
        states = cell.call(SimpleNamespace(**now), SimpleNamespace(**recurrent), *states, *own)
        states = states if isinstance(states, tuple) else (states,)
        outputs.append(states[0])
    return torch.stack(outputs)


def products(layer: torch.nn.Module) -> int:
    return sum(p.shape[0] // layer.hidden_size for name, p in layer.named_parameters() if name.startswith("weight"))


def training(function, x):
    def call():
        function(x).sum().backward()

    return call


def against_loops(protocol: Protocol) -> list[dict]:
    lstm, x = fastrnn.LSTM(H, H), torch.randn(T, B, H, requires_grad=True)
    rows = []
    for name in fastrnn.papers.__all__:
        layer = getattr(fastrnn, name)(H, H)
        torch.testing.assert_close(layer(x)[0], loop(layer, x), rtol=1e-3, atol=1e-4)
        calls = {
            "ours": training(lambda x, layer=layer: layer(x)[0], x),
            "loop": training(lambda x, layer=layer: loop(layer, x), x),
            "lstm": training(lambda x: lstm(x)[0], x),
        }
        times = measure(calls, protocol)
        per_product = Ratio.of(times["ours"] / products(layer), times["lstm"] / products(lstm)).median
        rows.append(
            {
                "class": name,
                "ours_s": np.median(times["ours"]),
                "loop_over_ours": Ratio.of(times["loop"], times["ours"]).median,
                "per_product_over_lstm": per_product,
            }
        )
        print(
            f"{name:13} {rows[-1]['ours_s'] * 1e3:7.1f} ms, the loop {rows[-1]['loop_over_ours']:5.1f} times as long, "
            f"per product {per_product:.2f} of LSTM's"
        )
    return rows


def against_memory(protocol: Protocol) -> list[dict]:
    steps, batch, units = SCAN
    rows = []
    source = torch.randn(steps * batch * units * 4)
    target = torch.empty_like(source)
    for name in fastrnn.papers.__all__:
        layer, thin = (getattr(fastrnn, name)(inputs, units).requires_grad_(False) for inputs in (units, 1))
        if hasattr(layer, "weight_hh_l0"):
            continue
        x = torch.randn(steps, batch, units)
        flat, column, w_t = x.view(-1, units), x[:, :, :1].contiguous(), layer.weight_ih_l0.t()
        calls = {
            "ours": lambda layer=layer, x=x: layer(x),
            "product": lambda bias=layer.bias_ih_l0, flat=flat, w_t=w_t: torch.addmm(bias, flat, w_t),
            "thin": lambda thin=thin, column=column: thin(column),
            "copy": lambda: target.copy_(source),
        }
        times = measure(calls, protocol)
        moved = 4 * steps * batch * units * (products(layer) + 1)
        rate, copy = moved / np.median(times["thin"]), 2 * source.nbytes / np.median(times["copy"])
        rows.append(
            {
                "class": name,
                "ours_s": np.median(times["ours"]),
                "product_over_ours": Ratio.of(times["product"], times["ours"]).median,
                "rate_bytes_per_s": rate,
                "copy_bytes_per_s": copy,
            }
        )
        alone = rows[-1]["product_over_ours"]
        print(
            f"{name:13} {rows[-1]['ours_s'] * 1e3:7.1f} ms, the product alone {alone:.2f} times as long, "
            f"rate {rate / 1e9:.1f} GB/s, {100 * rate / copy:.0f} % of a copy's"
        )
    return rows


def write(path: Path, tables: dict[str, list[dict]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "class", "quantity", "value"])
        for table, rows in tables.items():
            for row in rows:
                numbers = {key: value for key, value in row.items() if key != "class"}
                writer.writerows([table, row["class"], key, f"{value:.6g}"] for key, value in numbers.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="file to write to")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    protocol = Protocol(rounds=arguments.rounds)
    print(f"forward and backward, {T},{B},{H},{H}, float32, {torch.get_num_threads()} threads")
    tables = {f"training {T},{B},{H},{H}": against_loops(protocol)}
    print(f"inference, {','.join(map(str, SCAN))},{SCAN[-1]}, float32")
    tables[f"inference {','.join(map(str, SCAN))},{SCAN[-1]}"] = against_memory(protocol)
    if arguments.csv:
        write(arguments.csv, tables)


if __name__ == "__main__":
    main()
