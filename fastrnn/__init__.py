"""fastrnn: recurrent layers that replace torch.nn's, on a native core of their own."""

import torch  # noqa: F401  (first: the extension links against its libraries)

from fastrnn import cells, dynamo, functional, init, modules, onnx_export, ops, papers, readers, reference
from fastrnn.convert import convert, register_with_opacus, revert
from fastrnn.explain import explain
from fastrnn.imports import when_imported
from fastrnn.keras_layers import from_keras, to_keras
from fastrnn.learned_state import LearnedState
from fastrnn.legendre import LMU, LegendreMemory
from fastrnn.modules import *  # noqa: F403  (the classes that users construct)
from fastrnn.onnx_import import from_onnx
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
__all__ += ["cell", "cells", "convert", "explain", "from_keras", "functional", "init", "ops", "reference", "revert"]
__all__ += ["from_onnx", "to_keras", "truncated"]
__all__ += modules.__all__
__all__ += papers.__all__

# What others have to be told of our layers.
when_imported("torch._dynamo", dynamo.prepare)
when_imported("torch.utils.flop_counter", readers.register_flops)
when_imported(f"{onnx_export.EXPORTER}._torchlib.ops", onnx_export.register)
when_imported(f"{onnx_export.EXPORTER}._onnx_program", onnx_export.fold_when_optimizing)
when_imported("opacus.validators", register_with_opacus)
