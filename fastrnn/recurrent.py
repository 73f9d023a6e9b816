"""A cell of one's own: from its equation to layers with kernels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _C, codegen, functional, layers, ops, readers
from fastrnn.cells import CELLS, Cell, Function, describe
from fastrnn.equation import error_in
from fastrnn.layers import PACKS, as_states, packs_of, step_eagerly
from fastrnn.reference import Weights, products_of
from fastrnn.signatures import Device, Given, Input, Result, States


def cell(
    *, gates: str, states: str, unit_weights: str = "", masks: str = "", normalized: str = ""
) -> Callable[[Function], Cell]:
    """A decorator that makes of an equation a cell for `fastrnn.Recurrent`:

        @fastrnn.cell(gates="f n", states="h")
        def my_cell(x, u, h):
            f = torch.sigmoid(x.f + u.f(h))
            return (1 - f) * h + f * torch.tanh(x.n + u.n(f * h))

    `x.g` is the input's product of gate g with its bias, `u.g(operand)` the recurrent one: of h, the first state, which
    is also the output, or, for the last gates, of one other value. The equation returns the new states, in order. There
    are + - * /, and sigmoid, tanh, relu, exp, logsigmoid and maximum, of torch or of `fastrnn.cells`, and
    `fastrnn.cells.step`. Keyword-only arguments are numbers, for `Recurrent` to fix.

    Args, each of names with blanks between them:
        gates: at most 4, in the order of the row blocks of the weights.
        states: `[B, H]` each.
        unit_weights: parameters `[H]`.
        masks: what a call is given for each row and unit, without gradients; see `Recurrent.forward`.
        normalized: groups of gates, with semicolons between them, whose products have layer normalization (Ba et al.
            2016, arXiv 1607.06450): `x.g` and `u.g(h)` are then gain * (product - mean) / sqrt(variance + 1e-5) + bias,
            mean and variance being over all units of all gates of the group. All gates, each once, or none.

    `fastrnn.cells.normalized(value)` is the same of one value of the step, over the units, without gain and bias; an
    equation has at most one. With either, recurrent products are of h alone.

    Raises:
        EquationError: the equation cannot be made a kernel; the message names its line.
    """

    def make(equation: Function) -> Cell:
        named = {"unit_weights": unit_weights, "masks": masks, "normalized": normalized}
        described = describe(equation, gates=gates, states=states, **named)
        _check_taken(described)
        return _registered(described)

    return make


def _check_taken(described: Cell) -> None:
    """That no unit weight has the name of another attribute, and no number that of an argument of `Recurrent`."""
    attributes = {
        "weight_ih",
        "weight_hh",
        "bias_ih",
        "bias_hh",
        "gain_ih",
        "gain_hh",
        "bias",
        "cell",
        "input_size",
        "hidden_size",
        "training",
    }
    arguments = inspect.signature(Recurrent.__init__).parameters
    for name in described.unit_weights:
        if name in attributes or hasattr(RecurrentCell, name):
            raise error_in(described, f"unit weight {name!r}: modules have another attribute of that name")
    for name, _ in described.numbers:
        if name in arguments:
            raise error_in(described, f"number {name!r}: fastrnn.Recurrent has another argument of that name")


def _registered(described: Cell) -> Cell:
    """The same cell, under a name that is its equation's alone: what is compiled or exported asks for it by that."""
    digest = hashlib.sha256(codegen.struct(described).encode()).hexdigest()[:10]
    named = replace(described, name=f"{described.equation.__name__}_{digest}")
    ops.add_cell(named)
    return named


def with_numbers(given: Cell | str, numbers: Mapping[str, float]) -> Cell:
    """The cell with other numbers than its equation's defaults."""
    if isinstance(given, str) and given in CELLS:
        given = CELLS[given]
    if not isinstance(given, Cell):
        built_in = ", ".join(name for name, cell in CELLS.items() if name == cell.equation.__name__)
        raise TypeError(f"cell: expected what fastrnn.cell made, or one of {built_in}, got {given!r}")
    known = dict(given.numbers)
    unknown = [name for name in numbers if name not in known]
    if unknown:
        expected = f"among {', '.join(known)}" if known else "none"
        raise TypeError(f"{unknown[0]}: cell {given.name} has no such number; expected {expected}")
    if not numbers or {**known, **numbers} == known:
        return given
    return _registered(replace(given, numbers=tuple({**known, **numbers}.items())))


