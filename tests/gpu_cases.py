"""The layers that the kernels of a GPU are tested with, what they have to compute, and how far off they may be.

What is expected is what the CPU's kernels compute in float64, on numbers that every type represents exactly: one
expectation serves all of them, and the error of a kernel is its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from cases import ROWS, VARIANTS, LayerCase, make_case
from torch import Tensor

from benchmarks.measure import products_of
from fastrnn import ops, reference
from fastrnn.reference import Weights

DEVICE = "cuda"
TYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,  # with products rounded to TensorFloat-32
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LEVELS = ("stepwise", "gemm", "persistent")  # of FASTRNN_CUDA_LEVEL

STEPS = (1, 2, 7, 50)
BATCHES = (1, 3, 8, 17, 64, 130)
UNITS = (1, 3, 10, 33, 100, 256, 257, 512, 768, 1000, 1024)
MOST_FLOPS = 2e10  # of a case in float64 on the CPU: a tenth of a second on a dozen cores

# Of a tensor's scale, see `error`. float64 and float32 sum up to 6500 products, each sum exact to some units in the
# last place (1e-16, 6e-8), over up to 50 steps. A wrong equation, index or step is off by 1e-2 or more.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
# The others round in every step what a product reads, as torch.nn does. We may be off by three times the error of
# others in the same type, as the largest of many errors varies, and by some roundings where theirs happens to be small.
TIMES_OTHERS = 3
ROUNDINGS = 3
MOST = 0.1  # however far off others are
ROUNDING = {"tf32": 2**-10} | {name: torch.finfo(TYPES[name]).eps for name in ("bfloat16", "float16")}


@dataclass(frozen=True)
class Spec:
    """One layer and its input; `rows` is a key of `cases.ROWS`."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    P: int | None = None
    D: int = 1
    rows: str = "plain"

    def __str__(self) -> str:
        projection = f"-P{self.P}" if self.P else ""
        return f"{self.cell}-T{self.T}-B{self.B}-I{self.I}-H{self.H}{projection}-D{self.D}-{self.rows}"

    @property
    def flops(self) -> int:
        """Of a forward and a backward pass."""
        gates = len(reference.CELLS[self.cell].gates)
        return 6 * self.T * self.B * self.D * gates * self.H * (self.I + self.H)

    @property
    def in_torch(self) -> bool:
        """Whether a fused layer of torch.nn computes this."""
        return self.cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") and self.rows == "plain"

    def may_be(self, level: str, name: str) -> bool:
        """Whether there is a kernel of a level and type; whether persistent weights fit is for the device to say."""
        if level == "gemm":
            return self.H % 8 == 0 and (self.P or 0) % 8 == 0
        return level == "stepwise" or self.may_be_persistent(name)

    def may_be_persistent(self, name: str) -> bool:
        """Whether there is a persistent kernel of a type; whether the weights fit on the chip is for the device to
        say."""
        return self.cell != "gru_reset_before" and self.P is None and name != "float64" and self.T > 1


