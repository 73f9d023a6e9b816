"""`PackedSequence`: checked, padded, and packed again.

A user can build one by hand, and the helpers of torch.nn.utils.rnn believe what it says: with a wrong size they write
past the end of their memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _C


def pad(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """`data [sum of batch_sizes, I]` as `[T, B, I]`, zero where a row is finished, and the lengths `[B]`, on the CPU.

    Raises:
        RuntimeError: sizes or indices contradict each other or the data.
        TypeError: a field is not a tensor, or has the wrong dtype.
    """
    _C.leave_openmp_after_fork()
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    T = _check_sizes(data, batch_sizes)
    _check_indices(data, int(batch_sizes[0]), sorted_indices, unsorted_indices)
    return torch._VF._pad_packed_sequence(data, batch_sizes[:T], False, 0.0, T)


def pack_as(packed: PackedSequence, padded: Tensor, lengths: Tensor) -> PackedSequence:
    """`padded [T, B, .]` packed like `packed`, which has been through `pad`."""
    data, _ = torch._VF._pack_padded_sequence(padded, lengths, False)
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def permute(state: Tensor, indices: Tensor) -> Tensor:
    """`state [., B, .]` with its rows in another order."""
    return state.index_select(1, indices)


def _check_sizes(data: Tensor, batch_sizes: Tensor) -> int:
    """The number of steps that have a row: as in torch.nn, sizes of 0 may follow."""
    _check_tensor("data", data, None)
    _check_tensor("batch_sizes", batch_sizes, torch.int64)
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    if batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        where = f"{batch_sizes.dim()} on {batch_sizes.device}"
        raise RuntimeError(f"batch_sizes: expected 1 dimension, on the CPU, got {where}")
    sizes: list[int] = batch_sizes.tolist()
    T = sum(size > 0 for size in sizes)
    if T == 0:
        raise RuntimeError("batch_sizes: expected a first step with rows, got none")
    for t, (now, later) in enumerate(zip(sizes, [*sizes[1:], 0], strict=True)):
        if later > now:
            raise RuntimeError(f"batch_sizes: expected sizes that never grow, none negative, got {sizes[t : t + 2]}")
    if sum(sizes) != len(data):
        raise RuntimeError(f"batch_sizes: expected a sum of {len(data)}, the rows of data, got {sum(sizes)}")
    return T


def _check_indices(data: Tensor, B: int, sorted_indices: Tensor | None, unsorted_indices: Tensor | None) -> None:
    """Their values are read on the CPU alone: elsewhere that would wait for the device."""
    both = {"sorted_indices": sorted_indices, "unsorted_indices": unsorted_indices}
    given = {name: indices for name, indices in both.items() if indices is not None}
    for name, indices in given.items():
        _check_tensor(name, indices, torch.int64)
        if indices.shape != (B,):
            raise RuntimeError(f"{name}: expected shape ({B},), as many as rows, got {tuple(indices.shape)}")
        if indices.device != data.device:
            raise RuntimeError(f"{name}: expected device {data.device} as data, got {indices.device}")
        if indices.is_cpu and sorted(indices.tolist()) != list(range(B)):
            raise RuntimeError(f"{name}: expected each of 0 to {B - 1} once, got {_shown(indices)}")
    if sorted_indices is None or unsorted_indices is None or not data.is_cpu:
        return
    if sorted_indices[unsorted_indices].tolist() != list(range(B)):
        expected = _shown(sorted_indices.argsort())
        raise RuntimeError(
            f"unsorted_indices: expected {expected}, as sorted_indices says, got {_shown(unsorted_indices)}"
        )


def _shown(indices: Tensor) -> str:
    return f"{indices[:8].tolist()}" + (", ..." if len(indices) > 8 else "")


def _check_tensor(name: str, value: object, dtype: torch.dtype | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        raise RuntimeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