class _Module(torch.nn.Module):
    """What Recurrent and RecurrentCell share: the parameters of a direction of a layer, by the cell's description."""

    cell: Cell
    hidden_size: int
    bias: bool

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name != PACKS}

    @property
    def _cell(self) -> str:
        if self.cell.name not in CELLS:  # in another process than the one that has defined it
            ops.add_cell(self.cell)
        return self.cell.name

    def _beyond_torch(self) -> str:
        return f"cell {self.cell.equation.__name__}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(readers.not_scriptable(self, "use torch.jit.trace"))

    def _add_parameters(self, suffix: str, inputs: int, options: dict[str, Any]) -> None:
        with_input, recurrent, _ = products_of(self.cell)
        H = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (len(with_input) * H, inputs),
            "weight_hh": (len(recurrent) * H, H),
        }
        shapes |= {"bias_ih": (len(with_input) * H,), "bias_hh": (len(recurrent) * H,)} if self.bias else {}
        if self.cell.normalized:
            shapes |= {"gain_ih": shapes["weight_ih"][:1], "gain_hh": shapes["weight_hh"][:1]}
        shapes |= dict.fromkeys(self.cell.unit_weights, (H,))
        for name, shape in shapes.items():
            if shape[0]:
                self.register_parameter(name + suffix, Parameter(torch.empty(shape, **options)))

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(hidden_size), as torch.nn's layers. Of a cell with layer normalization gain_... is 1 and
        bias_... 0, as torch.nn.LayerNorm's."""
        bound, is_normalized = self.hidden_size**-0.5, ops.SIZES[self._cell]["is_normalized"]
        for name, parameter in self.named_parameters():
            if is_normalized and name.startswith(("gain_", "bias_")):
                torch.nn.init.constant_(parameter, float(name.startswith("gain_")))
            else:
                torch.nn.init.uniform_(parameter, -bound, bound)

    def _weights_of(self, suffix: str) -> Weights:
        def get(name: str) -> Any:
            return getattr(self, name + suffix, None)

        own = [get(name) for name in self.cell.unit_weights]
        matrices = get("weight_ih"), get("weight_hh"), get("bias_ih"), get("bias_hh")
        if self.cell.normalized:
            gains = [gain for gain in (get("gain_ih"), get("gain_hh")) if gain is not None]
            return Weights(*matrices, w_own=torch.cat([*own, *gains]).unflatten(0, (-1, self.hidden_size)))
        return Weights(*matrices, w_own=torch.stack(own) if own else None)


