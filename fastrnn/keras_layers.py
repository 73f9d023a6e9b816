"""Keras' recurrent layers become fastrnn's, and the other way round; of weights, the same numbers."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrnn import keras_files, modules
from fastrnn.keras_files import RECURRENT, Found

logger = logging.getLogger("fastrnn")

_OURS = {"SimpleRNN": modules.RNN, "LSTM": modules.LSTM, "GRU": modules.GRU}
_THEIRS = {kind: name for name, ours in _OURS.items() for kind in (ours, getattr(torch.nn, ours.__name__))}
_ORDER = {"SimpleRNN": [0], "LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2]}  # z r h against r z n; each undoes itself
_ACTIVATIONS = {"SimpleRNN": ("tanh", "relu", "sigmoid"), "LSTM": ("tanh",), "GRU": ("tanh",)}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MIXED = "mixed_"  # of policies with weights in float32 that compute in 16 bits
_REGULARIZERS = [f"{what}_{how}" for how in ("regularizer", "constraint") for what in ("kernel", "recurrent", "bias")]
_OF_TRAINING = ("dropout", "recurrent_dropout", *_REGULARIZERS)


@dataclasses.dataclass(frozen=True)
class _Cell:
    """What all cells of a layer have in common."""

    kind: str
    units: int
    use_bias: bool
    activation: str
    dtype: str
    reset_after: bool = False

    @property
    def shapes(self) -> list[tuple[int | None, ...]]:
        """Of kernel, recurrent kernel and bias."""
        columns = self.units * len(_ORDER[self.kind])
        bias = (2, columns) if self.reset_after else (columns,)
        return [(None, columns), (self.units, columns), *([bias] if self.use_bias else [])]


def from_keras(source: Any, name: str | None = None) -> torch.nn.Module | dict[str, torch.nn.Module]:
    """Makes fastrnn's layer, with `batch_first=True`, of a recurrent layer of Keras 3: the same function, its weights
    copied.

    A layer of fastrnn always returns what Keras does with `return_sequences=True, return_state=True`: the output
    `[B, T, D*H]` and the state, `[L*D, B, H]` where Keras has `[B, H]` for each layer and direction, forward first. Of
    a Keras layer with `return_sequences=False` the output is the last state of each direction (`h_n`).

    A Keras `mask [B, T]` that is true up to the length of each row is `lengths=mask.sum(1)`: final states are equal,
    and outputs after a row's end are 0, as with `zero_output_for_mask=True` and in `Bidirectional`, where Keras
    otherwise repeats the last one.

    Where Keras has one bias and torch two, `bias_hh_l[k]` is 0. Options that matter in training alone (dropout,
    regularizers, constraints) and `stateful` are left out, which the logger "fastrnn" tells at WARNING.

    Args:
        source: a `keras.layers.SimpleRNN`, `LSTM`, `GRU`, a `Bidirectional` of one of them with `merge_mode="concat"`,
            an `RNN` of a `SimpleRNNCell`, `LSTMCell`, `GRUCell` or of a list of them, which becomes `num_layers`; a
            Keras model; or the path of a `.keras` file, which is read without Keras (needs h5py:
            `pip install "fastrnn[keras]"`).
        name: of a model or a file, the layer to take; layers of a model inside of it have its name before a slash.

    Returns:
        The layer, or a dict of layers by name if there are several and `name` is None.

    Raises:
        NotImplementedError: an option computes what fastrnn has not; the message names the layer and the option.
        ValueError: a layer is not built, there is none, none of that name, or the file is not one of Keras 3.
        TypeError: `source` or `name` is none of these.
        ImportError: a file is to be read, and there is no h5py.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: expected a str or None, got {type(name).__name__}")
    if isinstance(source, str | os.PathLike):
        with keras_files.opened(source) as found:
            return _chosen(found, name)
    kind = keras_files.class_of(source)
    if kind is None:
        raise TypeError(f"source: expected a layer or model of Keras, or a path, got {type(source).__name__}")
    if not hasattr(source, "layers") and kind not in RECURRENT:
        raise TypeError(f"source: expected one of {', '.join(RECURRENT)}, or a model, got {kind}")
    return _chosen(keras_files.layers_of(source), name)


