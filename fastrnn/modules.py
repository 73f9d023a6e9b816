"""Drop-in replacements of `torch.nn.RNN`, `LSTM`, `GRU` and their cells.

Constructors, attributes, parameter names, initialisation, `state_dict`, shapes and errors are torch.nn's; the options
that torch.nn does not have are keyword-only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrnn import _C, clipped, functional, layers, ops, readers
from fastrnn.cells import CELLS
from fastrnn.layers import PACKS, as_states, packs_of, step_eagerly
from fastrnn.reference import Weights
from fastrnn.signatures import Device, Given, Input, Result

if TYPE_CHECKING:
    from fastrnn.signatures import CallWithPair, CallWithState, StepWithPair, StepWithState

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


_OR_SCRIPT_TORCH = "use torch.jit.trace, or script a copy that torch.nn computes: fastrnn.revert(copy.deepcopy(model))"


class _Replacement(torch.nn.Module):
    """What layers and cells share. Each is a real subclass of the class that it replaces, so that `isinstance` and
    everything else that asks for torch.nn's class finds it; what follows from that for `torch.compile` is in
    fastrnn/dynamo.py, for other readers of modules in fastrnn/readers.py.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is not None:
            check(name, value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(readers.not_scriptable(self, _OR_SCRIPT_TORCH))

    def _beyond_torch(self) -> str | None:
        """The option that makes this another cell than torch.nn's, if there is one."""
        return None


class _Recurrent(_Replacement, layers.Layers, torch.nn.RNNBase):
    """What RNN, LSTM and GRU share."""

    _carried = 0
    weights: str | None = None  # these two of a module that was one of torch.nn's, or was pickled as one
    recompute = False

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name != PACKS}

    def forward(
        self,
        input: Input,
        hx: Given = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over `input`.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with `batch_first`, `[T, I]` unbatched, or a `PackedSequence`.
            hx: the initial state `h_0 [L*D, B, P]`; for an LSTM `(h_0, c_0)` with `c_0 [L*D, B, H]`. No B if
                unbatched. Zero if None.
            lengths: int64 `[B]` (a 0-d tensor if unbatched), 0 to T each. A row is finished at its length: it keeps
                its state, its output is 0, and its reverse direction starts at its own last step. T may be 0 when
                lengths are given.
            resets: bool `[T, B]`, `[B, T]` with `batch_first`, `[T]` unbatched. Where it is true a new episode
                begins: the state of each direction is zeroed between this step and the one before (forward also drops
                `hx` at t = 0).
            return_states: whether to return the states and gates of every step, too, with derivatives.

        Returns:
            `output` (like `input`, with `D*P` features) and the final state, in the form of `hx`. With `return_states`
            a third: a tuple of `fastrnn.states.LayerStates`, one for each layer, in the layout of `output`.

        Raises:
            ValueError, RuntimeError: a dimension, size, dtype or value is wrong; texts as in torch.nn.
            TypeError: `lengths`, `resets` or `hx` is not a tensor of the right dtype, or `return_states` no bool.
            NotImplementedError: `input` is a nested tensor.
        """
        if return_states is False and not torch.compiler.is_compiling():
            found = self._forward_eagerly(input, hx, lengths, resets)
            if found is not None:
                return found
        found = readers.read(self, input, hx, lengths=lengths, resets=resets, return_states=return_states or None)
        if found is not None:
            read: Result = found
            return read
        return self._call(input, hx, lengths, resets, return_states)

    def extra_repr(self) -> str:
        own = self._beyond_torch()
        options = (f", {own}" if own else "") + (f", weights={self.weights!r}" if self.weights else "")
        return super().extra_repr() + options + (", recompute=True" if self.recompute else "")

    def _eager_weights(self) -> tuple[Tensor, ...]:
        with contextlib.suppress(KeyError):  # of computed ones
            if not CELLS[self._cell].unit_weights:
                own: tuple[Any, ...] = tuple(map(self._parameters.__getitem__, self._flat_weights_names))
                return own
        return super()._eager_weights()

    def _suffixes(self) -> list[str]:
        """Of the names of the parameters of each direction of each layer."""
        return [names[0].removeprefix("weight_ih") for names in self._all_weights]

    def _own_weights(self, suffix: str) -> Tensor | None:
        """The unit weights `[U, H]` of one direction of a layer, of a cell that has some."""
        return None

    def _weights(self) -> list[list[Weights]]:
        """The current parameters per layer and direction, be they computed (weight_norm) or assigned again."""
        if not torch.compiler.is_compiling():
            _C.leave_openmp_after_fork()
        D = 2 if self.bidirectional else 1
        directions = []
        for names, suffix in zip(self._all_weights, self._suffixes(), strict=True):
            tensors: list[Any] = [self._parameters.get(name) for name in names]
            tensors = [getattr(self, name) if t is None else t for t, name in zip(tensors, names, strict=True)]
            biases = tensors[2:4] if self.bias else (None, None)
            w_hr = tensors[-1] if self.proj_size else None
            directions.append(Weights._make((*tensors[:2], *biases, w_hr, self._own_weights(suffix))))
        return [directions[i : i + D] for i in range(0, len(directions), D)]


class RNN(_Recurrent, torch.nn.RNN):
    r"""Elman network (Elman 1990), a drop-in for `torch.nn.RNN` with the same positional arguments.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad f = \tanh \text{ or ReLU or } \sigma

    `nonlinearity` may be "sigmoid", too, which torch.nn does not have.

    Keyword-only:
        leak: if given, the leaky network of Jaeger et al. 2007,
            :math:`h_t = (1 - \mathrm{leak}) \odot h_{t-1} + \mathrm{leak} \odot f(...)`. A number or a tensor `[H]` is
            fixed, and `leak_l[k]` `[H]` are buffers; with a `Parameter` `[H]` they are parameters that start from it.
        weights, recompute: as of `fastrnn.LSTM`.
    """

    if TYPE_CHECKING:
        __call__: CallWithState

    _leak = None  # of a module that was a torch.nn.RNN, or was pickled as one

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        leak: float | Tensor | None = None,
        weights: str | None = None,
        recompute: bool = False,
        **unknown: NoReturn,  # for torch.nn to refuse
    ) -> None:
        sizes = input_size, hidden_size, num_layers
        options = {"dropout": dropout, "bidirectional": bidirectional, "device": device, "dtype": dtype}
        known = "tanh" if nonlinearity == "sigmoid" else nonlinearity
        super().__init__(*sizes, known, bias, batch_first, **options, **unknown)
        self.nonlinearity, self.weights, self.recompute = nonlinearity, weights, recompute
        if leak is not None:
            self._add_leak(leak)

    @property
    def leak(self) -> float | str | None:
        """What the layer was made with: a number, "of each unit", "trained", or None."""
        return self._leak

    def reset_parameters(self) -> None:
        """As torch.nn's; trained leaks stay as they are."""
        leaks = {name: p.detach().clone() for name, p in self.named_parameters() if name.startswith("leak_l")}
        super().reset_parameters()
        with torch.no_grad():
            for name, leak in leaks.items():
                self.get_parameter(name).copy_(leak)

    def _add_leak(self, leak: object) -> None:
        if isinstance(leak, bool) or not isinstance(leak, int | float | Tensor):
            raise TypeError(f"leak: expected a number, a tensor or a Parameter, got {type(leak).__name__}")
        shape, like = (self.hidden_size,), self.get_parameter("weight_ih_l0")
        if isinstance(leak, Tensor) and leak.shape != shape:
            raise ValueError(f"leak: expected shape {shape}, got {tuple(leak.shape)}")
        if isinstance(leak, Tensor) and leak.requires_grad and not isinstance(leak, Parameter):
            raise ValueError(
                "leak: expected a Parameter where it is to be trained, got a tensor that requires gradients"
            )
        values = torch.as_tensor(leak, dtype=like.dtype, device=like.device).detach().expand(shape)
        if not values.is_meta and not values.isfinite().all():
            raise ValueError(f"leak: expected finite numbers, got {leak}")
        self._leak = "trained" if isinstance(leak, Parameter) else "of each unit" if isinstance(leak, Tensor) else leak
        for suffix in self._suffixes():
            values = values.clone()
            if isinstance(leak, Parameter):
                self.register_parameter(f"leak{suffix}", Parameter(values))
            else:
                self.register_buffer(f"leak{suffix}", values)

    @property
    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}" if self._leak is None else f"leaky_{self.nonlinearity}"

    def _beyond_torch(self) -> str | None:
        own = ["nonlinearity='sigmoid'"] if self.nonlinearity == "sigmoid" else []
        own += [] if self._leak is None else [f"leak={self._leak}"]
        return ", ".join(own) or None

    def _own_weights(self, suffix: str) -> Tensor | None:
        return None if self._leak is None else getattr(self, f"leak{suffix}").unsqueeze(0)


