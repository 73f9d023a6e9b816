"""fastrnn: recurrent layers that replace torch.nn's, on a native core of their own."""

import torch  # noqa: F401  (the extension links against its libraries)

from fastrnn import functional, ops, reference
from fastrnn.convert import Conversion, convert, revert
from fastrnn.modules import GRU, RNN, GRUCell, LSTM, LSTMCell, RNNCell

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "convert",
    "functional",
    "ops",
    "reference",
    "revert",
]
