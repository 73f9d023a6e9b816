"""How a module of another class than torch.nn's six becomes one of ours, in place."""

from __future__ import annotations

from collections.abc import Collection

import torch

_KEPT = ("training", "_forward", "_backward", "_state_dict", "_load_state_dict")  # attributes of any module, as hooks


def become(module: torch.nn.Module, new: torch.nn.Module, without: Collection[str]) -> None:
    """Gives `module` the class, options and parameters of `new`. Hooks, and what a user has added to it, stay.

    Args:
        without: attributes and children of `module` that are of no use to its new class.
    """
    old, own = vars(module), vars(new)
    others = {name: value for name, value in old.items() if name not in own and name not in without}
    kept = {name: old[name] for name in own if name.startswith(_KEPT)}
    for kind in ("_parameters", "_buffers", "_modules"):
        added = {name: value for name, value in old[kind].items() if name not in without}
        own[kind].update({name: value for name, value in added.items() if name not in own["_parameters"]})
    module.__class__ = type(new)
    module.__dict__ = {**others, **own, **kept}
