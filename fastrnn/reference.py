"""The specification: the equations of cells.py, step by step, in plain torch.

Everything else is tested against this file, and it is what computes where there are no kernels, such as second
derivatives on a GPU. It runs on every device and dtype, and it is slow: one Python step per time step.

Symbols: T time steps, B rows (sequences), I inputs, H units, P outputs (H, unless an LSTM has a projection),
D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.cells import CELLS, Cell, normalized
from fastrnn.equation import record


class Weights(NamedTuple):
    """The parameters of one direction of one layer. Of its cell: `G` gates with a product of the input, `R` with a
    recurrent one, stacked along the rows; `U` unit weights and, where products are normalized, G + R gains after them.

    Shapes: `w_ih [G*H, I]`, `w_hh [R*H, P]` or None without recurrent products, `b_ih [G*H]`, `b_hh [R*H]`,
    `w_hr [P, H]`, `w_own [U, H]`.
    """

    w_ih: Tensor
    w_hh: Tensor | None
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    w_own: Tensor | None = None


def step(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...], w: Weights, masks: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """One step: x `[B, I]` and the states to the new states, the first of them projected if there is a `w_hr`."""
    h, with_input, recurrent, first = states[0], *products_of(cell)
    own = () if w.w_own is None else w.w_own.unbind()
    own, gains = own[: len(cell.unit_weights)], own[len(cell.unit_weights) :]
    of_x = gate_products(cell, x, w.w_ih, w.b_ih, with_input, gains[: len(with_input)])
    of_h: Sequence[Tensor] = ()
    if first:
        of_h = gate_products(
            cell, h, *_rows(w, slice(None, first), len(recurrent)), recurrent[:first], gains[len(with_input) :]
        )
    place = {gate: i for i, gate in enumerate(recurrent)}
    inputs = dict(zip(with_input, of_x, strict=True))

    def product(gate: int) -> Callable[[Tensor], Tensor]:
        def of(operand: Tensor) -> Tensor:
            i = place[gate]
            return of_h[i] if operand is h else linear(operand, *_rows(w, slice(i, i + 1), len(recurrent)))

        return of

    by_name = (
        {cell.gates[g]: of_gate for g, of_gate in inputs.items()},
        {cell.gates[g]: product(g) for g in recurrent},
    )
    given = (*states, *own, *masks)
    results = cell.call(*(SimpleNamespace(**names) for names in by_name), *given)
    new_h, *others = results if isinstance(results, tuple) else (results,)
    return (new_h if w.w_hr is None else linear(new_h, w.w_hr)), *others


def gate_products(
    cell: Cell, operand: Tensor, weight: Tensor, bias: Tensor | None, gates: list[int], gains: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Those of these gates. Where they are normalized, gain * (product - mean) / sqrt(variance + epsilon) + bias, mean
    and variance being over all gates of a group."""
    if not cell.normalized:
        return linear(operand, weight, bias).chunk(len(gates), dim=-1)
    by_gate = dict(zip(gates, linear(operand, weight).chunk(len(gates), dim=-1), strict=True))
    for group in cell.normalized:
        members = [gate for gate in gates if cell.gates[gate] in group]
        if members:
            together = torch.cat([by_gate[gate] for gate in members], dim=-1)
            by_gate |= zip(members, normalized(together).chunk(len(members), dim=-1), strict=True)
    found = [by_gate[gate] * gain for gate, gain in zip(gates, gains, strict=True)]
    return found if bias is None else [a + b for a, b in zip(found, bias.chunk(len(gates)), strict=True)]


@cache
def products_of(cell: Cell) -> tuple[list[int], list[int], int]:
    """The gates that have a product of the input, those that have a recurrent one, and how many of these are of h."""
    made = record(cell)
    return made.input_gates, made.recurrent, len(made.recurrent) - len(made.second)


def _rows(w: Weights, gates: slice, count: int) -> tuple[Tensor, Tensor | None]:
    """The recurrent weights and biases of some of the `count` gates that have them."""
    assert w.w_hh is not None
    if gates == slice(None, count):
        return w.w_hh, w.b_hh
    matrices = w.w_hh.chunk(count)[gates]
    biases = None if w.b_hh is None else torch.cat(w.b_hh.chunk(count)[gates])
    return torch.cat(matrices), biases


