"""`torch.compile` and layers that are instances of torch.nn's classes.

Dynamo refuses instances of torch.nn.RNN, LSTM and GRU, for which it has no good graph, unless `config.allow_rnn` is
set. Ours are such instances, and have one: an op. So Dynamo's function that wraps a module runs with the flag set, for
our classes and for this one call; torch's own layers, and the flag as others see it, stay as they are. The alternatives
are worse: without the base class every `isinstance(module, torch.nn.LSTM)` of others skips our layers in silence; a
`__class__` that lies deceives `isinstance`, but not `issubclass`, and pickle stumbles over it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastrnn import modules


def prepare() -> None:
    from torch._dynamo import trace_rules
    from torch._dynamo.variables.builder import VariableBuilder

    wrap_module = VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def wrap_module_or_ours(self: Any, value: Any) -> Any:
        if not isinstance(value, modules._Recurrent):
            return wrap_module(self, value)
        with torch._dynamo.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    VariableBuilder.wrap_module = wrap_module_or_ours  # type: ignore[method-assign]
    # The sizes of what is packed are a tensor's values, which no graph can hold: a graph break, as in torch.nn.
    modules._Recurrent._forward_packed = torch._dynamo.disable(  # type: ignore[method-assign]
        modules._Recurrent._forward_packed
    )
    # Dynamo goes on behind that, where pad_packed_sequence may follow, which needs these values, too: a graph break
    # since torch 2.13, an error before. (torch.nn's layers are spared it: Dynamo gives up the function around them.)
    trace_rules.manual_torch_name_rule_map.setdefault(
        "torch.nn.utils.rnn.pad_packed_sequence", torch._dynamo.variables.SkipFunctionVariable
    )
    trace_rules.get_torch_obj_rule_map.cache_clear()
