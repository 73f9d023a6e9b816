"""Truncated backpropagation through time: a long sequence chunk by chunk, in the memory of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only


class Chunk(NamedTuple):
    """What `truncated` yields: steps `start` to `stop` of the sequence."""

    output: Tensor
    state: Any  # after the last of these steps, in the form of the module's `hx`
    start: int
    stop: int


def truncated(
    module: nn.Module,
    input: Tensor | Iterable[Tensor],
    steps: int | None,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Iterator[Chunk]:
    """Walks a long sequence in chunks, for truncated backpropagation through time (Williams and Peng 1990):

        for output, state, start, stop in fastrnn.truncated(lstm, x, 100):
            loss = loss_of(output, targets[start:stop])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Each chunk starts from the values of the state after the one before, and no gradient goes back into that. Nothing of
    a chunk is kept but its state, so memory does not grow with T. A chunk is computed when it is asked for: with the
    parameters and in the mode of then.

    Args:
        module: a recurrent layer of fastrnn or torch.nn, or any other that is called as `module(input, hx)` and returns
            its output and its state, in one direction; also inside of DistributedDataParallel.
        input: as of the module; time is dimension 1 of three or more if `module.batch_first`, otherwise dimension 0.
            Or an iterable of such tensors, the chunks themselves, for what does not fit into memory.
        steps: of a chunk; the last one may have fewer. None for an iterable.
        hx: the state before the first step, in the form of the module's. The first chunk's gradients reach it.
        lengths, resets: of the whole sequence, as of `fastrnn.LSTM`, for modules that take them. A row that has ended
            keeps its last state. If `input` is an iterable, lengths end where it does, at the latest.

    Returns:
        An iterator of `Chunk`s `(output, state, start, stop)`, whose `output` and `state` have gradients.

    Raises:
        ValueError: the module has a bidirectional layer, whose reverse direction would begin at each chunk's end;
            `steps` is less than 1, or `lengths` or `resets` do not fit.
        TypeError: `input` is a `PackedSequence` or no tensors, `steps` no int, or an int for an iterable; `lengths` or
            `resets` is no tensor.
    """
    layer = module.module if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel) else module
    _check_directions(layer)
    for name, value in (("lengths", lengths), ("resets", resets)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    is_batch_first = getattr(layer, "batch_first", False)
    if isinstance(input, Tensor):
        size = _checked_steps(steps)
        _check_rows(lengths, resets, input.shape[_time(input, is_batch_first)], is_batch_first)
        chunks = _split(input, size, _time(input, is_batch_first))
    elif isinstance(input, PackedSequence):
        raise TypeError("input: expected a tensor or an iterable of them, got a PackedSequence; pad and pass lengths")
    elif steps is not None:
        raise TypeError(f"steps: expected None, since input is an iterable of chunks, got {steps!r}")
    else:
        chunks = iter(input)
    return _walk(module, chunks, hx, lengths, resets, is_batch_first)


def _walk(
    module: nn.Module,
    chunks: Iterable[Tensor],
    hx: Any,
    lengths: Tensor | None,
    resets: Tensor | None,
    is_batch_first: bool,
) -> Iterator[Chunk]:
    stop = 0
    for chunk in chunks:
        if not isinstance(chunk, Tensor) or isinstance(chunk, PackedSequence):
            raise TypeError(f"input: expected an iterable of tensors, got one of {type(chunk).__name__}")
        time = _time(chunk, is_batch_first)
        start, stop = stop, stop + chunk.shape[time]
        rows = {}
        if lengths is not None:
            rows["lengths"] = (lengths - start).clamp(0, stop - start)
        if resets is not None:
            rows["resets"] = resets.narrow(_time(resets, is_batch_first, 2), start, stop - start)
        found = Chunk._make((*module(chunk, hx, **rows), start, stop))
        hx = tree_map_only(Tensor, Tensor.detach, found.state)
        del chunk, rows
        yield found
        del found  # before the next chunk is computed


def _split(input: Tensor, steps: int, time: int) -> Iterator[Tensor]:
    T = input.shape[time]
    for start in range(0, max(T, 1), steps):  # no steps at all are the module's to accept or not
        yield input.narrow(time, start, min(steps, T - start))


def _time(tensor: Tensor, is_batch_first: bool, batched: int = 3) -> int:
    """The dimension of time of a tensor that has `batched` dimensions or more if it has rows."""
    return 1 if is_batch_first and tensor.dim() >= batched else 0


def _check_directions(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if getattr(part, "bidirectional", False):
            where = f"{name}, " if name else ""
            raise ValueError(
                f"module: expected layers of one direction, got {where}{type(part).__name__}(bidirectional=True), "
                "which reads the steps after a chunk before those in it"
            )


def _checked_steps(steps: object) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return steps


def _check_rows(lengths: Tensor | None, resets: Tensor | None, T: int, is_batch_first: bool) -> None:
    """What the calls of a chunk cannot see: whether these are of T steps."""
    if resets is not None and resets.shape[_time(resets, is_batch_first, 2)] != T:
        raise ValueError(f"resets: expected {T} steps, got shape {tuple(resets.shape)}")
    if lengths is not None and lengths.is_cpu:
        bad = lengths[(lengths < 0) | (lengths > T)]
        if bad.numel():
            raise ValueError(f"lengths: expected values in [0, {T}], got {bad[0].item()}")