def _chosen(found: list[Found], name: str | None) -> torch.nn.Module | dict[str, torch.nn.Module]:
    if not found:
        raise ValueError(f"source: expected a Sequential or functional model with a layer of {', '.join(RECURRENT)}")
    chosen = [layer for layer in found if name in (None, layer.name)]
    if not chosen:
        raise ValueError(f"name: expected one of {', '.join(layer.name for layer in found)}, got {name!r}")
    twice = [name for name, count in Counter(layer.name for layer in chosen).items() if count > 1]
    if twice:
        raise ValueError(f"source: expected layers with names of their own, got several that are called {twice[0]}")
    converted = {layer.name: _converted(layer) for layer in chosen}
    return converted if len(converted) > 1 else converted[chosen[0].name]


def _converted(layer: Found) -> torch.nn.Module:
    directions = _directions(layer)
    stacks = [_cells(direction) for direction in directions]
    if len(directions) == 2 and len(stacks[0]) > 1:
        raise _refusal(layer, "layer", "one cell in each direction", f"{len(stacks[0])} stacked cells")
    cell = _common(layer, [_described(layer, part) for stack in stacks for part in stack])
    weights = [[_weights(layer, part, cell) for part in stack] for stack in stacks]
    options: dict[str, Any] = {
        "num_layers": len(stacks[0]),
        "bias": cell.use_bias,
        "bidirectional": len(directions) == 2,
    }
    options |= {"nonlinearity": cell.activation} if cell.kind == "SimpleRNN" else {}
    options |= {"reset_after": cell.reset_after} if cell.kind == "GRU" else {}
    new: torch.nn.Module = _OURS[cell.kind](
        weights[0][0][0].shape[0], cell.units, batch_first=True, device="meta", **options
    )
    trainable = layer.config.get("trainable", True)
    for suffix, stack in zip(("", "_reverse"), weights, strict=False):
        for k, tensors in enumerate(stack):
            for name, tensor in _of_torch(cell.kind, *tensors).items():
                setattr(new, f"{name}_l{k}{suffix}", Parameter(tensor, trainable))
    _tell(layer, directions, stacks)
    return new


def _common(layer: Found, cells: list[_Cell]) -> _Cell:
    for field in (field.name for field in dataclasses.fields(_Cell)):
        expected, *others = (getattr(cell, field) for cell in cells)
        for other in others:
            if other != expected:
                raise _refusal(layer, field, f"{expected!r} in all cells and directions", other)
    return cells[0]


def _directions(layer: Found) -> list[Found]:
    """The layer itself, or the two of a `Bidirectional`."""
    directions = [layer]
    if layer.kind == "Bidirectional":
        if layer.config["merge_mode"] != "concat":
            raise _refusal(layer, "merge_mode", "'concat'", layer.config["merge_mode"])
        directions = [layer.part("layer", "forward_layer"), layer.part("backward_layer")]
    for direction, backwards in zip(directions, (False, True), strict=False):
        if direction.kind not in RECURRENT or direction.kind == "Bidirectional":
            raise _refusal(layer, "layer", "SimpleRNN, LSTM, GRU or RNN", direction.kind)
        if direction.config["go_backwards"] != backwards:
            raise _refusal(layer, "go_backwards", backwards, direction.config["go_backwards"])
    return directions


def _cells(layer: Found) -> list[Found]:
    """The cells of one direction, from the lowest."""
    if layer.kind in _OURS:
        return [dataclasses.replace(layer, path=(*layer.path, "cell"))]
    cell = layer.part("cell")
    cells = cell.parts("cells") if cell.kind == "StackedRNNCells" else [cell]
    for part in cells:
        kind = part.kind.removesuffix("Cell")
        if part.kind == kind or kind not in _OURS:
            raise _refusal(layer, "cell", "SimpleRNNCell, LSTMCell, GRUCell or a list of one of them", part.kind)
    return [dataclasses.replace(part, kind=part.kind.removesuffix("Cell")) for part in cells]


