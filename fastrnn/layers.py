"""From a user's call of a module with layers to `functional.rnn` and back: what all such modules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import functional, ops, packed, readers
from fastrnn.cells import CELLS
from fastrnn.reference import Weights
from fastrnn.signatures import Input, Result, States
from fastrnn.states import Kept, keep
from fastrnn.stream import Stream


class Layers(torch.nn.Module):
    """What modules with layers have; the attributes are theirs to set."""

    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    input_size: int
    hidden_size: int
    proj_size: int
    weights: str | None
    recompute: bool

    @property
    def _cell(self) -> str:
        """The cell's name in `fastrnn.cells.CELLS`."""
        raise NotImplementedError

    def stream(self, batch: int = 1, *, copy: bool = False) -> Stream:
        """A copy of this module's weights that advances `batch` rows by one step per call; see `fastrnn.Stream`.

        Args:
            batch: B, the rows that advance together.
            copy: whether each output is a tensor of its own. If False, every call overwrites the output of the one
                before it, and no memory is allocated.

        Raises:
            ValueError: `batch` is less than 1, or the module is bidirectional.
            TypeError: `copy` is not a bool, or the weights are distributed (`functional.check_local`).
        """
        weights = self._weights()
        functional.check_local(weights[0][0])
        return Stream(self._cell, weights, batch, rounded=self.weights, copy=copy)

    def _weights(self) -> list[list[Weights]]:
        """The current parameters per layer and direction."""
        raise NotImplementedError

    @property
    def _carried(self) -> int:
        """How many states there are besides the output."""
        return CELLS[self._cell].carried

    def _call(
        self,
        input: Input,
        hx: Any,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_states: bool = False,
        **own: Any,
    ) -> Result:
        """A user's call; see `forward` of the module. `own` is what `_run` takes besides."""
        kept = keep(return_states)
        if isinstance(input, PackedSequence):
            if lengths is not None or resets is not None:
                raise ValueError("lengths, resets: expected None with a PackedSequence, which has lengths of its own")
            return self._forward_packed(input, hx, own, kept)
        if input.dim() not in (2, 3):
            tensor = " tensor" if isinstance(self, torch.nn.RNN) else ""
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead"
            )
        states = self._states(hx)
        is_batched = input.dim() == 3
        self._check_state_dims(states, is_batched)
        if not is_batched:
            input = input.unsqueeze(1)
            states = None if states is None else tuple(state.unsqueeze(1) for state in states)
        elif self.batch_first:
            input = input.transpose(0, 1)
        lengths, resets = _check_rows(input, lengths, resets, is_batched, self.batch_first)
        output, states = self._run(input, states, lengths, resets, kept=kept, **own)
        if not is_batched:
            states = tuple(state.squeeze(1) for state in states)

        def layout(tensor: Tensor) -> Tensor:
            return tensor.squeeze(1) if not is_batched else tensor.transpose(0, 1) if self.batch_first else tensor

        found: Result = self._results(output, states, kept, layout)
        return found

    def _results(
        self, output: Tensor, states: tuple[Tensor, ...], kept: Kept | None, layout: Callable[[Tensor], Any]
    ) -> Any:
        """What a call returns; `layout` makes the user's of a tensor of every step."""
        found = layout(output), self._state(states)
        return found if kept is None else (*found, kept.laid_out(layout))

    def _forward_eagerly(self, input: Input, hx: Any, lengths: Tensor | None, resets: Tensor | None) -> Result | None:
        """The result of a plain call, where Python's time counts most; None for all others."""
        if type(input) is not Tensor or input.dim() not in (2, 3):
            return None
        states = eager_states(hx, self._carried)
        if states is None:
            return None
        given = input, *states, lengths, resets
        call = _with_a_row(given) if input.dim() == 2 else _time_first(given) if self.batch_first else given
        found = None if call is None else self._run_eagerly(call, self._eager_weights())
        if found is None:
            return None
        y, h_n, c_n = found
        final = split_states(h_n, c_n, self._carried)
        if input.dim() == 2:
            y, final = y.squeeze(1), tuple(state.squeeze(1) for state in final)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, self._state(final)

    def _run_eagerly(self, call: _Plain, flat: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
        x, h0, c0, lengths, resets = call
        directions, dropout = 2 if self.bidirectional else 1, self.dropout if self.training else 0.0
        options = directions, self.weights, self.recompute, lengths, resets, self.num_layers, dropout
        return packs_of(self).run_eagerly(self._cell, x, h0, c0, flat, *options)

    def _run_packed_eagerly(self, call: _Plain, weights: list[list[Weights]]) -> tuple[Tensor, Tensor, Tensor] | None:
        drops_between = self.training and self.dropout and self.num_layers > 1  # in the order of the packed elements
        if drops_between or torch.compiler.is_compiling():
            return None
        return self._run_eagerly(call, _flat(weights))

    def _eager_weights(self) -> tuple[Tensor, ...]:
        """The weights of each layer, as `ops.flatten` gives them."""
        return _flat(self._weights())

    def _forward_packed(self, input: PackedSequence, hx: Any, own: dict[str, Any], kept: Kept | None) -> Result:
        """A packed batch is padded and run with lengths: rows are sorted, and stay so until the end."""
        padded, lengths = packed.pad(input)
        states = self._states(hx)
        if states is not None:
            if not all(isinstance(state, Tensor) for state in states):
                raise TypeError(f"hx: expected tensors, got {', '.join(type(state).__name__ for state in states)}")
            self._check_states(padded, *states)
            if input.sorted_indices is not None:
                states = tuple(packed.permute(state, input.sorted_indices) for state in states)
        output, states = self._run(padded, states, lengths.to(padded.device), None, packed=True, kept=kept, **own)
        if input.unsorted_indices is not None:
            states = tuple(packed.permute(state, input.unsorted_indices) for state in states)
        found: Result = self._results(output, states, kept, lambda tensor: packed.pack_as(input, tensor, lengths))
        return found

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        *,
        packed: bool = False,
        masks: list[Tensor] | None = None,
        kept: Kept | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`input [T, B, I]` -> `output [T, B, D*P]` and the final states `[L*D, B, .]`."""
        weights = self._weights()
        self._check_input(input, weights[0][0].w_ih)
        self._check_states(input, *(states or ()))
        h0, *others = states or (None,)
        c0 = torch.cat(others, dim=-1) if len(others) > 1 else others[0] if others else None
        computer, found = self._computer(kept, generator), None
        if packed and masks is None and isinstance(computer, ops.PackedLayers):
            found = self._run_packed_eagerly((input, h0, c0, lengths, resets), weights)
        if found is None:
            found = functional.rnn(
                self._cell,
                input,
                h0,
                c0,
                weights,
                dropout=self.dropout,
                training=self.training,
                lengths=lengths,
                resets=resets,
                masks=masks,
                packed=packed,
                recompute=self.recompute,
                packs=computer,
                generator=generator,
                rounded=self._rounded(),
            )
        output, h_n, c_n = found
        return output, split_states(h_n, c_n, self._carried)

    def _computer(self, kept: Kept | None, generator: torch.Generator | None) -> functional.Runs:
        """What computes the layers of a call: see `packs` of `functional.rnn`."""
        return packs_of(self) if kept is None else kept

    def _rounded(self) -> str | None:
        """The option `weights`, which ONNX's files know nothing of."""
        if self.weights and not torch.compiler.is_dynamo_compiling() and readers.is_for_onnx():
            return None
        return self.weights

    def _states(self, hx: Any) -> tuple[Tensor, ...] | None:
        """A user's `hx` as a tuple."""
        if hx is None:
            return None
        return as_states(hx, CELLS[self._cell].states) if self._carried else (hx,)

    def _state(self, states: tuple[Tensor, ...]) -> States:
        return states if self._carried else states[0]

    def _check_state_dims(self, states: tuple[Tensor, ...] | None, is_batched: bool) -> None:
        dim, word = (3, "batched 3-D") if is_batched else (2, "unbatched 2-D")
        if states is None:
            return
        if all(state.dim() == dim for state in states):
            return
        if self._carried:
            names, given = (
                ("hx and cx" if self._carried == 1 else "all states"),
                ", ".join(f"{s.dim()}-D" for s in states),
            )
            raise RuntimeError(f"For {word} input, {names} should also be {dim}-D but got ({given}) tensors")
        raise RuntimeError(f"For {word} input, hx should also be {dim}-D but got {states[0].dim()}-D tensor")

    def _check_input(self, input: Tensor, weight: Tensor) -> None:
        if input.dtype != weight.dtype and not functional.may_differ(input, weight):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_states(self, input: Tensor, *states: Tensor) -> None:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for index, state in enumerate(states):
            name = f"hidden[{index}]" if self._carried else "hidden"
            expected = (rows, input.size(1), self.hidden_size if index else self.proj_size or self.hidden_size)
            if state.shape != expected:
                raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")


PACKS = "_packed_layers"  # an attribute that no copy, pickle or hash of a module contains


def packs_of(module: torch.nn.Module) -> ops.PackedLayers:
    """The packed weights, kept with the module. Compiled code keeps none."""
    if torch.compiler.is_compiling():
        return ops.PackedLayers()
    kept = module.__dict__.get(PACKS)
    if kept is None:
        kept = module.__dict__[PACKS] = ops.PackedLayers()
    return kept


def step_eagerly(module: Any, cell: str, input: Any, hx: Any) -> Any:
    """The result of a plain call of a single step, where Python's time counts most; None for all others."""
    carried = CELLS[cell].carried
    if type(input) is not Tensor or input.dim() != 2:
        return None
    states = eager_states(hx, carried)
    if states is None:
        return None
    found = packs_of(module).run_eagerly(cell, input, *states, module._eager_weights(), 1, None, False)
    if found is None:
        return None
    return found[1:] if carried == 1 else split_states(*found[1:], carried) if carried else found[1]


def eager_states(hx: Any, carried: int) -> tuple[Any, Any] | None:
    """`hx` as h0 and c0, of a cell with several states a tuple; None if it is not in its usual form."""
    if not carried or hx is None:
        return hx, None
    if type(hx) is not tuple or len(hx) != carried + 1 or any(state is None for state in hx):
        return None
    return hx if carried == 1 else (hx[0], hx[1:])


def _flat(weights: list[list[Weights]]) -> tuple[Tensor, ...]:
    """The weights of each layer, as `ops.flatten` gives them."""
    return tuple(weight for directions in weights for weight in ops.flatten(directions))


def split_states(h_n: Tensor, c_n: Tensor, carried: int) -> tuple[Tensor, ...]:
    """The final states as a user has them."""
    # A lone state as it is: an in-place operation on a view of it would take FSDP's hook off.
    return (h_n, *c_n.chunk(carried, dim=-1)) if carried > 1 else (h_n, c_n) if carried else (h_n,)


# Input, h0, c0 (or its parts), lengths and resets of a plain call.
_Plain: TypeAlias = tuple[Tensor, Tensor | None, Tensor | tuple[Tensor, ...] | None, Tensor | None, Tensor | None]


def _with_a_row(call: _Plain) -> _Plain | None:
    """An unbatched call as one of a batch of one; None if the tensors are not of such a call."""
    x, h0, c0, lengths, resets = call
    expected = (
        (x, 2),
        (h0, 2),
        *((part, 2) for part in (c0 if isinstance(c0, tuple) else (c0,))),
        (lengths, 0),
        (resets, 1),
    )
    if any(t is not None and (not isinstance(t, Tensor) or t.dim() != dim) for t, dim in expected):
        return None

    def with_a_row(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(with_a_row, given))
        return given if given is None else given.unsqueeze(min(given.dim(), 1))

    found: _Plain = with_a_row(call)
    return found


def _time_first(call: _Plain) -> _Plain | None:
    """The same of a call with `batch_first`."""
    x, h0, c0, lengths, resets = call
    if resets is not None:
        if type(resets) is not Tensor or resets.dim() != 2:
            return None
        resets = resets.transpose(0, 1)
    return x.transpose(0, 1), h0, c0, lengths, resets


def as_states(
    hx: object, names: Sequence[str], message: str = "hx: expected {} tensors {}, got {}"
) -> tuple[Tensor, ...]:
    """A user's `hx` for a cell with these states as a tuple."""
    expected = f"({', '.join(f'{name}_0' for name in names)})"
    if not isinstance(hx, tuple | list):
        raise TypeError(f"hx: expected a tuple {expected}, got {type(hx).__name__}")
    if len(hx) != len(names):
        raise RuntimeError(message.format(len(names), expected, len(hx)))
    return tuple(hx)


def _check_rows(
    input: Tensor, lengths: Tensor | None, resets: Tensor | None, is_batched: bool, batch_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Checks lengths and resets, in the user's layout, against `input [T, B, I]`; returns `[B]` and `[T, B]`."""
    T, B, _ = input.shape
    if lengths is None and T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        _check_tensor("lengths", lengths, torch.int64, (B,) if is_batched else ())
        lengths = lengths if is_batched else lengths.unsqueeze(0)
    if resets is not None:
        _check_tensor("resets", resets, torch.bool, ((B, T) if batch_first else (T, B)) if is_batched else (T,))
        resets = resets.unsqueeze(1) if not is_batched else resets.transpose(0, 1) if batch_first else resets
    return lengths, resets


_CONVERSIONS = {torch.bool: "bool", torch.int64: "long"}


def _check_tensor(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of dtype {dtype}, got {type(value).__name__}")
    if value.dtype != dtype:
        how = f"{name}.{_CONVERSIONS[dtype]}()"
        raise TypeError(f"{name}: expected a tensor of dtype {dtype}, got {value.dtype}; pass {how}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
