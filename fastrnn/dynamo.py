"""`torch.compile` and layers that are instances of torch.nn's classes.

Dynamo refuses instances of torch.nn.RNN, LSTM and GRU, for which it has no good graph, unless `config.allow_rnn` is set.
Ours are such instances, and have one: an op. So Dynamo's function that wraps a module runs with the flag set for our
classes, for this one call; the flag as others see it, and torch's own layers, stay as they are. The alternatives are worse:
without the base class every `isinstance(module, torch.nn.LSTM)` in others' code skips our layers in silence; a
`__class__` that lies deceives `isinstance`, but not `issubclass`, and pickle stumbles over it.

Importing Dynamo takes a second, so nothing is imported here: the change is made when somebody else imports it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys

import torch

from fastrnn import modules

_NAME = "torch._dynamo"


def _prepare() -> None:
    from torch._dynamo.variables.builder import VariableBuilder

    wrap_module = VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def wrap_module_or_ours(self, value):
        if not isinstance(value, modules._Recurrent):
            return wrap_module(self, value)
        with torch._dynamo.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    VariableBuilder.wrap_module = wrap_module_or_ours
    # The sizes of what is packed are the values of a tensor: no graph can hold them, so there is a graph break, as there
    # is in torch.nn's layers.
    modules._Recurrent._forward_packed = torch._dynamo.disable(modules._Recurrent._forward_packed)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `_prepare` as soon as Dynamo has been imported."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_prepare(module):
                execute(module)
                sys.meta_path.remove(self)
                _prepare()

            spec.loader.exec_module = execute_and_prepare
        return spec


def prepare() -> None:
    """To be called once, on import of fastrnn."""
    if _NAME in sys.modules:
        _prepare()
    else:
        sys.meta_path.insert(0, _AfterImport())
