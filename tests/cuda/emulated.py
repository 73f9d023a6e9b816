"""A layer through the emulated CUDA kernels, and compared with the reference."""

import torch
from cases import VARIANTS

from fastrnn import ops, reference

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,  # with products of TF32
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KINDS = list(DTYPES)
PERSISTENT_KINDS = KINDS[1:]
# How many tile shapes with products of ours csrc/cuda/tile_shapes.h lists for a kind, forward and backward: stepwise
# ones, then persistent ones. The one for products of a matrix library follows.
TILES = {"float64": (2, 2), "float32": (5, 5), "tf32": (8, 8), "bfloat16": (14, 18), "float16": (14, 18)}
STEPWISE_TILES = 2
# Of the 16-bit kinds, in both lists, and in that of backward.
CLUSTER_TILES, SPLIT_TILES = (8, 9), (10, 11, 12, 13, 14, 17)
WGMMA_TILES = (10,)  # of forward, for cells with gates enough that 16 units have more than 32 rows
TURN_TILES = (12, 13), (15, 16, 17)  # groups of rows in turns, forward and backward
H200 = (90, 132, 227 << 10)  # compute capability, multiprocessors, shared memory of a block

# Of the tensor's largest value. float64, float32: sums of up to 300 products, some units in the last place of each.
# 16 bits: y, the gates and the gate gradients are rounded in each of a few steps, each time by half a unit in the last
# place (2^-9 of bfloat16, 2^-12 of float16), and gradients add such errors up. TF32 rounds operands as float16 does.
# A term left out costs 1e-1.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3}


def few_gates(cell):
    return 16 * len(reference.CELLS[cell].gates) <= 32


def tiles(cell, kind):
    """Pairs of tiles for forward and backward that leave none out of what the cell has kernels for."""
    count, backward = TILES[kind]
    forward = [i for i in range(count) if not (few_gates(cell) and i in WGMMA_TILES)]
    return [f"{forward[min(i, len(forward) - 1)]},{min(i, backward - 1)}" for i in range(max(len(forward), backward))]


def persistent_cells():
    return [variant for variant in VARIANTS if variant[0] != "gru_reset_before" and variant[1] is None]


def prepare(case, kind, **options):
    """The case with the numbers of its kind."""
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    return case.to(DTYPES[kind], **options)


def run(case, kind):
    """Every output and gradient of a case."""
    outputs, grads = prepare(case, kind, requires_grad=True).outputs_and_grads(ops.layer)
    return [*outputs, *grads]


def expect(case, kind):
    """The same from the reference in float64, of the numbers that the kind can hold."""
    outputs, grads = case.to(DTYPES[kind]).to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    return [*outputs, *grads]


def compare(case, kind):
    if case.tensors[0].shape[0] == 0:  # the reference has nothing to differentiate then
        found, expected = prepare(case, kind).run(ops.layer), prepare(case, kind).run(reference.layer)
        run(case, kind)
    else:
        found, expected = run(case, kind), expect(case, kind)
    # relu's gradient jumps where a rounding takes a value to the other side of 0.
    if (
        case.cell in ("rnn_relu", "indrnn")
        and kind not in ("float64", "float32")
        and not torch.equal(found[0] > 0, expected[0] > 0)
    ):
        found, expected = found[:2], expected[:2]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b).abs().max().item()
            assert error <= TOLERANCE[kind] * max(1.0, b.abs().max().item())