def sampled_specs() -> list[Spec]:
    """For each cell every number of units, and every kind of rows in one and in two directions; the other sizes are
    drawn, the same ones each time."""
    draw = random.Random(0)
    specs = []
    for cell, projected in VARIANTS:
        kinds = [(H, draw.choice(list(ROWS)), draw.choice((1, 2))) for H in UNITS]
        kinds += [(draw.choice(UNITS), rows, D) for rows in ROWS for D in (1, 2)]
        for H, rows, D in kinds:
            P = (H // 16 * 8 if H % 8 == 0 else max(1, H // 3)) if projected and H > 1 else None
            sizes = [(T, B, I) for T in STEPS for B in BATCHES for I in (H, max(1, H // 2 + 1))]
            specs.append(draw.choice([s for s in (Spec(cell, *size, H, P, D, rows) for size in sizes) if fits(s)]))
    return list(dict.fromkeys(specs))


def fits(spec: Spec) -> bool:
    return spec.flops <= MOST_FLOPS


def exact(tensor: Tensor) -> Tensor:
    """The numbers rounded so that every type holds them."""
    return tensor.bfloat16().half().double()


@lru_cache(maxsize=4)
def make(spec: Spec) -> LayerCase:
    """The layer in float64 on the CPU."""
    sizes = (spec.T, spec.B, spec.I, spec.H, spec.P)
    case = make_case(spec.cell, *sizes, spec.D, **ROWS[spec.rows])
    if spec.cell == "rnn_relu":
        for d in range(spec.D):
            settle(case, *range(3 + 6 * d, 7 + 6 * d))
    case.tensors = [tensor if tensor is None else exact(tensor) for tensor in case.tensors]
    return case


def settle(case: LayerCase, w_ih: int, w_hh: int, b_ih: int, b_hh: int) -> None:
    """Keeps every unit of a rectifier far from 0, half of them on and half off: rounding then switches none of them,
    whose gradient would be another."""
    for place in (w_ih, w_hh, b_ih):
        case.tensors[place] = case.tensors[place] / 4
    signs = 1 - 2 * (torch.arange(len(case.tensors[b_hh])) % 2)
    case.tensors[b_hh] = 4.0 * signs


def moved(case: LayerCase, dtype: torch.dtype, device: str | None = None) -> LayerCase:
    """The same numbers as tensors that ask for gradients."""
    device = device or DEVICE
    case = case.to(dtype)
    tensors = [t if t is None else t.to(device).requires_grad_() for t in case.tensors]
    rows = (None if t is None else t.to(device) for t in (case.lengths, case.resets, case.masks))
    return LayerCase(case.cell, case.directions, tensors, *rows)


def outputs_and_grads(case: LayerCase, layer: Callable) -> dict[str, Tensor]:
    """Every output and the gradient of every input, by name, for a fixed random upstream gradient."""
    outputs = case.run(layer)
    generator = torch.Generator().manual_seed(1)
    upstream = [exact(torch.rand(o.shape, generator=generator) - 0.5).to(o) for o in outputs]
    inputs = dict(named_inputs(case))
    grads = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    named = dict(zip(("y", "h_n", "c_n"), (output.detach() for output in outputs), strict=False))
    return named | {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def named_inputs(case: LayerCase) -> Iterator[tuple[str, Tensor]]:
    names = ["x", "h0", "c0", *(f"{name} {d}" for d in range(case.directions) for name in Weights._fields)]
    return ((name, tensor) for name, tensor in zip(names, case.tensors, strict=True) if tensor is not None)


def on_device(spec: Spec, name: str, layer: Callable = ops.layer) -> dict[str, Tensor]:
    """Every output and gradient of the device in a type."""
    with products_of(name):
        return outputs_and_grads(moved(make(spec), TYPES[name]), layer)


@lru_cache(maxsize=4)
def expected(spec: Spec) -> dict[str, Tensor]:
    return outputs_and_grads(moved(make(spec), torch.float64, "cpu"), ops.layer)


def torch_layer(cell, x, h0, c0, weights, lengths, resets, masks=None):
    """The fused layer of torch.nn, called as `fastrnn.ops.layer`."""
    flat = [tensor for direction in weights for tensor in direction if tensor is not None]
    states = h0 if c0 is None else (h0, c0)
    options = (True, 1, 0.0, True, len(weights) == 2, False)  # biases, layers, dropout, training, both ways, layout
    y, *last = getattr(torch._VF, cell)(x, states, flat, *options)
    return y, *last, *([] if c0 is not None else [None])


def errors_of_others(spec: Spec, name: str) -> dict[str, float]:
    """How far off torch.nn is on the same device in the same type; where it has no such layer, the equations of
    `fastrnn.reference`, every operation of which rounds to the type."""
    found = on_device(spec, name, torch_layer if spec.in_torch else reference.layer)
    return {tensor: error(spec, tensor, found[tensor], truth) for tensor, truth in expected(spec).items()}


def error(spec: Spec, tensor: str, found: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the tensor's scale: its largest value, or for the gradients of weights, which
    are sums over all rows and may cancel, what such a sum of unrelated terms is."""
    if found.shape != truth.shape or not found.isfinite().all():
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    truth = truth.to(found.device)
    scale = truth.abs().max().item()
    if tensor.split()[-1].isdigit():  # of the weights of a direction
        scale = max(scale, 0.1 * (spec.T * spec.B) ** 0.5)
    return (found.double() - truth).abs().max().item() / max(scale, 1e-30)


def check(spec: Spec, name: str, found: dict[str, Tensor]) -> None:
    """Fails where a tensor is further off than it may be in a type."""
    others = {} if name in TOLERANCE else errors_of_others(spec, name)
    for tensor, truth in expected(spec).items():
        off = error(spec, tensor, found[tensor], truth)
        allowed = TOLERANCE.get(name) or min(TIMES_OTHERS * others[tensor] + ROUNDINGS * ROUNDING[name], MOST)
        assert off <= allowed, f"{tensor}: off by {off:.2e} of its scale, allowed {allowed:.2e} (others: {others})"