def _described(layer: Found, cell: Found) -> _Cell:
    config, kind = cell.config, cell.kind
    activation = _name_of(config["activation"])
    if activation not in _ACTIVATIONS[kind]:
        raise _refusal(layer, "activation", " or ".join(map(repr, _ACTIVATIONS[kind])), activation)
    gate = _name_of(config.get("recurrent_activation", "sigmoid"))
    if gate != "sigmoid":
        raise _refusal(layer, "recurrent_activation", "'sigmoid'", gate)
    dtype = _name_of(config["dtype"])
    if dtype.removeprefix(_MIXED) not in _DTYPES:
        raise _refusal(layer, "dtype", f"one of {', '.join(_DTYPES)}", dtype)
    return _Cell(kind, config["units"], config["use_bias"], activation, dtype, config.get("reset_after", False))


def _name_of(value: Any) -> str:
    """Of an activation or a dtype policy, which Keras stores by name, or as a class with its config."""
    if not isinstance(value, dict):
        return str(value)
    kind: str = value.get("class_name", "a lambda")
    config: Any = value.get("config")
    if kind == "DTypePolicy":
        return str(config["name"])
    return config if isinstance(config, str) else kind  # of a function, or of a layer


def _weights(layer: Found, part: Found, cell: _Cell) -> list[Tensor]:
    """Kernel, recurrent kernel and bias of one cell, as Keras has them."""
    found = part.variables()
    if not found:
        raise ValueError(
            f"{layer.name}: expected a layer that is built, got one without weights; call it, or its build"
        )
    dtype = torch.float32 if cell.dtype.startswith(_MIXED) else _DTYPES[cell.dtype]
    if len(found) != len(cell.shapes):
        raise ValueError(f"{layer.name}: expected {len(cell.shapes)} weights, got {len(found)}")
    for variable, shape in zip(found, cell.shapes, strict=True):
        if len(variable.shape) != len(shape) or any(
            e not in (None, s) for e, s in zip(shape, variable.shape, strict=True)
        ):
            raise ValueError(f"{layer.name}: expected a weight of shape {shape}, got {tuple(variable.shape)}")
    return [variable.read().to(dtype) for variable in found]


def _of_torch(kind: str, kernel: Tensor, recurrent: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """torch.nn's parameters of one direction, without their suffix, of Keras' weights."""
    found = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    if bias is not None:
        both = bias if bias.dim() == 2 else torch.stack([bias, torch.zeros_like(bias)])
        found |= {"bias_ih": both[0], "bias_hh": both[1]}
    return {name: _reordered(kind, tensor) for name, tensor in found.items()}


def _reordered(kind: str, tensor: Tensor) -> Tensor:
    """A copy with its blocks of rows in the other one's order."""
    order = _ORDER[kind]
    found: Tensor = tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)
    return found


def _refusal(layer: Found, option: str, expected: object, given: object) -> NotImplementedError:
    return NotImplementedError(f"{layer.name}: {option}: expected {expected}, got {given!r}")


def _tell(layer: Found, directions: list[Found], stacks: list[list[Found]]) -> None:
    cells = [cell for stack in stacks for cell in stack]
    left_out = {name: cell.config[name] for cell in cells for name in _OF_TRAINING if cell.config.get(name)}
    left_out |= {name: d.config[name] for d in directions for name in ("activity_regularizer",) if d.config.get(name)}
    for name, value in left_out.items():
        logger.warning("%s: %s=%s of training is left out; inference is the same", layer.name, name, value)
    if any(direction.config.get("stateful") for direction in directions):
        logger.warning("%s: stateful=True is left out: pass the state of the call before as hx", layer.name)
    dtype = _name_of(cells[0].config["dtype"])
    if dtype.startswith(_MIXED):
        logger.warning("%s: dtype=%r: its weights are float32; torch.autocast computes in 16 bits", layer.name, dtype)


