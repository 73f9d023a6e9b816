"""What csrc/torch/module.cpp gives Python: no checks but those that are named."""

from collections.abc import Sequence
from typing import TypedDict, type_check_only

from torch import Tensor

from fastrnn.codegen import Sizes

@type_check_only
class _BuildInfo(TypedDict):
    cuda: bool
    openmp: bool
    isas: list[str]
    isa: str
    bfloat16_products: bool
    compiler: str

def build_info() -> _BuildInfo: ...
def cells() -> dict[str, Sizes]: ...
def add_cell(name: str, sizes: Sizes, /) -> None: ...
def has_kernels(cell: str, dtype: int, rounded: str | None, /) -> bool: ...
def variant(dtype: int, rounded: str | None, /) -> int: ...
def load_kernels(cell: str, dtype: int, rounded: str | None, path: str, /) -> None: ...

# These three are there where build_info()["cuda"] is true.
def cuda_variant(dtype: int, /) -> int: ...
def has_cuda_kernels(cell: str, variant: int, /) -> bool: ...
def load_cuda_kernels(cell: str, variant: int, path: str, /) -> None: ...
def peak_flops(dtype: str, threads: int) -> float: ...
def packed_size(
    cell: str, dtype: int, rounded: str | None, T: int, B: int, I: int, H: int, P: int, D: int, projected: bool, /
) -> int: ...
def leave_openmp_after_fork() -> None: ...
def eager_forward(
    cell: str,
    rounded: str | None,
    recompute: bool,
    kept: dict[int, Tensor],
    layers: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | tuple[Tensor, ...] | None,
    weights: tuple[Tensor, ...],
    directions: int,
    dropout: float,
    lengths: Tensor | None,
    resets: Tensor | None,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...

class StreamLayer:
    def __init__(
        self,
        cell: str,
        dtype: int,
        rounded: str | None,
        B: int,
        I: int,
        H: int,
        P: int,
        threads: int,
        weights: Sequence[int],
        h: int,
        c: int,
        y: int,
        /,
    ) -> None: ...

class Stream:
    def __init__(self, layers: Sequence[StreamLayer], /) -> None: ...
    def step(self, x: int, /) -> None: ...
    @property
    def bytes(self) -> int: ...
