"""Modules that `torch.ao.quantization.quantize_dynamic` has made, and what becomes of them here."""

from __future__ import annotations

import sys

import torch
from torch.nn import Parameter

from fastrnn import modules

_MODULE = "torch.ao.nn.quantized.dynamic.modules.rnn"
_LAYERS = {"LSTM": modules.LSTM, "GRU": modules.GRU}
_CELLS = ("RNNCell", "LSTMCell", "GRUCell")
_KEPT = ("training", "_forward", "_backward", "_state_dict", "_load_state_dict")  # attributes that are not the layer's


def class_for(module: torch.nn.Module) -> type | str | None:
    """The class that takes over a quantized layer, the reason to leave a quantized cell, or None for all others."""
    theirs = sys.modules.get(_MODULE)  # if nobody has imported it, there are no such modules
    if theirs is None:
        return None
    for name, ours in _LAYERS.items():
        if type(module) is getattr(theirs, name):
            return ours
    if any(type(module) is getattr(theirs, name) for name in _CELLS):
        return 'a quantized cell; fastrnn has weights="int8" for layers alone'
    return None


def take_over(module: torch.nn.Module) -> None:
    """Turns a quantized layer into one of ours, in place, whose kernels use its int8 weights as they are.

    Where it was quantized to float16 instead, the weights are those, in float32.
    """
    ours = class_for(module)
    options = {name: getattr(module, name) for name in ("bias", "batch_first", "dropout", "bidirectional")}
    sizes = module.input_size, module.hidden_size, module.num_layers
    new = ours(*sizes, **options, device="meta", weights="int8" if module.dtype == torch.qint8 else None)
    for name, tensor in {**module.get_weight(), **module.get_bias()}.items():
        # On no weight a gradient was recorded before, so calls need no torch.no_grad() now.
        setattr(new, name, Parameter(tensor.dequantize().float(), requires_grad=False))
    kept = {name: value for name, value in vars(module).items() if name.startswith(_KEPT)}
    module.__class__ = ours
    module.__dict__ = {**vars(new), **kept}
