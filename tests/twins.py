"""A fastrnn module and torch.nn's with the same weights, and how the two are compared."""

from __future__ import annotations

import torch
from torch import Tensor

import fastrnn

LAYERS = {
    "RNN-tanh": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "LSTM-projected": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
}
CELLS = {
    "RNNCell-tanh": ("RNNCell", {}),
    "RNNCell-relu": ("RNNCell", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}

# Both sides add the same products, in another order, through other exponentials: a few hundred roundings of numbers of
# size 1, each 1e-16 (float64) or 6e-8 (float32). A wrong equation, step or index is off by 1e-3 or more.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


def make(namespace, case: str, *sizes: int, dtype=torch.float64, **options) -> torch.nn.Module:
    """The module of `case` from `fastrnn` or `torch.nn`."""
    name, fixed = (LAYERS | CELLS)[case]
    return getattr(namespace, name)(*sizes, **fixed, **options, dtype=dtype)


def twins(case: str, *sizes: int, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch.nn's, with equal parameters that are not shared."""
    ours, theirs = make(fastrnn, case, *sizes, **options), make(torch.nn, case, *sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def noise(*shape: int, dtype=torch.float64) -> Tensor:
    """A random tensor that asks for a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def initial_state(module: torch.nn.Module, *batch: int):
    """A random `hx` that asks for gradients; `batch` is B, or nothing if unbatched."""
    rows, P = batch, module.hidden_size
    if isinstance(module, torch.nn.RNNBase):
        rows = (module.num_layers * (2 if module.bidirectional else 1), *batch)
        P = module.proj_size or P
    h = noise(*rows, P)
    return (h, noise(*rows, module.hidden_size)) if isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell)) else h


def arguments(module: torch.nn.Module):
    """`(input, hx)` for a batch of two, four time steps if it is a layer."""
    steps = (4,) if isinstance(module, torch.nn.RNNBase) else ()
    return noise(*steps, 2, module.input_size), initial_state(module, 2)


def tensors(value) -> list[Tensor]:
    """Every tensor in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (tuple, list)) else []


def results(module: torch.nn.Module, *args, **kwargs) -> dict[str, Tensor]:
    """Every output, and the gradients of one fixed random sum of them, by name."""
    asked = {f"argument {i}": tensor for i, tensor in enumerate(tensors(args))} | dict(module.named_parameters())
    asked = {name: tensor for name, tensor in asked.items() if tensor.requires_grad}
    outputs = tensors(module(*args, **kwargs))
    found = {f"output {i}": tensor.detach() for i, tensor in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    floats = [t for t in outputs if t.is_floating_point()]
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)).sum() for t in floats)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(asked.values()), materialize_grads=True)
        found |= {f"gradient of {name}": grad for name, grad in zip(asked, grads, strict=True)}
    return found


def assert_same(actual, expected, dtype: torch.dtype = torch.float64) -> None:
    """Compares tensors, or nested containers of them, within `TOLERANCE`; shapes, dtypes and names must be equal."""
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
