"""An initial state that is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from fastrnn.cells import CELLS
from fastrnn.composed import Composed
from fastrnn.layers import Layers
from fastrnn.signatures import Given, Input, States


class LearnedState(nn.Module):
    r"""A layer whose initial state is a parameter where a call gives none: :math:`s_0` in place of zeros.

    Args:
        layer: any of fastrnn's layers: `LSTM`, `GRU`, `RNN`, `Recurrent`, those of papers, `Regularized`.

    Attributes:
        [state]_0: `[L*D, P]` for the output h, `[L*D, H]` for each other state of the cell, such as `h_0` and `c_0`.
            They start from 0.

    A reset within a sequence still sets the state to zero.

    Raises:
        TypeError: `layer` is none of these.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, Layers) or isinstance(layer, Composed):
            raise TypeError(f"layer: expected an LSTM, GRU, RNN or Recurrent of fastrnn, got {type(layer).__name__}")
        self.layer = layer
        weight = next(layer.parameters())
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        for i, name in enumerate(CELLS[layer._cell].states):
            size = layer.hidden_size if i else layer.proj_size or layer.hidden_size
            self.register_parameter(f"{name}_0", Parameter(weight.new_zeros(rows, size)))

    def forward(self, input: Input, hx: Given = None, *rows: Any, **options: Any) -> Any:
        """As the layer's, with the learned state if `hx` is None."""
        return self.layer(input, self.state(input) if hx is None else hx, *rows, **options)

    def state(self, input: Input) -> States:
        """The initial state for a call with `input`, in the form of `hx`."""
        if isinstance(input, PackedSequence):
            batch: tuple[int, ...] = (int(input.batch_sizes[0]),)
        else:
            batch = (input.shape[0 if self.layer.batch_first else 1],) if input.dim() == 3 else ()
        names = CELLS[self.layer._cell].states
        states: tuple[Tensor, ...] = tuple(self.get_parameter(f"{name}_0") for name in names)
        if batch:
            states = tuple(s.unsqueeze(1).expand(s.shape[0], *batch, s.shape[1]) for s in states)
        return states if len(states) > 1 else states[0]
