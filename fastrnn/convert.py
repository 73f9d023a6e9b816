"""Swaps torch.nn's recurrent modules for fastrnn's, and back, inside any model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastrnn import modules

_NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
_OURS = {getattr(torch.nn, name): getattr(modules, name) for name in _NAMES}
_TORCH = {ours: theirs for theirs, ours in _OURS.items()}


@dataclass
class Conversion:
    """What was replaced and what was left. Prints as one line each.

    Attributes:
        replaced: `(name in the model, class before, class now)`.
        left: `(name in the model, class, why)`.
    """

    replaced: list[tuple[str, type, type]] = field(default_factory=list)
    left: list[tuple[str, type, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{_label(name)}: {_path(old)} -> {_path(new)}" for name, old, new in self.replaced]
        lines += [f"{_label(name)}: left as {_path(kind)}: {why}" for name, kind, why in self.left]
        return "\n".join(lines) or "no recurrent modules"

    __repr__ = __str__


def convert(model: torch.nn.Module) -> Conversion:
    """Turns every `torch.nn.RNN`, `LSTM`, `GRU` and cell of `model`, or `model` itself, into fastrnn's, in place.

    The module objects stay the same, only their class changes: parameters, buffers, hooks, optimisers and every
    reference to them go on as before. Subclasses, parametrized and scripted modules are left, with the reason.

    Returns:
        What was replaced and what was left; print it.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    return _swap(model, _OURS)


def revert(model: torch.nn.Module) -> Conversion:
    """Undoes `convert`. A module of another cell than torch.nn has (`reset_after=False`) is left, with the reason.

    `weights` and `recompute`, which choose how a module computes but not what, have no effect in torch.nn."""
    return _swap(model, _TORCH)


def _swap(model: torch.nn.Module, classes: dict[type, type]) -> Conversion:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    result = Conversion()
    for name, module in model.named_modules():
        kind = type(module)
        why = _reason_to_leave(module, classes)
        if why:
            result.left.append((name, kind, why))
        elif kind in classes:
            module.__class__ = classes[kind]
            module.__dict__.pop("_packed_layers", None)
            result.replaced.append((name, kind, classes[kind]))
    return result


def _reason_to_leave(module: torch.nn.Module, classes: dict[type, type]) -> str | None:
    kind = type(module)
    if kind in classes:
        return "torch.nn has no reset_after=False" if not getattr(module, "reset_after", True) else None
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return "a scripted module holds compiled code" if original in _NAMES else None
    if kind in _TORCH or kind in _OURS or not isinstance(module, tuple(classes)):
        return None
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "a parametrized module has a class of its own; convert it before it is parametrized"
    return "a subclass may have code of its own"


def _label(name: str) -> str:
    return name or "(the model itself)"


def _path(kind: type) -> str:
    module = kind.__module__.removesuffix(".modules.rnn").removesuffix(".modules")
    return f"{module}.{kind.__qualname__}"
