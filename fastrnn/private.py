"""Opacus' recurrent layers, of privately trained models, and what becomes of them here."""

from __future__ import annotations

import sys
from typing import Any

from fastrnn import modules
from fastrnn.adopt import become

_MODULE = "opacus.layers.dp_rnn"
_RENAMING = "opacus.layers.param_rename"
_LAYERS = {"DPRNN": modules.RNN, "DPLSTM": modules.LSTM, "DPGRU": modules.GRU}
_OWN = {
    "cell_params",
    "cell_type",
    "has_cell_state",
    "num_directions",
    "old_to_new",
    "new_to_old",
    "cells",
    "dropout_layer",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def class_for(module: Any) -> type | str | None:
    """The class that takes over one of Opacus' layers, the reason to leave one, or None for all other modules."""
    theirs = sys.modules.get(_MODULE)  # if nobody has imported it, there are no such modules
    if theirs is None or not isinstance(module, theirs.DPRNNBase):
        return None
    ours = next((ours for name, ours in _LAYERS.items() if type(module) is getattr(theirs, name)), None)
    if ours is None:
        return "a subclass of one of Opacus' layers may have code of its own"
    if module.dropout:
        return "its dropout is one of states, which ours have not; for inference, set its dropout to 0 first"
    return _why_not(module, theirs) or ours


def _why_not(module: Any, theirs: Any) -> str | None:
    if "forward" in vars(module):
        return "it has a forward of its own"
    inner = [part for cell in module.cells for part in cell.modules()]
    if any(getattr(part, hooks) for part in inner for hooks in _HOOKS):
        return "its cells have hooks; to_standard_module() of a GradSampleModule removes Opacus' own"
    known = (theirs.DPRNNCell, theirs.DPLSTMCell, theirs.DPGRUCell, theirs.RNNLinear)
    if any(type(part) not in known or "forward" in vars(part) for part in inner):
        return "its cells are not Opacus' own"
    return None


def take_over(module: Any, ours: type) -> None:
    """Turns one of Opacus' layers into one of our class for it, in place, with the very same parameters."""
    options = {name: getattr(module, name) for name in ("bias", "batch_first", "bidirectional")}
    if ours is modules.RNN:
        options["nonlinearity"] = module.cells[0].nonlinearity
    new = ours(module.input_size, module.hidden_size, module.num_layers, **options, device="meta")
    for cell, suffix in zip(module.cells, new._suffixes(), strict=True):
        for part in ("ih", "hh"):
            for kind, parameter in getattr(cell, part).named_parameters():
                setattr(new, f"{kind}_{part}{suffix}", parameter)
    hooks = module._state_dict_hooks  # Opacus' own one asks for the names that parameters have in cells
    for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", None) == _RENAMING]:
        del hooks[key]
    cells = {name for name, child in module.named_children() if any(child is cell for cell in module.cells)}
    become(module, new, without=_OWN | cells)
