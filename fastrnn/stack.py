"""Recurrent layers on top of one another, each of its own kind and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.signatures import Input
from fastrnn.stream import NotCopied

LAYER = "input_size", "hidden_size", "num_layers"  # what every recurrent layer has, and a cell has not


class Stack(nn.Module):
    r"""A deep network of any recurrent layers: each reads the output of the one below.

    .. math:: y^{(l)} = \mathrm{layer}_l(y^{(l-1)}), \text{ or } y^{(l-1)} + \mathrm{layer}_l(y^{(l-1)})
        \text{ with residual connections}, \quad y^{(0)} = x

    Args:
        layers: modules that are called as torch.nn's recurrent layers, each with the `input_size` that the one below
            has as its output's; of different classes and sizes if wished. Those of torch.nn take no lengths and no
            resets, and have no `stream()`.
        residual: whether each layer but the first adds its input to its output (Wu et al. 2016, arXiv 1609.08144);
            their sizes have to be the same then.
        dropout: the probability of dropping an element of each layer's output but the last one's while training.

    Raises:
        TypeError: a layer is no module, or `residual` no bool.
        ValueError: there is no layer, sizes do not fit, some layers are `batch_first` and others not, or `dropout` is
            no probability.
    """

    def __init__(self, *layers: nn.Module, residual: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(residual, bool):
            raise TypeError(f"residual: expected a bool, got {type(residual).__name__}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number between 0 and 1, got {dropout!r}")
        _check_layers(layers, residual)
        self.layers = nn.ModuleList(layers)
        self.residual, self.dropout = residual, dropout

    @property
    def batch_first(self) -> bool:
        """Whether the layers are."""
        return getattr(self.layers[0], "batch_first", False)

    def forward(
        self,
        input: Input,
        hx: Sequence[Any] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over `input`.

        Args:
            input: as of the layers; a `PackedSequence`, too.
            hx: the initial state of each layer in its own form, or None; None for all of them: zeros.
            lengths, resets, return_states: as of `fastrnn.LSTM`, for layers that take them.

        Returns:
            The last layer's output, and a tuple of the final states, each in the form of its layer. With
            `return_states` a third: a tuple of what each layer returns of its states and gates.

        Raises:
            TypeError: `hx` is no tuple or list.
            ValueError: `hx` has not as many states as there are layers.
        """
        if hx is None:
            hx = (None,) * len(self.layers)
        if not isinstance(hx, tuple | list):
            raise TypeError(f"hx: expected a tuple of {len(self.layers)} states, got {type(hx).__name__}")
        if len(hx) != len(self.layers):
            raise ValueError(f"hx: expected {len(self.layers)} states, got {len(hx)}")
        options = {"lengths": lengths, "resets": resets, "return_states": return_states or None}
        options = {name: value for name, value in options.items() if value is not None}
        states, of_steps = [], []
        for index, (layer, before) in enumerate(zip(self.layers, hx, strict=True)):
            output, state, *others = layer(input, before, **options)
            if self.residual and index:
                output = _added(input, output)
            input = output if index == len(self.layers) - 1 else self._dropped(output)
            states.append(state)
            of_steps += others
        return (input, tuple(states), tuple(of_steps)) if return_states else (input, tuple(states))

    def _dropped(self, output: Input) -> Input:
        if not self.dropout or not self.training:
            return output
        if isinstance(output, PackedSequence):
            return output._replace(data=nn.functional.dropout(output.data, self.dropout))
        return nn.functional.dropout(output, self.dropout)

    def stream(self, batch: int = 1, *, copy: bool = False) -> StackStream:
        """As `fastrnn.LSTM.stream`, through all layers."""
        layers: list[Any] = list(self.layers)
        return StackStream([layer.stream(batch, copy=copy) for layer in layers], self.residual)

    def extra_repr(self) -> str:
        return f"residual={self.residual}, dropout={self.dropout}"


class StackStream(NotCopied):
    """The streams (`fastrnn.Stream`) of a `Stack`: `y = step(x)` with x `[B, I]`.

    Attributes:
        state: a tuple of the layers' states, each as `fastrnn.Stream.state`.
    """

    def __init__(self, streams: list[Any], residual: bool) -> None:
        self._streams, self._residual = streams, residual

    @property
    def state(self) -> tuple[Any, ...]:
        return tuple(stream.state for stream in self._streams)

    @property
    def nbytes(self) -> int:
        """As `fastrnn.Stream.nbytes`, of all layers."""
        return sum(stream.nbytes for stream in self._streams)

    def __call__(self, x: Tensor) -> Tensor:
        for index, stream in enumerate(self._streams):
            y = stream(x)
            x = x + y if self._residual and index else y
        return x

    def reset(self, rows: Tensor | None = None) -> None:
        """As `fastrnn.Stream.reset`."""
        for stream in self._streams:
            stream.reset(rows)


def _added(input: Any, output: Any) -> Any:
    if isinstance(output, PackedSequence):
        return output._replace(data=input.data + output.data)
    return input + output


def output_size(layer: Any) -> int:
    """The features of a recurrent layer's output."""
    directions = 2 if getattr(layer, "bidirectional", False) else 1
    size: int = getattr(layer, "proj_size", 0) or layer.hidden_size
    return directions * size


def _check_layers(layers: tuple[Any, ...], residual: bool) -> None:
    if not layers:
        raise ValueError("layers: expected at least one")
    for index, layer in enumerate(layers):
        if not isinstance(layer, nn.Module) or not all(hasattr(layer, name) for name in LAYER):
            raise TypeError(f"layers[{index}]: expected a recurrent layer, got {type(layer).__name__}")
    orders = {getattr(layer, "batch_first", False) for layer in layers}
    if len(orders) > 1:
        raise ValueError("layers: expected batch_first of all or of none")
    for index in range(1, len(layers)):
        below, layer = output_size(layers[index - 1]), layers[index]
        if layer.input_size != below:
            raise ValueError(f"layers[{index}]: expected input_size {below}, got {layer.input_size}")
        if residual and output_size(layer) != below:
            raise ValueError(
                f"layers[{index}]: expected an output of {below} features, as its input has, to be added to it, "
                f"got {output_size(layer)}"
            )
