"""fastrnn: recurrent layers that replace torch.nn's, on a native core of their own."""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the extension links against its libraries; then built, which loads it)

from fastrnn import built, cells, dynamo, functional, init, modules, ops, papers, readers, reference  # noqa: F401
from fastrnn.convert import convert, revert
from fastrnn.explain import explain
from fastrnn.imports import later, when_imported
from fastrnn.learned_state import LearnedState
from fastrnn.legendre import LMU, LegendreMemory
from fastrnn.modules import *  # noqa: F403  (the classes that users construct)
from fastrnn.papers import *  # noqa: F403
from fastrnn.per_sample import per_sample_gradients, per_sample_norms
from fastrnn.recurrent import Recurrent, RecurrentCell, cell
from fastrnn.regularized import Regularized
from fastrnn.skip import Dilated, Skip
from fastrnn.stack import Stack
from fastrnn.state_space import DiagonalSSM
from fastrnn.stream import Stream
from fastrnn.truncated import truncated

__version__ = "0.1.0"

__all__ = ["LMU", "DiagonalSSM", "Dilated", "LegendreMemory", "Recurrent", "RecurrentCell", "Regularized", "Skip"]
__all__ += ["LearnedState", "Stack", "Stream", "per_sample_gradients", "per_sample_norms"]
__all__ += ["cell", "cells", "convert", "explain", "functional", "init", "ops", "reference", "revert", "truncated"]
__all__ += modules.__all__
__all__ += papers.__all__

# What others have to be told of our layers.
when_imported("torch._dynamo", dynamo.prepare)
when_imported("torch.utils.flop_counter", readers.register_flops)
_EXPORTER = "torch.onnx._internal.exporter"
when_imported(f"{_EXPORTER}._torchlib.ops", later("fastrnn.onnx_export", "register"))
when_imported(f"{_EXPORTER}._onnx_program", later("fastrnn.onnx_export", "fold_when_optimizing"))
when_imported("opacus.validators", later("fastrnn.private_training", "register"))
when_imported("opacus.grad_sample.grad_sample_module", later("fastrnn.private_training", "prepare"))

# What few programs need is imported when it is first asked for.
if TYPE_CHECKING:
    from fastrnn.keras_layers import from_keras, to_keras
    from fastrnn.onnx_import import from_onnx
_LATER = {"from_keras": "keras_layers", "to_keras": "keras_layers", "from_onnx": "onnx_import"}
__all__ += ["from_keras", "from_onnx", "to_keras"]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fastrnn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastrnn.{_LATER[name]}"), name)
