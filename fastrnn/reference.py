"""The specification: the equations of cells.py, step by step, in plain torch.

Everything else is tested against this file, and it is what differentiates when a second derivative is asked for
(`create_graph=True`). It runs on every device and dtype, and it is slow: one Python step per time step.

Symbols: T time steps, B rows (sequences), I inputs, H units, P outputs (H, unless an LSTM has a projection),
D directions.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.cells import CELLS, Cell
from fastrnn.equation import record


class Weights(NamedTuple):
    """The parameters of one direction of one layer, `G` gates stacked along the rows.

    Shapes: `w_ih [G*H, I]`, `w_hh [G*H, P]`, `b_ih [G*H]`, `b_hh [G*H]`, `w_hr [P, H]`.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def step(cell: Cell, x: Tensor, states: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...]:
    """One step: x `[B, I]` and the states to the new states, the first of them projected if there is a `w_hr`."""
    h, count = states[0], len(cell.gates)
    inputs = linear(x, w.w_ih, w.b_ih).chunk(count, dim=-1)
    first = count - _second_gates(cell)
    of_h = linear(h, *_rows(w, slice(None, first), count)).chunk(first, dim=-1)

    def product(gate):
        def of(operand):
            return of_h[gate] if operand is h else linear(operand, *_rows(w, slice(gate, gate + 1), count))

        return of

    by_name = dict(zip(cell.gates, inputs, strict=True)), {name: product(g) for g, name in enumerate(cell.gates)}
    results = cell.equation(*(SimpleNamespace(**given) for given in by_name), *states)
    new_h, *others = results if isinstance(results, tuple) else (results,)
    return (new_h if w.w_hr is None else linear(new_h, w.w_hr)), *others


@cache
def _second_gates(cell: Cell) -> int:
    return len(record(cell).second)


def _rows(w: Weights, gates: slice, count: int) -> tuple[Tensor, Tensor | None]:
    """The recurrent weights and biases of some of the gates."""
    if gates == slice(None, count):
        return w.w_hh, w.b_hh
    matrices = w.w_hh.chunk(count)[gates]
    biases = None if w.b_hh is None else torch.cat(w.b_hh.chunk(count)[gates])
    return torch.cat(matrices), biases


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Weights],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all directions, all time steps.

    Args:
        x: `[T, B, I]`.  h0: `[D, B, P]`.  c0: `[D, B, H]`.  A missing state is zero.
        weights: one `Weights` per direction; the second direction reads time backwards.
        lengths: int64 `[B]`. Row b is finished at time `lengths[b]`: it keeps its state and puts out 0, its resets
            there mean nothing, and its reverse direction starts at its own last step.
        resets: bool `[T, B]`. `resets[t, b]` begins a new episode at time t: no state crosses between t-1 and t,
            either way.

    Returns:
        `y [T, B, D*P]`, `h_n [D, B, P]`, `c_n [D, B, H]` (`[0, B, H]` for a cell without c).
    """
    T, B, _ = x.shape
    spec = CELLS[cell]
    times = torch.arange(T, device=x.device)[:, None]
    active = times < (times.new_full((B,), T) if lengths is None else lengths)
    x = torch.where(active[:, :, None], x, 0)
    walks = []
    for d, w in enumerate(weights):
        H, P = w.w_hh.shape[0] // len(spec.gates), w.w_hh.shape[1]
        h = x.new_zeros(B, P) if h0 is None else h0[d]
        c = (x.new_zeros(B, H) if c0 is None else c0[d]) if spec.has_cell else None
        walks.append(_walk(spec, x, h, c, w, active, _restarts(active, resets, d), reverse=d == 1))
    y = torch.cat([walk[0] for walk in walks], dim=-1)
    h_n = torch.stack([walk[1] for walk in walks])
    c_n = torch.stack([walk[2] for walk in walks]) if spec.has_cell else x.new_empty(0, B, H)
    return y, h_n, c_n


def _restarts(active: Tensor, resets: Tensor | None, d: int) -> Tensor | None:
    """`[T, B]`: whether the state is zeroed before direction d reads time t."""
    if resets is None:
        return None
    resets = resets & active
    return resets if d == 0 else torch.cat([resets[1:], torch.zeros_like(resets[:1])])


def _walk(spec, x, h, c, w, active, restarts, reverse):
    """One direction: `(y [T, B, P], h_n [B, P], c_n [B, H] or None)`."""
    outputs = [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        now = active[t][:, None]
        h_before, c_before = h, c
        if restarts is not None:
            h_before = torch.where(restarts[t][:, None], 0, h)
            c_before = None if c is None else torch.where(restarts[t][:, None], 0, c)
        h_after, *after = step(spec, x[t], (h_before,) if c is None else (h_before, c_before), w)
        h = torch.where(now, h_after, h)
        c = None if c is None else torch.where(now, after[0], c)
        outputs[t] = torch.where(now, h_after, 0)
    return (torch.stack(outputs) if outputs else x.new_empty(0, *h.shape)), h, c
