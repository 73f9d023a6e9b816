"""Swaps torch.nn's recurrent modules for fastrnn's, and back, inside any model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from fastrnn import layers, modules, private, quantized
from fastrnn.readers import REPLACED

logger = logging.getLogger("fastrnn")

_OURS: dict[Any, type] = {theirs: getattr(modules, theirs.__name__) for theirs in REPLACED}
_TORCH = {ours: theirs for theirs, ours in _OURS.items()}
_OPTIONS = ("weights", "recompute", "reset_after")  # attributes that torch.nn's classes do not have
_FREE = {"extra_repr", "reset_parameters"}  # what a subclass may define without changing what is computed
_SPECIAL = {"__call__", "_call_impl", "__getattr__", "__getattribute__", "__setattr__", "__reduce__", "__reduce_ex__"}


def convert(
    model: torch.nn.Module, *, weights: str | None = None, recompute: bool = False, subclasses: bool = False
) -> torch.nn.Module:
    """Turns every `torch.nn.RNN`, `LSTM`, `GRU` and cell of `model`, or `model` itself, into fastrnn's, in place.

    The module objects stay the same, only their class changes: parameters, buffers, hooks, optimisers and every
    reference to them go on as before. LSTMs and GRUs that `torch.ao.quantization.quantize_dynamic` has made become
    layers with `weights="int8"` and the very int8 weights that they had. Opacus' `DPRNN`, `DPLSTM` and `DPGRU`
    become layers with the very same parameters under torch.nn's names, before private training or after it. The
    logger "fastrnn" tells at INFO what is replaced, and at WARNING what is left and why: parametrized and scripted
    modules, quantized cells, subclasses, torchrl's layers in Python, and those of Opacus that have hooks or dropout.

    Args:
        model: any module.
        weights, recompute: options of the layers that are replaced; see `fastrnn.LSTM`.
        subclasses: whether to replace instances of subclasses, too, where the subclass defines nothing that a layer
            computes with. They stay instances of it.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`, or an option is not of the right type.
        ValueError: `weights` is not known.
    """
    options = {"weights": weights, "recompute": recompute}
    for name, value in options.items():
        modules._CHECKS[name](name, value)
    modules._check_bool("subclasses", subclasses)
    for module in _swap(model, functools.partial(_class_for, subclasses=subclasses)):
        if isinstance(module, modules._Recurrent):
            for name, value in options.items():
                if value is not None:  # a quantized layer has come with weights="int8"
                    setattr(module, name, value)
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes `convert`, and returns `model`; what was quantized, or one of Opacus' layers, becomes torch.nn's. A module
    of another cell than torch.nn has (`reset_after=False`, `peephole=True`, `leak=`) is left.

    `weights` and `recompute`, which choose how a module computes but not what, are forgotten."""
    for module in _swap(model, _class_before):
        for name in (layers.PACKS, *_OPTIONS):
            module.__dict__.pop(name, None)
    return model


def left(module: torch.nn.Module) -> str | None:
    """Why `convert` leaves a recurrent module, or what to do about it; None for all other modules."""
    found = _class_for(module, subclasses=False)
    return found if isinstance(found, str) or found is None else "fastrnn.convert(model) replaces it"


def _swap(model: torch.nn.Module, class_for: Callable[[torch.nn.Module], type | str | None]) -> list[torch.nn.Module]:
    """`class_for` gives a module's new class, the reason to leave it, or None: it is no concern of ours."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [(name, module, class_for(module)) for name, module in model.named_modules()]  # all, before any is swapped
    for name, module, new in found:
        old = type(module)
        if isinstance(new, str):
            logger.warning("%s: left as %s: %s", label(name), path(old), new)
        elif new is not None:
            if isinstance(module, REPLACED):
                module.__class__ = new
            else:
                (quantized if quantized.class_for(module) else private).take_over(module, new)
            logger.info("%s: %s -> %s", label(name), path(old), path(new))
    return [module for _, module, new in found if isinstance(new, type)]


def _class_for(module: Any, subclasses: bool) -> type | str | None:
    kind = type(module)
    found = quantized.class_for(module) or private.class_for(module)
    if found:
        return found
    own = _hidden_attributes(module) if isinstance(module, REPLACED) else None
    if own and not isinstance(module, modules._Replacement):
        return f"it has attributes that a layer of fastrnn has for itself: {', '.join(own)}"
    if kind in _OURS:
        return _OURS[kind]
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "") in {kind.__name__ for kind in REPLACED}
        return "a scripted module holds compiled code; convert it before it is scripted" if scripted else None
    if isinstance(module, modules._Replacement):
        return None
    if not isinstance(module, REPLACED):
        return _why_unknown(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "a parametrized module has a class of its own; convert it before it is parametrized"
    if not subclasses:
        return "a subclass may have code of its own; convert(model, subclasses=True) looks"
    overrides = _overrides(kind)
    if overrides:
        return f"the subclass has its own {', '.join(sorted(overrides))}"
    try:
        return _replaced_subclass(kind)  # type: ignore[arg-type]  # the class of a class of modules has a hash
    except Exception as error:  # of the user's __init_subclass__ or metaclass
        return f"the subclass cannot be derived from: {error}"


def _why_unknown(module: torch.nn.Module) -> str | None:
    """Why a module that is none of torch.nn's six, but of the same base, is left."""
    kind = type(module)
    if not isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase):
        return None
    if kind.__module__.startswith("torchrl.") and isinstance(module, torch.nn.RNNBase):
        return "torchrl's own takes a mask; make_cudnn_based() of its LSTMModule or GRUModule, and convert then"
    return "it has code of its own on torch.nn's base class"


def _class_before(module: torch.nn.Module) -> type | str | None:
    kind = type(module)
    if not isinstance(module, modules._Replacement) or isinstance(module, torch.jit.ScriptModule):
        return None
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "a parametrized module has a class of its own; remove its parametrizations first"
    if module._beyond_torch():
        return f"torch.nn has no {module._beyond_torch()}"
    before: type | str = _TORCH.get(kind) or kind.__dict__.get("_before_convert", "a subclass may have code of its own")
    return before


def _hidden_attributes(module: torch.nn.Module) -> list[str]:
    """Attributes, parameters and so on of the instance that our class would hide, or take for its own."""
    ours = next(_OURS[cls] for cls in type(module).__mro__ if cls in _OURS).__mro__
    names = {name for cls in ours if cls.__module__ in (modules.__name__, layers.__name__) for name in vars(cls)}
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return sorted(own & names)


def _overrides(kind: type) -> set[str]:
    """What a user's subclass defines of all that a layer, of torch.nn or of ours, computes with."""
    theirs = next(cls for cls in kind.__mro__ if cls in _OURS)
    bases = _OURS[theirs].__mro__
    used = {name for cls in bases[: bases.index(torch.nn.Module)] for name in vars(cls) if not name.startswith("__")}
    own = {name for cls in kind.__mro__[: kind.__mro__.index(theirs)] for name in vars(cls)}
    return own & (used - _FREE | _SPECIAL)


@functools.cache
def _replaced_subclass(kind: type) -> type:
    """A class that is `kind` first and ours for all that `kind` inherits from torch.nn."""
    ours = next(_OURS[cls] for cls in kind.__mro__ if cls in _OURS)
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_before_convert": kind}
    own["__reduce_ex__"] = lambda self, protocol: (_new_of_subclass, (kind,), self.__getstate__())
    return type(kind.__name__, (kind, ours), own)


def _new_of_subclass(kind: type) -> torch.nn.Module:
    """An empty module of `_replaced_subclass(kind)`, for pickle, which does not find that class by its name."""
    return object.__new__(_replaced_subclass(kind))


def label(name: str) -> str:
    return name or "(the model itself)"


def path(kind: type) -> str:
    prefix = "fastrnn's " if "_before_convert" in vars(kind) else ""
    module = kind.__module__.removesuffix(".modules.rnn").removesuffix(".modules")
    return f"{prefix}{module}.{kind.__qualname__}"
