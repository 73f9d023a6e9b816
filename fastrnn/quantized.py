"""Modules that `torch.ao.quantization.quantize_dynamic` has made, and what becomes of them here."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn import Parameter

from fastrnn import modules
from fastrnn.adopt import become

_MODULE = "torch.ao.nn.quantized.dynamic.modules.rnn"
_LAYERS = {"LSTM": modules.LSTM, "GRU": modules.GRU}


def class_for(module: Any) -> type | str | None:
    """The class that takes over a quantized layer, the reason to leave a quantized module, or None for all others."""
    theirs = sys.modules.get(_MODULE)  # if nobody has imported it, there are no such modules
    if theirs is None or not isinstance(module, (theirs.RNNBase, theirs.RNNCellBase)):
        return None
    if isinstance(module, theirs.RNNCellBase):
        return 'a quantized cell; fastrnn has weights="int8" for layers alone'
    ours = next((ours for name, ours in _LAYERS.items() if type(module) is getattr(theirs, name)), None)
    if ours is None:
        return "a subclass of a quantized layer may have code of its own"
    if "forward" in vars(module):
        return "it has a forward of its own"
    if module.get_weight()["weight_hh_l0"].shape[1] != module.hidden_size:
        return "torch.ao has quantized it without its projection"
    return ours


def take_over(module: Any, ours: type) -> None:
    """Turns a quantized layer into one of our class for it, in place, whose kernels use its int8 weights as they are.

    Where it was quantized to float16 instead, the weights are those, in float32.
    """
    options = {name: getattr(module, name) for name in ("bias", "batch_first", "dropout", "bidirectional")}
    sizes = module.input_size, module.hidden_size, module.num_layers
    new = ours(*sizes, **options, device="meta", weights="int8" if module.dtype == torch.qint8 else None)
    for name, tensor in {**module.get_weight(), **module.get_bias()}.items():
        # No gradient of a weight was recorded before, so calls need no torch.no_grad() now.
        setattr(new, name, Parameter(tensor.dequantize().float(), requires_grad=False))
    become(module, new, without=("dtype", "version", "_all_weight_values"))
