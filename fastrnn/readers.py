"""Those who read a module instead of calling it: torch.fx, TorchScript, ONNX's older exporter, quantisation, counters
of FLOPs.

Each knows torch.nn's layers by name. Here is what they get to see of ours, or are told to do instead. (Dynamo, behind
`torch.compile`, and ONNX's other exporter have files of their own.)
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fastrnn import schema

# The classes of torch.nn that fastrnn has drop-ins for.
REPLACED: tuple[Any, ...] = tuple(
    getattr(torch.nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
)

# Where the `forward` of our modules with kernels stands.
LEAVES = tuple(f"fastrnn.{name}" for name in ("modules", "recurrent", "legendre", "state_space", "regularized"))


def read(module: Any, input: Any, hx: Any, **rows: Any) -> Any:
    """The result of a call that a reader makes, or None: the call is a real one.

    Raises:
        NotImplementedError: the call is one that has no result yet; the text says what to do instead.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    proxy = proxy_among(input, hx, **rows)
    if proxy is not None:
        return _leaf(module, proxy, input, hx, **rows)
    if isinstance(input, torch.Tensor) and input.is_nested:
        raise NotImplementedError(
            f"{type(module).__name__}: input: expected a dense tensor, got a nested one; pad it with "
            "torch.nested.to_padded_tensor(input, 0.0) and pass the rows' lengths=, or pack it"
        )
    if torch.jit.is_tracing() and is_for_onnx():
        return _call_of_torch_nn(module, input, hx, **rows)
    if isinstance(input, PackedSequence) and is_for_onnx():
        raise NotImplementedError(
            f"{type(module).__name__}: input: expected a tensor, got a PackedSequence, whose sizes are no part of a "
            "graph; pass the padded tensor and the rows' lengths="
        )
    return None


def proxy_among(input: Any, hx: Any, **rows: Any) -> Proxy | None:
    """An argument of a call that torch.fx traces."""
    states = hx if isinstance(hx, tuple | list) else (hx,)
    return next((value for value in (input, *states, *rows.values()) if isinstance(value, Proxy)), None)


def is_for_onnx() -> bool:
    """Whether one of ONNX's exporters makes this call."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _leaf(module: Any, proxy: Proxy, input: Any, hx: Any, **rows: Any) -> Any:
    """What `torch.fx` records of a module that it does not look into: one node. torch.nn's modules are such leaves by
    their name; ours say so themselves."""
    # A call of the module, which runs what stands around our own forward once more.
    repeated = "forward hooks" if module._forward_hooks or module._forward_pre_hooks else None
    kind: Any = type(module)
    if "forward" in vars(module) or kind.forward.__module__ not in LEAVES:
        repeated = "own forward"
    if repeated:
        raise NotImplementedError(
            f"{type(module).__name__}: torch.fx.symbolic_trace would run its {repeated} twice; make it a leaf with a "
            "Tracer of your own (Tracer.is_leaf_module)"
        )
    kwargs = {name: value for name, value in rows.items() if value is not None}
    args = (input,) if hx is None else (input, hx)
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def _call_of_torch_nn(module: Any, input: Any, hx: Any, **rows: Any) -> Any:
    """The same numbers by operations that ONNX's older exporter knows: those of the class that the module replaces.
    (What the other one gets is in fastrnn/onnx_export.py.)"""
    replaced: Any = next((kind for kind in type(module).__mro__ if kind in REPLACED), None)
    unknown = [name for name, value in rows.items() if value is not None]
    unknown += [module._beyond_torch()] if module._beyond_torch() else []
    if replaced is None or unknown:
        what = ", ".join(unknown) or "a cell of its own"
        raise NotImplementedError(
            f"{type(module).__name__}: {what}: expected what torch.nn's layers can do, since ONNX's older exporter "
            "gets theirs; the other one takes all of ours: torch.onnx.export(..., dynamo=True)"
        )
    return replaced.forward(module, input, hx)


def not_scriptable(module: torch.nn.Module, instead: str) -> str:
    name = type(module).__name__
    return f"fastrnn.{name}: torch.jit.script compiles Python code, and this has native kernels; {instead}"


def warn_of_quantization(name: str, value: object) -> None:
    """`torch.ao.quantization` marks every module of a model, then replaces those whose very class it knows."""
    warnings.warn(
        "torch.ao.quantization leaves fastrnn's layers in floating point: it knows torch.nn's classes alone. For half "
        "the weights' memory pass weights='bf16' to the layer, or call fastrnn.revert(model) before quantising",
        UserWarning,
        stacklevel=4,
    )


# ---- FLOPs


def _flops(T: int, B: int, *matrices: torch.Size | None) -> int:
    """Of the products of T steps of B rows with each matrix, a multiplication and an addition counted as two."""
    return 2 * T * B * sum(shape.numel() for shape in matrices if shape is not None)


def _matrices(inputs: schema.Inputs) -> list[tuple[Any, ...]]:
    """Of each direction w_ih, w_hh and w_hr, those that are not there None."""
    return [(w.w_ih, w.w_hh, w.w_hr) for w in schema.unflatten(inputs.cell, inputs.weights, inputs.directions)]


def _forward_flops(*args: Any, **kwargs: Any) -> int:
    """Of shapes in place of tensors, which is what counters pass."""
    inputs, _ = schema.split(args)
    return sum(_flops(*inputs.x[:2], *matrices) for matrices in _matrices(inputs))


def _backward_flops(dy: Any, dh_n: Any, dc_n: Any, *args: Any, **kwargs: Any) -> int:
    inputs, (_, _, _, wanted, *_) = schema.split(args)
    T, B, _ = inputs.x
    grads: list[Any] = [shape if want else None for shape, want in zip(inputs.weights, wanted[3:], strict=True)]
    total = sum(_flops(T, B, *matrices) for matrices in _matrices(inputs._replace(weights=grads)))
    for w_ih, w_hh, w_hr in _matrices(inputs):
        total += _flops(T, B, w_hr, w_ih if wanted[0] else None) + _flops(T if wanted[1] else T - 1, B, w_hh)
    return total


def register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula([torch.ops.fastrnn.layer_forward, torch.ops.fastrnn.packed_forward])(_forward_flops)
    register_flop_formula(torch.ops.fastrnn.layer_backward)(_backward_flops)
