"""Noise within the steps of a layer while it is trained."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastrnn import autograd, layers, noise, readers
from fastrnn.cells import CELLS, Cell, Function
from fastrnn.dual import ByName
from fastrnn.equation import record
from fastrnn.read import How, Read
from fastrnn.reference import Weights
from fastrnn.schema import add_cell, flatten, unflatten
from fastrnn.signatures import Given, Input, Result
from fastrnn.states import Kept
from fastrnn.stream import Stream


class Regularized(layers.Layers, nn.Module):
    r"""Layers with noise in their recurrence while training; otherwise what they are without, but for zoneout's mean.

    .. math::
        \tilde h_{t-1} &= m \odot h_{t-1} / (1 - p) && \text{recurrent dropout: what } U \text{ multiplies} \\
        s_t &= d_t \odot s_{t-1} + (1 - d_t) \odot \tilde s_t && \text{zoneout of a state } s \\
        \tilde U &= M \odot U / (1 - p) && \text{weight dropout}

    Args:
        layer: any of fastrnn's layers: `LSTM`, `GRU`, `RNN`, `Recurrent`, those of papers.
        recurrent_dropout: p of the mask m of each row, direction and layer, the same in all steps (Gal and Ghahramani
            2016). It is for recurrent products of the state; others, such as `u.n(r * h)`, read what they did.
        zoneout: the probability that a unit keeps its state in a step (Krueger et al. 2017), of all states or of each:
            an LSTM's are h, c. While not training the probability takes the place of d.
        weight_dropout: p of the mask M of the recurrent weights, drawn once for each call (DropConnect; Merity et al.
            2018).

    Cells with noise are compiled when they are first used, see `fastrnn.Recurrent`.

    Raises:
        TypeError: `layer` is no layer of fastrnn.
        ValueError: a probability is not from 0 up to 1 (recurrent and weight dropout: below 1), or the layer has no
            recurrent product to drop something of, a projection, or rounded weights.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(layer, layers.Layers) or isinstance(layer, Regularized):
            raise TypeError(f"layer: expected a recurrent layer of fastrnn, got {type(layer).__name__}")
        for name, option in {"proj_size": layer.proj_size, "weights": layer.weights}.items():
            if option:
                raise ValueError(f"layer: expected one without {name}, which Regularized has no kernels for")
        cell = CELLS[layer._cell]
        zoneout = tuple(zoneout) if isinstance(zoneout, Sequence) else (zoneout,) * len(cell.states)
        if len(zoneout) != len(cell.states):
            raise ValueError(f"zoneout: expected one for each of {', '.join(cell.states)}, got {len(zoneout)}")
        for name, p in {"recurrent_dropout": recurrent_dropout, "weight_dropout": weight_dropout}.items():
            _check_probability(name, p, p == 1)
            if p and not record(cell).recurrent:
                raise ValueError(f"{name}: expected 0 for cell {cell.name}, which has no recurrent products, got {p}")
        for p in zoneout:
            _check_probability("zoneout", p, False)
        self.layer = layer
        self.recurrent_dropout, self.zoneout, self.weight_dropout = recurrent_dropout, zoneout, weight_dropout
        for p in (recurrent_dropout, 0.0) if not cell.masks else ():
            noisy_name(cell.name, p, zoneout)  # now: torch.compile knows no cell that is made on the way

    input_size = property(lambda self: self.layer.input_size)
    hidden_size = property(lambda self: self.layer.hidden_size)
    num_layers = property(lambda self: self.layer.num_layers)
    bidirectional = property(lambda self: self.layer.bidirectional)
    batch_first = property(lambda self: self.layer.batch_first)
    dropout = property(lambda self: self.layer.dropout)
    recompute = property(lambda self: self.layer.recompute)
    proj_size = 0
    weights = None

    @property
    def _cell(self) -> str:
        return self.layer._cell

    def _weights(self) -> list[list[Weights]]:
        return self.layer._weights()

    def stream(self, batch: int = 1, *, copy: bool = False) -> Stream:
        """As of the layer.

        Raises:
            ValueError: there is zoneout, whose mean a stream does not compute.
        """
        if any(self.zoneout):
            raise ValueError("stream: expected no zoneout, whose mean it does not compute")
        return self.layer.stream(batch, copy=copy)

    def forward(
        self,
        input: Input,
        hx: Given = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over `input`.

        Args:
            input, hx, lengths, resets, return_states: as of the layer; states and gates are those with the noise.
            generator: where the noise is drawn from; torch's default one if None.

        Returns:
            As the layer.

        Raises:
            ValueError: the layer's cell has masks of its own; as the layer.
            TypeError: `generator` is none.
        """
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        drops = self.recurrent_dropout or self.weight_dropout or (self.dropout and generator is not None)
        is_quiet = not (self.training and drops) and not any(self.zoneout)
        rows = {"lengths": lengths, "resets": resets, "return_states": return_states or None, "generator": generator}
        if is_quiet and (torch.compiler.is_compiling() or readers.proxy_among(input, hx, **rows) is None):
            return self.layer(input, hx, lengths, resets, return_states=return_states)
        found = readers.read(self, input, hx, **rows)
        if found is not None:
            read: Result = found
            return read
        if CELLS[self._cell].masks:
            raise ValueError(f"Regularized: expected a cell without masks of its own, got {self._cell}")
        return self._call(input, hx, lengths, resets, return_states=return_states, generator=generator)

    def _computer(self, kept: Kept | None, generator: torch.Generator | None) -> _Noise:
        return _Noise(self, generator, kept)

    def _beyond_torch(self) -> str:
        return "noise in its steps"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(readers.not_scriptable(self, "use torch.jit.trace"))

    def told(self) -> tuple[str, str]:
        """For `fastrnn.explain`: the cell that a call computes with now, and its noise in words."""
        of = ", ".join(f"{q} of {state}" for state, q in zip(CELLS[self._cell].states, self.zoneout, strict=True) if q)
        kinds = {"recurrent dropout": self.recurrent_dropout, "zoneout": of, "weight dropout": self.weight_dropout}
        noise = ", ".join(f"{name} {value}" for name, value in kinds.items() if value) or "none"
        if self.training:
            return noisy_name(self._cell, self.recurrent_dropout, self.zoneout), f"noise: {noise}"
        told = f"zoneout's mean ({of}), no noise" if of else "no noise"
        return noisy_name(self._cell, 0.0, self.zoneout), f"{told}, since it is not training ({noise})"

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"recurrent_dropout": self.recurrent_dropout, "weight_dropout": self.weight_dropout}
        options["zoneout"] = self.zoneout if any(self.zoneout) else 0
        return ", ".join(f"{name}={value}" for name, value in options.items() if value)


class _Noise:
    """What computes the layers of a call of `Regularized`, in the place of `ops.PackedLayers`."""

    def __init__(self, module: Regularized, generator: torch.Generator | None, kept: Kept | None = None) -> None:
        self.zoneout, self.is_training, self.generator = module.zoneout, module.training, generator
        self.kept = kept
        self.recurrent_dropout = module.recurrent_dropout if module.training else 0.0
        self.weight_dropout = module.weight_dropout if module.training else 0.0

    def run(self, index: int, how: How, read: Read, rounded: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """One layer; arguments and results as of `ops.PackedLayers.run`."""
        cell, x, h0, c0, p = how.cell, read.x, read.h0, read.c0, self.recurrent_dropout
        weights = unflatten(cell, read.weights, how.directions)
        D, H = how.directions, read.units(how)
        drawn = self.masks(x, D, H)
        if p:  # what the products read is a state, the first, and h is carried
            h0 = x.new_zeros(D, x.shape[1], H) if h0 is None else h0
            c0 = x.new_zeros(D, x.shape[1], CELLS[cell].carried * H) if c0 is None and CELLS[cell].carried else c0
            h0, c0 = h0 * drawn[0].squeeze(1), h0 if c0 is None else torch.cat([h0, c0], dim=-1)
        flat = flatten([self.dropped(w) for w in weights])
        read = read._replace(h0=h0, c0=c0, masks=_together(drawn), weights=flat)
        how = how._replace(cell=noisy_name(cell, p, self.zoneout))
        states: Any = bool(p) or self.kept is not None  # the overloads are for constants
        y, h_n, c_n, *of_steps = autograd.call(how, read, states=states)
        if self.kept is not None:
            self.kept.add(cell, how, read, y, *of_steps)
        if not p:
            return y, h_n, c_n
        h = of_steps[0] if CELLS[cell].carried == 0 else of_steps[0][..., :H]  # y is what the products have read
        h_n, c_n = c_n[..., :H], c_n[..., H:] if CELLS[cell].carried else x.new_empty(0, x.shape[1], H)
        return (h.squeeze(0) if D == 1 else torch.cat(tuple(h), dim=-1)).to(x.dtype), h_n, c_n

    def dropped(self, w: Weights) -> Weights:
        p = self.weight_dropout
        if not p or w.w_hh is None:
            return w
        return w._replace(w_hh=w.w_hh * noise.keeps(w.w_hh, w.w_hh.shape, p, self.generator))

    def masks(self, x: Tensor, D: int, H: int) -> list[Tensor]:
        """`[D, T or 1, B, H]` each, in the order of the cell's masks, or several side by side."""
        T, B, _ = x.shape
        p = self.recurrent_dropout
        found = [noise.keeps(x, (D, 1, B, H), p, self.generator)] if p else []
        zoned = [q for q in self.zoneout if q]
        if not self.is_training:
            return found + [x.new_full((D, 1, B, H), q) for q in zoned]
        if len(set(zoned)) == 1:  # in one piece: nothing has to be put together
            return [*found, noise.chance(x, (D, T, B, len(zoned) * H), zoned[0], self.generator)]
        return found + [noise.chance(x, (D, T, B, H), q, self.generator) for q in zoned]


def _together(masks: list[Tensor]) -> Tensor | None:
    """`[D, T or 1, B, M*H]`: what is the same in all steps is given once, unless something else is not."""
    if len(masks) < 2:
        return masks[0] if masks else None
    steps = max(mask.shape[1] for mask in masks)
    return torch.cat([mask.expand(-1, steps, -1, -1) for mask in masks], dim=-1)


def noisy_name(cell: str, recurrent_dropout: float, zoneout: Sequence[float]) -> str:
    """In `CELLS`, of the cell that computes `cell` with noise; without any `cell` itself."""
    if not recurrent_dropout and not any(zoneout):
        return cell
    made = noisy(cell, bool(recurrent_dropout), tuple(bool(q) for q in zoneout))
    if made.name not in CELLS:
        add_cell(made)
    return made.name


@functools.cache
def noisy(name: str, drops: bool, zoned: tuple[bool, ...]) -> Cell:
    """A cell with masks for noise: first of the state that its products read, which is then a state of its own, the
    first; then of the states that are zoned out."""
    of = CELLS[name]
    kept = [state for state, is_zoned in zip(of.states, zoned, strict=True) if is_zoned]

    def equation(x: Any, u: Any, **given: Any) -> Any:
        before = [given[state] for state in of.states]
        fed = given["fed"] if drops else before[0]

        def product_of(gate: str) -> Function:
            return lambda operand: getattr(u, gate)(fed if operand is before[0] else operand)

        after = of.call(x, ByName(product_of), *before, *(given[unit] for unit in of.unit_weights))
        after = list(after) if isinstance(after, tuple) else [after]
        for i, state in enumerate(of.states):
            if state in kept:
                keeps = given[f"keeps_{state}"]
                after[i] = keeps * before[i] + (1 - keeps) * after[i]
        after = [given["passes"] * after[0], *after] if drops else after
        return tuple(after) if len(after) > 1 else after[0]

    equation.__doc__ = f"{of.equation.__name__} with masks for noise."
    return Cell(
        "_".join([name, "noisy", *(["fed"] if drops else []), *kept]),
        of.gates,
        (("fed",) if drops else ()) + of.states,
        equation,
        of.unit_weights,
        masks=(("passes",) if drops else ()) + tuple(f"keeps_{state}" for state in kept),
        normalized=of.normalized,
    )


def _check_probability(name: str, p: object, is_one: bool) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1 or is_one:
        raise ValueError(f"{name}: expected a probability{' below 1' if is_one else ''}, got {p!r}")