class Recurrent(_Module, layers.Layers):
    r"""Layers of any cell, with all that `fastrnn.LSTM` has: directions, dropout, lengths and resets, packed sequences,
    second derivatives, `stream()`, `torch.compile` and `torch.export`, 16-bit types.

    A cell's kernels are compiled for this machine when they are first used, in seconds, and kept on disk
    (`fastrnn.compiler`); those of float32 of the cells in `fastrnn.cells.CELLS` are there already. Without a C++
    compiler (on a GPU: nvcc) the equation runs in torch's operations.

    Args:
        cell: what `fastrnn.cell` made, or the name of a built-in cell.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as of
            `torch.nn.GRU`.
        weights, recompute: as of `fastrnn.LSTM`.
        numbers: the cell's numbers, by name.

    Attributes (of layer k; with the suffix `_reverse` for the other direction):
        weight_ih_l[k], bias_ih_l[k]: `[G*H, I]` and `[G*H]`, for the gates whose `x.g` the equation reads.
        weight_hh_l[k], bias_hh_l[k]: `[R*H, H]` and `[R*H]`, for the gates whose `u.g` it asks for.
        [name]_l[k]: `[H]`, for each unit weight.
        gain_ih_l[k], gain_hh_l[k]: `[G*H]` and `[R*H]`, of a cell whose products are normalized.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    proj_size = 0

    def __init__(
        self,
        cell: Cell | str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        weights: str | None = None,
        recompute: bool = False,
        **numbers: float,
    ) -> None:
        super().__init__()
        self.cell = with_numbers(cell, numbers)
        for name, size in {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}.items():
            _check_size(name, size)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number between 0 and 1, got {dropout!r}")
        if weights not in (None, "bf16", "int8"):
            raise ValueError(f"weights: expected None, 'bf16' or 'int8', got {weights!r}")
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "recompute": recompute}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.weights, self.recompute = weights, recompute
        for layer, suffix in self._suffixes():
            inputs = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
            self._add_parameters(suffix, inputs, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(
        self,
        input: Input,
        hx: Given = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        masks: Tensor | Mapping[str, Tensor] | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over `input`.

        Args:
            input, lengths, resets, return_states: as of `fastrnn.LSTM`.
            hx: the initial states `[L*D, B, H]`, a tuple if the cell has several. Zero if None.
            masks: of a cell with masks, each by its name, or the only one itself: `[L*D, B, H]` to be the same in all
                steps, or `[L*D, T, B, H]` (`[L*D, B, T, H]` with `batch_first`). No B if unbatched.

        Returns:
            `output` (like `input`, with `D*H` features) and the final states, in the form of `hx`; with `return_states`
            the states and gates of every step, too.

        Raises:
            ValueError, RuntimeError, TypeError: a dimension, size, dtype or value is wrong.
            CompilationError: there is a C++ compiler, and it refuses.
        """
        is_plain = masks is None and not self.cell.masks and return_states is False
        if is_plain and not torch.compiler.is_compiling():
            found = self._forward_eagerly(input, hx, lengths, resets)
            if found is not None:
                return found
        found = readers.read(
            self, input, hx, lengths=lengths, resets=resets, masks=masks, return_states=return_states or None
        )
        if found is not None:
            read: Result = found
            return read
        _check_states(self.cell, hx)
        return self._call(input, hx, lengths, resets, return_states, masks=self._by_layer(masks, input))

    def _suffixes(self) -> list[tuple[int, str]]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(layer, f"_l{layer}{direction}") for layer in range(self.num_layers) for direction in directions]

    def _weights(self) -> list[list[Weights]]:
        if not torch.compiler.is_compiling():
            _C.leave_openmp_after_fork()
        D = 2 if self.bidirectional else 1
        directions = [self._weights_of(suffix) for _, suffix in self._suffixes()]
        return [directions[i : i + D] for i in range(0, len(directions), D)]

    def _by_layer(self, masks: object, input: Input) -> list[Tensor] | None:
        """A user's masks as `[D, T or 1, B, M*H]`, for each layer."""
        names = self.cell.masks
        if not names and masks is not None:
            raise ValueError(f"masks: cell {self.cell.name} has none")
        if not names:
            return None
        if isinstance(input, PackedSequence):
            raise ValueError("masks: expected None with a PackedSequence, whose rows are sorted; pass lengths instead")
        masks = {names[0]: masks} if isinstance(masks, Tensor) and len(names) == 1 else masks
        if not isinstance(masks, Mapping) or sorted(masks) != sorted(names):
            given = sorted(masks) if isinstance(masks, Mapping) else type(masks).__name__
            raise TypeError(f"masks: expected tensors by the names {', '.join(names)}, got {given}")
        found = torch.broadcast_tensors(*(self._in_order(name, masks[name], input) for name in names))
        together = torch.cat(found, dim=-1)
        return list(together.unflatten(0, (self.num_layers, -1)))

    def _in_order(self, name: str, mask: Tensor, input: Tensor) -> Tensor:
        """One mask as `[L*D, T or 1, B, H]`."""
        _check_mask(name, mask)
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        rows, H = self.num_layers * (2 if self.bidirectional else 1), self.hidden_size
        is_batched = input.dim() == 3
        sizes = tuple(input.shape[:2]) if is_batched else (len(input),)
        B = ((sizes[0],) if self.batch_first else (sizes[1],)) if is_batched else ()
        if tuple(mask.shape) not in ((rows, *B, H), (rows, *sizes, H)):
            expected = f"{(rows, *B, H)} or {(rows, *sizes, H)}"
            raise ValueError(f"masks: {name}: expected shape {expected}, got {tuple(mask.shape)}")
        of_every_step = mask.dim() == 2 + is_batched
        if not is_batched:
            mask = mask.unsqueeze(-2)
        elif self.batch_first and not of_every_step:
            mask = mask.transpose(1, 2)
        return mask.unsqueeze(1) if of_every_step else mask

    def extra_repr(self) -> str:
        shown = [self.cell.equation.__name__, str(self.input_size), str(self.hidden_size)]
        defaults: dict[str, object] = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
        }
        defaults |= {"weights": None, "recompute": False}
        options = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join(shown + [f"{name}={value!r}" for name, value in (options | dict(self.cell.numbers)).items()])