def to_keras(module: torch.nn.Module) -> Any:
    """Makes a built layer of Keras, with `return_sequences=True, return_state=True`, of a recurrent layer of fastrnn or
    torch.nn: the same function of `[B, T, I]`, whatever `batch_first` is, its weights copied.

    One layer becomes a `keras.layers.SimpleRNN`, `LSTM` or `GRU`, in a `Bidirectional` if it is bidirectional; several
    layers of one direction become an `RNN` of a list of cells. Where Keras has one bias and torch two, it is their sum.
    Dropout between layers is left out, which the logger "fastrnn" tells at WARNING.

    Args:
        module: a `fastrnn.RNN`, `LSTM` or `GRU`, or torch.nn's.

    Raises:
        NotImplementedError: Keras has no such layer (several layers of two directions, `proj_size`, `peephole`, `leak`,
            `weights`); the message names the option.
        TypeError: `module` is no such module.
        ImportError: there is no Keras.
    """
    if type(module) not in _THEIRS:
        expected = "fastrnn.RNN, LSTM or GRU, or torch.nn's"
        raise TypeError(f"module: expected {expected}, got {type(module).__module__}.{type(module).__qualname__}")
    _check_for_keras(module)
    import keras

    rnn: Any = module
    if rnn.dropout and rnn.num_layers > 1:
        logger.warning("dropout=%s of training is left out; inference is the same", rnn.dropout)
    layer, cells = _new_of_keras(keras.layers, rnn)
    layer.build((None, None, rnn.input_size))
    for cell, names in zip(cells(layer), rnn._all_weights, strict=True):
        _fill(cell, rnn, names[0].removeprefix("weight_ih"))
    layer.trainable = any(parameter.requires_grad for parameter in module.parameters())
    return layer


def _check_for_keras(module: Any) -> None:
    several = module.num_layers > 1 and module.bidirectional
    lacking = {  # what it should be, and what it is
        "num_layers": (1, module.num_layers if several else 1, "bidirectional layer of several layers"),
        "proj_size": (0, module.proj_size, "projection"),
        "peephole": (False, getattr(module, "peephole", False), "peepholes"),
        "cell_clip": (None, getattr(module, "cell_clip", None), "bounds of the cell state"),
        "leak": (None, getattr(module, "leak", None), "leak"),
        "weights": (None, getattr(module, "weights", None), "rounded weights"),
    }
    for name, (expected, given, what) in lacking.items():
        if given != expected:
            raise NotImplementedError(f"{name}: expected {expected!r}, got {given!r}: Keras has no {what}")
    if str(module.weight_ih_l0.dtype).removeprefix("torch.") not in _DTYPES:
        raise NotImplementedError(f"dtype: expected one of {', '.join(_DTYPES)}, got {module.weight_ih_l0.dtype}")


def _new_of_keras(layers: Any, module: Any) -> tuple[Any, Callable[[Any], list[Any]]]:
    """A layer that is not built yet, and where its cells are once it is."""
    kind = _THEIRS[type(module)]
    dtype = str(module.weight_ih_l0.dtype).removeprefix("torch.")
    returned = {"return_sequences": True, "return_state": True, "dtype": dtype}
    # The values it starts from are overwritten, and Keras' usual ones cannot be computed in 16 bits.
    options: dict[str, Any] = {"use_bias": module.bias, "dtype": dtype, "recurrent_initializer": "zeros"}
    options |= {"activation": module.nonlinearity} if kind == "SimpleRNN" else {}
    options |= {"reset_after": getattr(module, "reset_after", True)} if kind == "GRU" else {}
    if module.num_layers > 1:
        cells = [getattr(layers, f"{kind}Cell")(module.hidden_size, **options) for _ in range(module.num_layers)]
        return layers.RNN(cells, **returned), lambda layer: layer.cell.cells
    layer = getattr(layers, kind)(module.hidden_size, **options | returned)
    if not module.bidirectional:
        return layer, lambda layer: [layer.cell]
    both = layers.Bidirectional(layer, merge_mode="concat", dtype=dtype)
    return both, lambda layer: [layer.forward_layer.cell, layer.backward_layer.cell]


def _fill(cell: Any, module: Any, suffix: str) -> None:
    kind = _THEIRS[type(module)]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
    # NumPy, which every backend of Keras takes, has no bfloat16; float32 has all of its numbers.
    tensors = [getattr(module, name + suffix).detach().cpu() for name in names]
    tensors = [_reordered(kind, t.float() if t.dtype == torch.bfloat16 else t) for t in tensors]
    cell.kernel.assign(tensors[0].T.numpy())
    cell.recurrent_kernel.assign(tensors[1].T.numpy())
    if module.bias:
        both = torch.stack(tensors[2:])
        cell.bias.assign((both if len(cell.bias.shape) == 2 else both.sum(0)).numpy())
