"""Layers of Keras by their configs and weights, be they in memory or in a `.keras` file, without importing Keras."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

RECURRENT = ("SimpleRNN", "LSTM", "GRU", "Bidirectional", "RNN")
_WEIGHTS = "model.weights.h5"


@dataclasses.dataclass(frozen=True)
class Variable:
    """A weight: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Variables: TypeAlias = Callable[[tuple[str, ...]], list[Variable]]  # by path


@dataclasses.dataclass(frozen=True)
class Found:
    """A layer or cell.

    Attributes:
        name: what it is called in messages.
        kind: the name of its class; with its package, if that is not Keras.
        config: what Keras' `get_config` gives.
        path: of attributes, from the outermost layer to this one.
        at: the weights at a path; none if it is not built.
    """

    name: str
    kind: str
    config: dict[str, Any]
    path: tuple[str, ...]
    at: Variables

    def part(self, key: str, attribute: str | None = None) -> Found:
        """The layer or cell that the config has under `key`, and the layer as an attribute of that or another name."""
        entry = self.config[key]
        return Found(self.name, kind_of(entry), entry["config"], (*self.path, attribute or key), self.at)

    def parts(self, key: str) -> list[Found]:
        """Those of a list."""
        entries = self.config[key]
        names = unique_names(entry["class_name"] for entry in entries)
        return [
            Found(self.name, kind_of(entry), entry["config"], (*self.path, key, name), self.at)
            for entry, name in zip(entries, names, strict=True)
        ]

    def variables(self) -> list[Variable]:
        return self.at(self.path)


def kind_of(entry: dict[str, Any]) -> str:
    """Of a serialized object."""
    package = entry.get("module") or entry.get("registered_name") or "an unknown package"
    name: str = entry["class_name"]
    return name if package.split(".")[0] == "keras" else f"{package}.{name}"


def class_of(layer: object) -> str | None:
    """The name of the class of Keras that an object is an instance of, as `kind_of`; None if there is none."""
    kind = type(layer)
    if not any(base.__module__.startswith("keras.") and base.__name__ == "Layer" for base in kind.__mro__):
        return None
    return kind.__name__ if kind.__module__.split(".")[0] == "keras" else f"{kind.__module__}.{kind.__name__}"


def unique_names(classes: Iterable[str]) -> list[str]:
    """What Keras calls the members of a list, in files: lstm_cell, lstm_cell_1, and so on."""
    counts: Counter[str] = Counter()
    found = []
    for given in classes:
        words = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", given))
        name = re.sub("([a-z])([A-Z])", r"\1_\2", words).lower()
        found.append(f"{name}_{counts[name]}" if counts[name] else name)
        counts[name] += 1
    return found


def layers_of(source: Any) -> list[Found]:
    """The recurrent layers of a model, with those of models inside of it; or a layer itself."""
    inner = _layers_in(source)
    return list(_walk([source] if inner is None else inner, ""))


def _layers_in(model: Any) -> list[Any] | None:
    inner = getattr(model, "layers", None)
    return inner if isinstance(inner, list) else None


def _walk(layers: list[Any], prefix: str) -> Iterator[Found]:
    for layer in layers:
        inner, kind = _layers_in(layer), class_of(layer)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{layer.name}/")
        elif kind in RECURRENT:
            yield Found(prefix + layer.name, kind, layer.get_config(), (), _variables_of(layer))


def _variables_of(layer: Any) -> Variables:
    def at(path: tuple[str, ...]) -> list[Variable]:
        found = layer
        for name in path:
            if isinstance(found, list | tuple):
                found = dict(zip(unique_names(type(part).__name__ for part in found), found, strict=True))[name]
            else:
                found = getattr(found, name)
        if not found.built:
            return []
        _check_functions(found)
        weights = [found.kernel, found.recurrent_kernel, *([found.bias] if found.use_bias else [])]
        return [Variable(tuple(weight.shape), functools.partial(_tensor, weight)) for weight in weights]

    return at


def _check_functions(cell: Any) -> None:
    """A config tells a user's function by its name alone, even if it is that of one of Keras'."""
    for option in ("activation", "recurrent_activation"):
        function = getattr(cell, option, None)
        if isinstance(function, FunctionType) and function.__module__.split(".")[0] != "keras":
            where = f"{function.__module__}.{function.__qualname__}"
            raise NotImplementedError(f"{cell.name}: {option}: expected one of Keras', got {where}")


def _tensor(weight: Any) -> Tensor:
    """Of any backend of Keras; on the device it is on, if that is torch's."""
    if isinstance(weight.value, Tensor):
        value: Tensor = weight.value.detach()
        return value
    array = weight.numpy()
    return torch.from_numpy(array if array.dtype.kind == "f" else array.astype("float32"))


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[list[Found]]:
    """The recurrent layers of a `.keras` file, with those of models inside of its model."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError('fastrnn.from_keras needs h5py for files: pip install "fastrnn[keras]"') from error
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            config = json.loads(archive.read("config.json"))
            weights = stack.enter_context(h5py.File(stack.enter_context(archive.open(_WEIGHTS)), "r"))
        except (zipfile.BadZipFile, KeyError) as error:
            what = f"a .keras file of Keras 3, an archive of config.json and {_WEIGHTS}"
            raise ValueError(f"source: expected {what}, got {path}: {error}") from error
        yield list(_walk_file(config, weights, "layers", ""))


def _walk_file(model: dict[str, Any], weights: Any, where: str, prefix: str) -> Iterator[Found]:
    entries = model["config"].get("layers", [])
    for entry, name in zip(entries, unique_names(entry["class_name"] for entry in entries), strict=True):
        config, kind, group = entry["config"], kind_of(entry), f"{where}/{name}"
        if isinstance(config.get("layers"), list):
            yield from _walk_file(entry, weights, f"{group}/layers", f"{prefix}{config['name']}/")
        elif kind in RECURRENT:
            _check_name(weights, group, config["name"])
            yield Found(prefix + config["name"], kind, config, (), _variables_in(weights, group))


def _check_name(weights: Any, group: str, expected: str) -> None:
    """Keras finds weights by the order of layers; newer files have the names, too."""
    given = weights[f"{group}/vars"].attrs.get("name", expected) if f"{group}/vars" in weights else expected
    if given != expected:
        raise ValueError(f"source: expected the weights of {expected} in {group}, got those of {given}")


def _variables_in(weights: Any, group: str) -> Variables:
    def at(path: tuple[str, ...]) -> list[Variable]:
        found = weights.get("/".join((group, *path, "vars")), {})
        stored = [found[str(index)] for index in range(len(found))]
        return [Variable(data.shape, functools.partial(_stored_tensor, data)) for data in stored]

    return at


def _stored_tensor(data: Any) -> Tensor:
    if data.external or data.is_virtual:
        raise ValueError(f"source: expected weights that lie in the file, got {data.name}, which reads another one")
    if data.attrs.get("dtype") == "bfloat16":  # NumPy has none: two bytes each
        return torch.from_numpy(data[()].view("int16")).view(torch.bfloat16)
    return torch.from_numpy(data[()])
