"""Layers through their equations, in torch's operations: where there are no kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastrnn import autocast, codegen, reference
from fastrnn.cells import CELLS, Function
from fastrnn.read import STEPS, How, Read, Tensors, replaced
from fastrnn.schema import SIZES, accumulator, is_projected, unflatten


def layer(how: How, read: Read) -> tuple[Tensor, ...]:
    """A layer in torch's operations, in the accumulator's type: y, h_n, c_n and the states of every step."""
    codegen.check_unchanged(CELLS[how.cell])
    dtype = read.x.dtype
    x = _cast(read.x, accumulator(dtype))
    h0, c0, masks = (_cast(t, accumulator(dtype)) for t in (read.h0, read.c0, read.masks))
    weights = unflatten(how.cell, [_cast(w, accumulator(dtype)) for w in read.weights], how.directions)
    with autocast.off(x.device.type):
        *outputs, states = reference.layer_with_states(how.cell, x, h0, c0, weights, read.lengths, read.resets, masks)
    return *(output.to(dtype) for output in outputs), states


@overload
def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


vjp: Callable[..., Any] = torch.func.vjp  # its own types do not know has_aux


def has_tangent_kernels(how: How, read: Read) -> bool:
    is_normalized = SIZES[how.cell]["is_normalized"]
    return read.x.is_cpu and not is_projected(read.inputs(how)) and not is_normalized


def tangents(how: How, read: Read, directions: Read) -> tuple[Tensor, ...]:
    """The tangents of `layer`'s outputs."""
    if directions.steps is not None:
        raise NotImplementedError(
            "derivatives of per-sample gradients: there are none here (GPUs, projections, layer normalization)"
        )
    places = [place for place, direction in enumerate(directions.flat()) if direction is not None]
    moving, along = ([part.flat()[place] for place in places] for part in (read, directions))
    return pushed(lambda *moving: layer(how, replaced(read, places, moving)), moving, along)


def pushed(function: Function, inputs: Tensors, directions: Tensors) -> tuple[Tensor, ...]:
    """J v: the tangents of a function's outputs in the directions v of its inputs. g J is linear in g, and its
    derivative along v is J v; torch.func.jvp does not nest in forward mode."""
    found, pull = vjp(function, *inputs)
    tangents: tuple[Tensor, ...] = vjp(lambda *g: pull(g), *map(torch.zeros_like, found))[1](tuple(directions))
    return tangents


def gradients(how: How, read: Read, grads: Tensors, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of `read.flat()`, those that are wanted, given those of `layer`'s outputs."""
    if wanted[STEPS]:
        raise NotImplementedError(
            "per-sample gradients: there are none here (GPUs) of what reads the states of every step"
        )
    places = [place for place, want in enumerate(wanted) if want]

    def function(*moving: Tensor) -> tuple[Tensor, ...]:
        return layer(how, replaced(read, places, moving))

    found, pull = vjp(function, *(read.flat()[place] for place in places))
    by_place = pull(tuple(torch.zeros_like(t) if g is None else g for t, g in zip(found, grads, strict=True)))
    return at(places, by_place, len(wanted))


def at(places: list[int], values: Tensors, count: int) -> tuple[Tensor | None, ...]:
    by_place = dict(zip(places, values, strict=True))
    return tuple(by_place.get(place) for place in range(count))
