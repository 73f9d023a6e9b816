"""The specification: every cell as its equation, step by step, in plain torch.

Everything else is tested against this file, and it is what differentiates when a second derivative is asked for
(`create_graph=True`). It runs on every device and dtype, and it is slow: one Python step per time step.

Symbols: T time steps, B rows (sequences), I inputs, H units, P outputs (H, unless an LSTM has a projection),
D directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Weights(NamedTuple):
    """The parameters of one direction of one layer, `G` gates stacked along the rows.

    Shapes: `w_ih [G*H, I]`, `w_hh [G*H, P]`, `b_ih [G*H]`, `b_hh [G*H]`, `w_hr [P, H]`.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: `step(x [B, I], h [B, P], c [B, H] or None, weights) -> (h, c)` is its equation."""

    name: str
    gates: int
    has_cell: bool
    step: Callable[[Tensor, Tensor, Tensor | None, Weights], tuple[Tensor, Tensor | None]]


CELLS: dict[str, Cell] = {}


def cell(*, gates: int, has_cell: bool = False):
    """Registers a step function under its own name."""

    def register(step):
        CELLS[step.__name__] = Cell(step.__name__, gates, has_cell, step)
        return step

    return register


@cell(gates=4, has_cell=True)
def lstm(x, h, c, w):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000; projection: Sak et al. 2014).

    i, f, o = sigmoid(W x + b + U h + b');  g = tanh(W x + b + U h + b')
    c' = f * c + i * g;  h' = o * tanh(c'), or W_hr (o * tanh(c'))
    """
    i, f, g, o = (linear(x, w.w_ih, w.b_ih) + linear(h, w.w_hh, w.b_hh)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w.w_hr is None else linear(h, w.w_hr)), c


@cell(gates=3)
def gru(x, h, c, w):
    """Gated recurrent unit with the reset after the product, as in `torch.nn.GRU`.

    r, z = sigmoid(W x + b + U h + b');  n = tanh(W_n x + b_n + r * (U_n h + b'_n))
    h' = (1 - z) * n + z * h
    """
    x_r, x_z, x_n = linear(x, w.w_ih, w.b_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = linear(h, w.w_hh, w.b_hh).chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (1 - z) * n + z * h, None


@cell(gates=3)
def gru_reset_before(x, h, c, w):
    """Gated recurrent unit with the reset before the product (Cho et al. 2014).

    r, z = sigmoid(W x + b + U h + b');  n = tanh(W_n x + b_n + U_n (r * h) + b'_n)
    h' = (1 - z) * n + z * h
    """
    x_r, x_z, x_n = linear(x, w.w_ih, w.b_ih).chunk(3, dim=-1)
    u_r, u_z, u_n = w.w_hh.chunk(3)
    b_r, b_z, b_n = (None, None, None) if w.b_hh is None else w.b_hh.chunk(3)
    r = (x_r + linear(h, u_r, b_r)).sigmoid()
    z = (x_z + linear(h, u_z, b_z)).sigmoid()
    n = (x_n + linear(r * h, u_n, b_n)).tanh()
    return (1 - z) * n + z * h, None


@cell(gates=1)
def rnn_tanh(x, h, c, w):
    """Elman network (Elman 1990): h' = tanh(W x + b + U h + b')."""
    return (linear(x, w.w_ih, w.b_ih) + linear(h, w.w_hh, w.b_hh)).tanh(), None


@cell(gates=1)
def rnn_relu(x, h, c, w):
    """Elman network with a rectifier: h' = max(0, W x + b + U h + b')."""
    return (linear(x, w.w_ih, w.b_ih) + linear(h, w.w_hh, w.b_hh)).relu(), None


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
        H, P = w.w_hh.shape[0] // spec.gates, w.w_hh.shape[1]
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
        h_after, c_after = spec.step(x[t], h_before, c_before, w)
        h = torch.where(now, h_after, h)
        c = None if c is None else torch.where(now, c_after, c)
        outputs[t] = torch.where(now, h_after, 0)
    return (torch.stack(outputs) if outputs else x.new_empty(0, *h.shape)), h, c
