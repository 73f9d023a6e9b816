"""A layer through the emulated CUDA kernels, and compared with the reference."""

import torch

from fastrnn import ops, reference

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,  # with products of TF32
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KINDS = list(DTYPES)
H200 = (90, 132, 227 << 10)  # compute capability, multiprocessors, shared memory of a block

# Of the tensor's largest value. float64, float32: sums of up to 300 products, some units in the last place of each.
# 16 bits: y, the gates and the gate gradients are rounded in each of a few steps, each time by half a unit in the last
# place (2^-9 of bfloat16, 2^-12 of float16), and gradients add such errors up. TF32 rounds operands as float16 does.
# A term left out costs 1e-1.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3}


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
