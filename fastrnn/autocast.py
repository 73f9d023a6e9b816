"""torch.autocast, of any kind of device: some, like meta, have none."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def is_on(device: str) -> bool:
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


def off(device: str) -> contextlib.AbstractContextManager[Any]:
    """In which operations on this kind of device compute in the dtypes that they are given."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
