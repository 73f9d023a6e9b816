"""fastrnn: recurrent layers that replace torch.nn's, on a native core of their own."""

import torch  # noqa: F401  (first: the extension links against its libraries)

from fastrnn import dynamo, functional, modules, ops, reference
from fastrnn.convert import convert, revert
from fastrnn.explain import explain
from fastrnn.modules import *  # noqa: F403  (the classes that users construct)
from fastrnn.stream import Stream

__version__ = "0.1.0"

__all__ = ["Stream", "convert", "explain", "functional", "ops", "reference", "revert"]
__all__ += modules.__all__

dynamo.prepare()
