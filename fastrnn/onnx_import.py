"""RNN, LSTM and GRU nodes of ONNX files as our modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrnn import modules
from fastrnn.onnx_export import OPERATORS, Operator

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
# Of each operator the functions that it may have here, of one direction and in lower case; first its default.
ACTIVATIONS = {
    "RNN": (("tanh",), ("relu",), ("sigmoid",)),
    "LSTM": (("sigmoid", "tanh", "tanh"),),
    "GRU": (("sigmoid", "tanh"),),
}
_OWN: dict[str, set[str]] = {"RNN": set(), "LSTM": {"input_forget"}, "GRU": {"linear_before_reset"}}
_LACKING = {"clip", "activation_alpha", "activation_beta"}


def from_onnx(
    source: str | os.PathLike[str] | ModelProto | NodeProto,
    name: str | None = None,
    *,
    initializers: Mapping[str, TensorProto] | Iterable[TensorProto] = (),
) -> torch.nn.Module | list[torch.nn.Module]:
    """The recurrent layers of an ONNX model as `fastrnn.RNN`, `LSTM` and `GRU`, one layer each.

    `linear_before_reset`, peepholes, both directions, activations and `layout=1` become `reset_after`, `peephole`,
    `bidirectional`, `nonlinearity` and `batch_first`. The modules take and return what torch.nn's do: outputs
    `[T, B, D*H]` where the node's Y is `[T, D, B, H]`, and states `[D, B, H]` with `batch_first`, too. What the model
    computes for a node's `sequence_lens`, `initial_h` and `initial_c` is for the call to give: `lengths=` and `hx`.

    Args:
        source: a path, a model, or a single node.
        name: of a node of the model; if None, all RNN, LSTM and GRU nodes of its main graph, in order.
        initializers: of a single node, its weights.

    Returns:
        A module, or a list of them if `name` is None and the model has several such nodes.

    Raises:
        ValueError: there is no such node, weights are missing or have other shapes than ONNX wants, an attribute is
            unknown or wrong.
        NotImplementedError: the node does what our layers cannot: `direction="reverse"`, `clip`, `input_forget`,
            other activations, numbers for them, initial states or lengths that are constants, other dtypes than
            float32, float64, float16 and bfloat16. The text names the node and what it is.
        TypeError: `source` is of another type.
    """
    import onnx

    if isinstance(source, onnx.NodeProto):
        if name is not None and name != source.name:
            raise ValueError(f"name: expected that of the node, {source.name!r}, or None, got {name!r}")
        return _Node(source, _by_name(initializers), {}).module()
    if isinstance(source, str | os.PathLike):
        source = onnx.load(source)
    if not isinstance(source, onnx.ModelProto):
        raise TypeError(f"source: expected a path, a ModelProto or a NodeProto, got {type(source).__name__}")
    constants, producers = _constants(source.graph)
    layers = [_Node(node, constants, producers).module() for node in _recurrent(source.graph, name)]
    return layers if len(layers) > 1 else layers[0]


def _by_name(initializers: Mapping[str, TensorProto] | Iterable[TensorProto]) -> dict[str, TensorProto]:
    return dict(initializers) if isinstance(initializers, Mapping) else {each.name: each for each in initializers}


def _constants(graph: GraphProto) -> tuple[dict[str, TensorProto], dict[str, str]]:
    """The tensors that are known, and which operator makes each value."""
    constants = _by_name(graph.initializer)
    producers: dict[str, str] = {}
    for node in graph.node:
        producers |= dict.fromkeys(node.output, node.op_type)
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return constants, producers


def _recurrent(graph: GraphProto, name: str | None) -> list[NodeProto]:
    """The recurrent nodes of this name, or all of them."""
    nodes = [node for node in graph.node if node.op_type in ACTIVATIONS and node.domain in ("", "ai.onnx")]
    if not nodes:
        raise ValueError("source: expected a model with RNN, LSTM or GRU nodes in its main graph, got none")
    if name is None:
        return nodes
    named = [node for node in nodes if node.name == name]
    if len(named) != 1:
        names = ", ".join(repr(node.name) for node in nodes)
        raise ValueError(f"name: expected that of one recurrent node, among {names}, got {name!r}")
    return named


class _Node:
    """A node, with what it says looked up and checked as it is asked for."""

    def __init__(self, node: NodeProto, constants: Mapping[str, TensorProto], producers: Mapping[str, str]) -> None:
        import onnx

        if node.op_type not in ACTIVATIONS:
            raise ValueError(f"source: expected an RNN, LSTM or GRU node, got {node.op_type}")
        self.kind, self.label = node.op_type, f"{node.op_type} {node.name!r}"
        self.constants, self.producers = constants, producers
        self.attributes = {each.name: _plain(onnx.helper.get_attribute_value(each)) for each in node.attribute}
        self.inputs = {name: given for name, given in zip(INPUTS, node.input, strict=False) if given}

    def module(self) -> torch.nn.Module:
        self._check_names()
        directions = self._directions()
        cell, options = self._cell(directions)
        options |= {"bidirectional": directions == 2, "batch_first": self._flag("layout", 0)}
        self._check_given_by_call()
        weights = self._weights(len(OPERATORS[cell].gates), directions)
        sizes = weights["W"].shape[2], weights["R"].shape[2]
        options |= {"bias": "B" in weights, "dtype": weights["W"].dtype, "device": "meta"}
        made: torch.nn.Module = getattr(modules, self.kind)(*sizes, **options)
        made.load_state_dict(_state_dict(OPERATORS[cell], weights), assign=True)
        return made

    def _error(self, what: str, expected: str, given: object, kind: type[Exception] = ValueError) -> Exception:
        return kind(f"{self.label}: {what}: expected {expected}, got {given}")

    # ---- attributes

    def _check_names(self) -> None:
        known = {"hidden_size", "direction", "activations", "layout"} | _OWN[self.kind]
        for name, value in self.attributes.items():
            if name in _LACKING and value != []:
                raise self._error(name, "none, since our layers have no such numbers", value, NotImplementedError)
            if name not in known | _LACKING:
                raise self._error(name, f"an attribute among {', '.join(sorted(known))}", f"{name}={value!r}")

    def _directions(self) -> int:
        direction = self.attributes.get("direction", "forward")
        if direction not in ("forward", "bidirectional"):
            kind = NotImplementedError if direction == "reverse" else ValueError
            raise self._error("direction", "'forward' or 'bidirectional'", repr(direction), kind)
        return 2 if direction == "bidirectional" else 1

    def _flag(self, name: str, default: int) -> bool:
        value = self.attributes.get(name, default)
        if value not in (0, 1):
            raise self._error(name, "0 or 1", repr(value))
        return bool(value)

    def _cell(self, directions: int) -> tuple[str, dict[str, Any]]:
        """The cell's name, and the module's option that chooses it."""
        functions = self._activations(directions)
        if self.kind == "RNN":
            return f"rnn_{functions[0]}", {"nonlinearity": functions[0]}
        if self.kind == "GRU":
            reset_after = self._flag("linear_before_reset", 0)
            return "gru" if reset_after else "gru_reset_before", {"reset_after": reset_after}
        if self._flag("input_forget", 0):
            raise self._error("input_forget", "0", 1, NotImplementedError)
        peephole = "P" in self.inputs
        return "lstm_peephole" if peephole else "lstm", {"peephole": peephole}

    def _activations(self, directions: int) -> tuple[str, ...]:
        """Of one direction, in lower case."""
        choices = ACTIVATIONS[self.kind]
        given = self.attributes.get("activations", [])
        functions = tuple(name.lower() for name in given) or choices[0] * directions
        count = len(choices[0])
        if len(functions) != count * directions:
            raise self._error("activations", f"{count} for each direction", given)
        if functions[:count] not in choices or functions[:count] * directions != functions:
            expected = f"{' or '.join(', '.join(choice) for choice in choices)}, the same in both directions"
            raise self._error("activations", expected, given, NotImplementedError)
        return functions[:count]

    # ---- inputs

    def _check_given_by_call(self) -> None:
        """That no lengths or states are fixed in the model, since a module has a place for them in its calls alone."""
        for name, argument in (("sequence_lens", "lengths="), ("initial_h", "hx"), ("initial_c", "hx")):
            fixed = self.constants.get(self.inputs.get(name, ""))
            if fixed is not None and (name == "sequence_lens" or self._tensor(name).any()):
                expected = f"a value that each call gives as {argument}"
                raise self._error(name, expected, "a constant", NotImplementedError)

    def _weights(self, gates: int, directions: int) -> dict[str, Tensor]:
        names = [name for name in ("W", "R", "B", "P") if name in ("W", "R") or name in self.inputs]
        found: dict[str, Tensor] = {name: self._tensor(name) for name in names}
        if found["R"].dim() != 3 or found["W"].dim() != 3:
            name = "W" if found["W"].dim() != 3 else "R"
            raise self._error(name, "3 dimensions", f"shape {tuple(found[name].shape)}")
        I, H = found["W"].shape[2], self.attributes.get("hidden_size", found["R"].shape[2])
        shapes = {"W": (gates * H, I), "R": (gates * H, H), "B": (2 * gates * H,), "P": (3 * H,)}
        for name, tensor in found.items():
            expected = directions, *shapes[name]
            if tuple(tensor.shape) != expected:
                raise self._error(name, f"shape {expected}, as hidden_size is {H}", tuple(tensor.shape))
            if tensor.dtype != found["W"].dtype:
                raise self._error(name, f"dtype {found['W'].dtype} as W", tensor.dtype)
        return found

    def _tensor(self, name: str) -> Tensor:
        given = self.inputs.get(name)
        if given is None or given not in self.constants:
            producer = self.producers.get(given or "")
            what = "none" if given is None else f"the output {given!r} of {producer}" if producer else repr(given)
            raise self._error(name, "an initializer or the output of a Constant", what)
        return self._as_tensor(name, self.constants[given])

    def _as_tensor(self, name: str, proto: TensorProto) -> Tensor:
        import onnx

        dtypes: dict[int, torch.dtype] = {
            onnx.TensorProto.FLOAT: torch.float32,
            onnx.TensorProto.DOUBLE: torch.float64,
            onnx.TensorProto.FLOAT16: torch.float16,
            onnx.TensorProto.BFLOAT16: torch.bfloat16,
        }
        dtype = dtypes.get(proto.data_type)
        if dtype is None:
            given = onnx.TensorProto.DataType.Name(proto.data_type)
            raise self._error(name, "FLOAT, DOUBLE, FLOAT16 or BFLOAT16", given, NotImplementedError)
        values = onnx.numpy_helper.to_array(proto)
        if dtype == torch.bfloat16:  # which is none of numpy's types; float32 has all of its numbers
            values = values.astype("float32")
        return torch.tensor(values).to(dtype)


def _plain(value: Any) -> Any:
    """An attribute's value, with its texts as such."""
    if isinstance(value, bytes):
        return value.decode()
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _state_dict(operator: Operator, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's parameters: ONNX's blocks in our order."""
    found = {}
    for d, suffix in enumerate(("_l0", "_l0_reverse")[: len(weights["W"])]):
        of = {name: tensor[d] for name, tensor in weights.items()}
        found[f"weight_ih{suffix}"] = _in_our_order(of["W"], operator.gates)
        found[f"weight_hh{suffix}"] = _in_our_order(of["R"], operator.gates)
        if "B" in of:
            b_ih, b_hh = (_in_our_order(bias, operator.gates) for bias in of["B"].chunk(2))
            found |= {f"bias_ih{suffix}": b_ih, f"bias_hh{suffix}": b_hh}
        if "P" in of:
            found[f"peephole{suffix}"] = _in_our_order(of["P"], operator.peepholes).unflatten(0, (3, -1))
    return found


def _in_our_order(blocks: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undoes what the export does: `order[k]` is the place with us of ONNX's block k."""
    parts = blocks.chunk(len(order))
    return torch.cat([parts[order.index(place)] for place in range(len(order))])
