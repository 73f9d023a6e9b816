"""Files for ONNX: our layers as their nodes, how they are exported, and what ONNX Runtime computes of them."""

import io
import warnings

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

T, B, I, H = 5, 4, 3, 6

# Name, options, and the attributes of the node besides hidden_size.
NODES = [
    ("RNN", {}, {"direction": b"forward", "activations": [b"Tanh"]}),
    ("RNN", {"nonlinearity": "relu", "bias": False}, {"direction": b"forward", "activations": [b"Relu"]}),
    (
        "RNN",
        {"nonlinearity": "sigmoid", "bidirectional": True},
        {"direction": b"bidirectional", "activations": [b"Sigmoid", b"Sigmoid"]},
    ),
    ("LSTM", {"bias": False}, {"direction": b"forward"}),
    ("LSTM", {"bidirectional": True}, {"direction": b"bidirectional"}),
    ("LSTM", {"peephole": True, "bidirectional": True}, {"direction": b"bidirectional"}),
    ("GRU", {}, {"direction": b"forward", "linear_before_reset": 1}),
    ("GRU", {"bidirectional": True}, {"direction": b"bidirectional", "linear_before_reset": 1}),
    ("GRU", {"reset_after": False, "bidirectional": True}, {"direction": b"bidirectional", "linear_before_reset": 0}),
]
each_node = pytest.mark.parametrize(
    ("name", "options", "attributes"), NODES, ids=["-".join([name, *options]) for name, options, _ in NODES]
)


def export(model, args=(), kwargs=None, **options):
    """Of a module, in evaluation mode, or of an exported program."""
    model = model.eval() if isinstance(model, nn.Module) else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own future
        return torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False, **options)


def run(file, *args, **kwargs):
    """What ONNX Runtime computes, of a file's bytes or of what the exporter has returned."""
    file = file if isinstance(file, bytes) else file.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = [value.numpy() for value in tree_leaves((args, kwargs))]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, given, strict=True)))]


def assert_same(found, module, *args, rtol=1e-5, atol=1e-6, **kwargs):
    with torch.no_grad():
        expected = tree_leaves(module(*args, **kwargs))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def export_older(module, x) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (x,), file, dynamo=False, verbose=False)
    return file.getvalue()