def layer(cell: str, x: Tensor, *others: Any, **rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and c_n of `layer_with_states`, whose arguments it takes."""
    return layer_with_states(cell, x, *others, **rows)[:3]


def layer_with_states(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Weights],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, all directions, all time steps.

    Args:
        x: `[T, B, I]`.  h0: `[D, B, P]`.  c0: `[D, B, K*H]`, the K states besides h side by side. Missing ones are 0.
        weights: one `Weights` per direction; the second direction reads time backwards.
        lengths: int64 `[B]`. Row b is finished at time `lengths[b]`: it keeps its state and puts out 0, its resets
            there mean nothing, and its reverse direction starts at its own last step.
        resets: bool `[T, B]`. `resets[t, b]` begins a new episode at time t: no state crosses between t-1 and t,
            either way.
        masks: `[D, T or 1, B, M*H]`, the masks of a cell that has M of them side by side.

    Returns:
        `y [T, B, D*P]`, `h_n [D, B, P]`, `c_n [D, B, K*H]` (`[0, B, H]` for a cell with no other state), and the K
        states of every step `[D, T, B, K*H]` (`[0, T, B, H]`), 0 where a row is finished.
    """
    T, B, _ = x.shape
    spec = CELLS[cell]
    times = torch.arange(T, device=x.device)[:, None]
    active = times < (times.new_full((B,), T) if lengths is None else lengths)
    x = torch.where(active[:, :, None], x, 0)
    H, P = sizes(spec, weights[0])
    walks = []
    for d, w in enumerate(weights):
        h = x.new_zeros(B, P) if h0 is None else h0[d]
        c = x.new_zeros(B, spec.carried * H) if c0 is None else c0[d]
        states = h, *(c.chunk(spec.carried, dim=-1) if spec.carried else ())
        own = None if masks is None else masks[d].expand(T, B, -1)
        walks.append(_walk(spec, x, states, w, active, _restarts(active, resets, d), own, reverse=d == 1))
    y = torch.cat([walk[0] for walk in walks], dim=-1)
    h_n = torch.stack([walk[1][0] for walk in walks])
    if not spec.carried:
        return y, h_n, x.new_empty(0, B, H), x.new_empty(0, T, B, H)
    c_n = torch.stack([torch.cat(walk[1][1:], dim=-1) for walk in walks])
    return y, h_n, c_n, torch.stack([walk[2] for walk in walks if walk[2] is not None])


def sizes(cell: Cell, w: Weights) -> tuple[int, int]:
    """Units H and outputs P."""
    H = w.w_ih.shape[0] // len(products_of(cell)[0])
    return H, H if w.w_hh is None else w.w_hh.shape[-1]


def _restarts(active: Tensor, resets: Tensor | None, d: int) -> Tensor | None:
    """`[T, B]`: whether the state is zeroed before direction d reads time t."""
    if resets is None:
        return None
    resets = resets & active
    return resets if d == 0 else torch.cat([resets[1:], torch.zeros_like(resets[:1])])


def _walk(
    spec: Cell,
    x: Tensor,
    states: tuple[Tensor, ...],
    w: Weights,
    active: Tensor,
    restarts: Tensor | None,
    masks: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """One direction: `(y [T, B, P], the final states, the other states of every step [T, B, K*H])`."""
    outputs: list[Any] = [None] * len(x)
    carried: list[Any] = [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        now = active[t][:, None]
        before = states
        if restarts is not None:
            before = tuple(torch.where(restarts[t][:, None], 0, state) for state in states)
        at_t = () if masks is None else masks[t].chunk(len(spec.masks), dim=-1)
        after = step(spec, x[t], before, w, at_t)
        states = tuple(torch.where(now, new, old) for new, old in zip(after, states, strict=True))
        outputs[t] = torch.where(now, after[0], 0)
        if spec.carried:
            carried[t] = torch.where(now, torch.cat(after[1:], dim=-1), 0)
    if not outputs:
        others = sum(state.shape[-1] for state in states[1:])
        return x.new_empty(0, *states[0].shape), states, x.new_empty(0, x.shape[1], others)
    return torch.stack(outputs), states, torch.stack(carried) if spec.carried else None
