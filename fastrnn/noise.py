"""Random masks, from torch's default generator or a given one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def keeps(like: Tensor, shape: Sequence[int], p: float, generator: torch.Generator | None) -> Tensor:
    """0 with probability p, else 1 / (1 - p)."""
    return chance(like, shape, 1 - p, generator).div_(1 - p)


def chance(like: Tensor, shape: Sequence[int], p: float, generator: torch.Generator | None) -> Tensor:
    """1 with probability p, to the next 2^-16, else 0: of 16 random bits each, which takes less time than
    `Tensor.bernoulli_`."""
    count, levels = math.prod(shape), round(p * 2**16)
    if levels == 0:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 4),), generator=generator, device=like.device)
    if _is_of_vmap(words):  # which has no view as another dtype before torch 2.13
        bits = torch.cat([(words >> place).to(torch.int16) for place in (0, 16, 32, 48)])
    else:
        bits = words.view(torch.int16)
    bits = bits[:count].view(shape)
    if levels == 2**16:
        return torch.ones_like(bits, dtype=like.dtype)
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return (bits < levels - 2**15).to(like.dtype)
    return torch.lt(bits, levels - 2**15, out=torch.empty_like(bits, dtype=like.dtype))  # no bools in between


def _is_of_vmap(tensor: Tensor) -> bool:
    """Whether a tensor has a dimension of members, also one that another transform has wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