class RecurrentCell(_Module):
    """One step of any cell.

    Args and attributes as of `Recurrent`, for one layer of one direction; the names of parameters have no suffix.
    """

    def __init__(
        self,
        cell: Cell | str,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **numbers: float,
    ) -> None:
        super().__init__()
        self.cell = with_numbers(cell, numbers)
        _check_size("input_size", input_size)
        _check_size("hidden_size", hidden_size)
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type(bias).__name__}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._add_parameters("", input_size, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Given = None, masks: Tensor | Mapping[str, Tensor] | None = None) -> States:
        """One step: `input [B, I]` or `[I]`, states `[B, H]` or `[H]` (a tuple if the cell has several; zero if None)
        and masks of the same shape, by their names, to the new states.

        Raises:
            ValueError, RuntimeError, TypeError: a dimension, size or dtype is wrong.
        """
        if masks is None and not self.cell.masks and not torch.compiler.is_compiling():
            found: States | None = step_eagerly(self, self._cell, input, hx)
            if found is not None:
                return found
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        _check_states(self.cell, hx)
        states: tuple[Any, ...] = () if hx is None else as_states(hx, self.cell.states) if self.cell.carried else (hx,)
        names = self.cell.masks
        given = {names[0]: masks} if isinstance(masks, Tensor) and len(names) == 1 else dict(masks or {})
        for name, mask in given.items():
            _check_mask(name, mask)
        if sorted(given) != sorted(self.cell.masks):
            raise TypeError(f"masks: expected {', '.join(self.cell.masks) or 'none'}, got {', '.join(given) or 'none'}")
        shape = (*input.shape[:-1], self.hidden_size)
        for name, tensor in [*zip(self.cell.states, states, strict=False), *given.items()]:
            if tuple(tensor.shape) != shape:
                raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}")
        weights = self._weights()
        if input.dtype != weights.w_ih.dtype and not functional.may_differ(input, weights.w_ih):
            raise ValueError(f"{type(self).__name__}: expected input of dtype {weights.w_ih.dtype}, got {input.dtype}")
        rows = (1, -1, self.hidden_size)
        h0, *others = (state.reshape(rows) for state in states) if states else (None,)
        c0 = torch.cat(others, dim=-1) if others else None
        ordered = [given[name].reshape(1, *rows) for name in self.cell.masks]
        own_masks = [torch.cat(ordered, dim=-1)] if ordered else None
        x = input.reshape(1, -1, self.input_size)
        _, h, c = functional.rnn(self._cell, x, h0, c0, [[weights]], masks=own_masks, packs=packs_of(self))
        after = h, *(c.chunk(self.cell.carried, dim=-1) if self.cell.carried else ())
        return tuple(state.reshape(shape) for state in after) if self.cell.carried else h.reshape(shape)

    def _weights(self) -> Weights:
        if not torch.compiler.is_compiling():
            _C.leave_openmp_after_fork()
        return self._weights_of("")

    def _eager_weights(self) -> tuple[Tensor, ...]:
        return tuple(ops.flatten([self._weights()]))

    def extra_repr(self) -> str:
        shown = f"{self.cell.equation.__name__}, {self.input_size}, {self.hidden_size}"
        numbers = "".join(f", {name}={value!r}" for name, value in self.cell.numbers)
        return shown + ("" if self.bias else ", bias=False") + numbers


def _check_states(cell: Cell, hx: object) -> None:
    states = (hx,) if not cell.carried or hx is None else as_states(hx, cell.states)
    for name, state in zip(cell.states, states, strict=False):
        if hx is not None and not isinstance(state, Tensor):
            raise TypeError(f"hx: {name}: expected a tensor, got {type(state).__name__}")


def _check_mask(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"masks: {name}: expected a tensor, got {type(mask).__name__}")
    if mask.requires_grad:
        raise ValueError(f"masks: {name}: expected a tensor that requires no gradient; a mask has none: detach it")


def _check_size(name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{name} must be greater than zero, got {size}")