class LSTM(_Recurrent, torch.nn.LSTM):
    r"""Long short-term memory (Hochreiter and Schmidhuber 1997; projection: Sak et al. 2014), a drop-in for
    `torch.nn.LSTM` with the same positional arguments.

    .. math::
        i, f, o &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        g &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= f \odot c_{t-1} + i \odot g \\
        h_t &= o \odot \tanh(c_t), \text{ or } W_{hr} (o \odot \tanh(c_t)) \text{ with proj\_size}

    Keyword-only:
        peephole: if True, :math:`p_i \odot c_{t-1}`, :math:`p_f \odot c_{t-1}` and :math:`p_o \odot c_t` are added in
            the gates i, f and o (Gers, Schraudolph and Schmidhuber 2002). `peephole_l[k]` `[3, H]` are p_i, p_f, p_o.
        cell_clip: if given, c_t is kept between -cell_clip and cell_clip (Sak et al. 2014); such kernels are compiled
            when they are first used, see `fastrnn.Recurrent`. Not with `peephole`.
        weights: for inference in float32; see `fastrnn.ops.PackedLayers`. "bf16" rounds the weights to bfloat16: half
            the memory to read in each step, while inputs, states and sums stay float32. Each weight is off by at most
            2^-9 of itself. "int8" rounds each row of a weight to multiples of a 127th of its largest number (rows that
            are on such a grid already keep it), and what it multiplies likewise, each row anew in every step: a quarter
            of the memory, and sums of integers, which are exact. NaN or infinity in a row make all of that row NaN.
            At most 131072 inputs and units.
        recompute: if True, training keeps the states alone and the backward pass computes the gates again: less
            memory, more time; see `fastrnn.ops.layer`.

    The last two are attributes, too, and may be assigned later.

    Products of numbers rounded to bfloat16, in training too, are PyTorch's to allow, where the CPU has an instruction
    for them: `torch.backends.mkldnn.rnn.fp32_precision = "bf16"`.
    """

    if TYPE_CHECKING:
        __call__: CallWithPair

    _carried = 1
    _peephole = False  # these two of a module that was a torch.nn.LSTM, or was pickled as one
    _cell_clip: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        cell_clip: float | None = None,
        weights: str | None = None,
        recompute: bool = False,
    ) -> None:
        sizes = input_size, hidden_size, num_layers
        super().__init__(*sizes, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        _check_bool("peephole", peephole)
        cell_clip = _checked_clip(cell_clip, peephole)
        if cell_clip is not None:
            self._cell_clip = cell_clip
        self.weights, self.recompute = weights, recompute
        if peephole:
            self._peephole = True
            for suffix in self._suffixes():
                new = torch.empty(3, hidden_size, device=device, dtype=dtype)
                self.register_parameter(f"peephole{suffix}", Parameter(new))
            self.reset_parameters()

    @property
    def _cell(self) -> str:
        if self._cell_clip is not None:
            return clipped.lstm(self._cell_clip)
        return "lstm_peephole" if self._peephole else "lstm"

    @property
    def peephole(self) -> bool:
        return self._peephole

    @property
    def cell_clip(self) -> float | None:
        return self._cell_clip

    def _beyond_torch(self) -> str | None:
        if self._cell_clip is not None:
            return f"cell_clip={self._cell_clip}"
        return "peephole=True" if self._peephole else None

    def _own_weights(self, suffix: str) -> Tensor | None:
        return getattr(self, f"peephole{suffix}") if self._peephole else None


class GRU(_Recurrent, torch.nn.GRU):
    r"""Gated recurrent unit (Cho et al. 2014), a drop-in for `torch.nn.GRU` with the same positional arguments.

    .. math::
        r, z &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        n &= \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    Keyword-only:
        reset_after: if False, the reset gate is applied before the product, as in the paper:
            :math:`n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r \odot h_{t-1}) + b_{hn})`.
        weights, recompute: as of `fastrnn.LSTM`.
    """

    if TYPE_CHECKING:
        __call__: CallWithState

    reset_after = True  # of a module that was a torch.nn.GRU, or was pickled as one

    def __init__(
        self,
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
        reset_after: bool = True,
        weights: str | None = None,
        recompute: bool = False,
        **unknown: NoReturn,  # for torch.nn to refuse
    ) -> None:
        sizes = input_size, hidden_size, num_layers
        options = {"bidirectional": bidirectional, "device": device, "dtype": dtype}
        super().__init__(*sizes, bias, batch_first, dropout, **options, **unknown)
        self.reset_after, self.weights, self.recompute = reset_after, weights, recompute

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def _beyond_torch(self) -> str | None:
        return None if self.reset_after else "reset_after=False"


class _RecurrentCell(_Replacement, torch.nn.RNNCellBase):
    """What the three single-step cells share: checks with torch.nn's texts, then one step of `functional.rnn`."""

    _carried = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != PACKS}

    @property
    def _cell(self) -> str:
        """The cell's name in `fastrnn.cells.CELLS`."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Given = None) -> Any:
        """One step: `input [B, I]` or `[I]`, state `[B, H]` or `[H]` (an LSTM's pair; zero if None) -> the new state.

        Raises:
            ValueError: a tensor has the wrong number of dimensions, or another dtype than the weights.
            RuntimeError: a size is wrong.
            NotImplementedError: `input` is a nested tensor.
        """
        if not torch.compiler.is_compiling():
            found = step_eagerly(self, self._cell, input, hx)
            if found is not None:
                return found
        found = readers.read(self, input, hx)
        if found is not None:
            return found
        states: tuple[Any, ...] = (
            () if hx is None else as_states(hx, "hc", "lstm_cell expects two hidden states") if self._carried else (hx,)
        )
        self._check_dims(input, states)
        is_batched = input.dim() == 2
        if not is_batched:
            input, states = input.unsqueeze(0), tuple(state.unsqueeze(0) for state in states)
        weights = self._weights()
        self._check_sizes(input, states, weights.w_ih)
        h0, c0 = (*(state.unsqueeze(0) for state in states), None, None)[:2]
        _, h, c = functional.rnn(self._cell, input.unsqueeze(0), h0, c0, [[weights]], packs=packs_of(self))
        if not is_batched:
            h, c = h.squeeze(1), c.squeeze(1)
        return (h.squeeze(0), c.squeeze(0)) if self._carried else h.squeeze(0)

    def _eager_weights(self) -> tuple[Tensor, ...]:
        """The weights as `ops.flatten` gives them. Found the usual way, attributes cost a microsecond together."""
        own: Mapping[str, Any] = self._parameters
        try:
            weights = own["weight_ih"], own["weight_hh"]
            return (*weights, own["bias_ih"], own["bias_hh"]) if self.bias else weights
        except KeyError:  # computed ones, such as weight_norm's
            return tuple(ops.flatten([self._weights()]))

    def _weights(self) -> Weights:
        if not torch.compiler.is_compiling():
            _C.leave_openmp_after_fork()
        return Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def _check_dims(self, input: Tensor, states: tuple[Tensor, ...]) -> None:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, state in enumerate(states):
            if state.dim() not in (1, 2):
                which = f"hx[{index}]" if self._carried else "hidden"
                raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")

    def _check_sizes(self, input: Tensor, states: tuple[Tensor, ...], weight: Tensor) -> None:
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for index, state in enumerate(states):
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )
        if input.dtype != weight.dtype and not functional.may_differ(input, weight):
            raise ValueError(f"{type(self).__name__}: expected input of dtype {weight.dtype}, got {input.dtype}")


class RNNCell(_RecurrentCell, torch.nn.RNNCell):
    """One step of an Elman network, a drop-in for `torch.nn.RNNCell`; equation and `nonlinearity` in `fastrnn.RNN`."""

    if TYPE_CHECKING:
        __call__: StepWithState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)

    @property
    def _cell(self) -> str:
        if self.nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"

    def _beyond_torch(self) -> str | None:
        return "nonlinearity='sigmoid'" if self.nonlinearity == "sigmoid" else None


class LSTMCell(_RecurrentCell, torch.nn.LSTMCell):
    """One step of an LSTM, a drop-in for `torch.nn.LSTMCell`; equations in `fastrnn.LSTM`.

    `LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None)`.
    """

    if TYPE_CHECKING:
        __call__: StepWithPair

    _carried = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)

    @property
    def _cell(self) -> str:
        return "lstm"


class GRUCell(_RecurrentCell, torch.nn.GRUCell):
    """One step of a GRU, a drop-in for `torch.nn.GRUCell`; equations and `reset_after` in `fastrnn.GRU`.

    `GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None, *, reset_after=True)`.
    """

    if TYPE_CHECKING:
        __call__: StepWithState

    reset_after = True  # of a module that was a torch.nn.GRUCell, or was pickled as one

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.reset_after = reset_after

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def _beyond_torch(self) -> str | None:
        return None if self.reset_after else "reset_after=False"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def _check_weights(name: str, value: object) -> None:
    if value not in (None, "bf16", "int8"):
        raise ValueError(f"{name}: expected None, 'bf16' or 'int8', got {value!r}")


def _checked_clip(clip: object, peephole: bool) -> float | None:
    if clip is None:
        return None
    if isinstance(clip, bool) or not isinstance(clip, int | float):
        raise TypeError(f"cell_clip: expected a number or None, got {type(clip).__name__}")
    if not 1e-30 <= clip <= 1e30:
        raise ValueError(f"cell_clip: expected a positive number, got {clip}")
    if peephole:
        raise ValueError("peephole, cell_clip: expected one of them, got both")
    return float(clip)


_CHECKS: dict[str, Callable[[str, object], None]] = {  # of what is assigned to an attribute
    "reset_after": _check_bool,
    "recompute": _check_bool,
    "weights": _check_weights,
    "qconfig": readers.warn_of_quantization,
}
