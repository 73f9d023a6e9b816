"""Every instruction set that this machine has, each in a process of its own, against the others and the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BUILT_IN, VARIANT_IDS, VARIANTS, make_case, packing

import fastrnn
from fastrnn import ops, reference

ISAS = fastrnn._C.build_info()["isas"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZE = (5, 7, 40, 37)
SIZES = SIZE, (1, 11, 300, 37)  # of such a step the weights are read as they lie
FOLDERS = [str(Path(__file__).parents[i]) for i in (0, 1)]

SCRIPT = """
import sys
import torch
sys.path[:0] = {folders!r}
import test_isa
torch.save(test_isa.results(), {file!r})
"""


def results():
    """Per variant and dtype: outputs and gradients, and the instruction set that made them."""
    found = {"isa": fastrnn._C.build_info()["isa"]}
    for (cell, P), name in zip(VARIANTS, VARIANT_IDS, strict=True):
        for dtype in DTYPES:
            for size in SIZES:
                case = make_case(cell, *size, P=P, D=2, lengths=True, resets=True).to(dtype, requires_grad=True)
                outputs, grads = case.outputs_and_grads(ops.layer)
                found[name, dtype, size] = [t.detach() for t in (*outputs, *grads)]
        with torch.no_grad():
            case = make_case(cell, 1, *SIZE[1:], P=P, D=2, dtype=torch.float32)
            found[name, "int8"] = case.run(packing(ops.PackedLayers(), "int8"))
    found["has rounded products"] = fastrnn._C.build_info()["bfloat16_products"]
    torch.backends.mkldnn.rnn.fp32_precision = "bf16"
    for cell in ROUNDED_CELLS:
        for rows in ROUNDED_ROWS:
            outputs, grads = rounded_case(cell, rows, torch.float32).outputs_and_grads(ops.layer)
            found["rounded", cell, rows] = [t.detach() for t in (*outputs, *grads)]
    return found


# Their panels hold two gates, three and one. Tiles have up to 12 rows, or 32; each of two threads has half of the rows.
# Where tests/kernels/test_add_a_cell.py builds fewer cells, none of them is there.
ROUNDED_CELLS = [name for name in ("lstm", "gru", "rnn_tanh") if name in BUILT_IN]
ROUNDED_ROWS = [1, 2, 3, 16, 31, 32, 33, 50, 66, 130]


def rounded_case(cell, rows, dtype):
    """More than one block of products (256) and an odd rest of a group (32), forward and backward."""
    return make_case(cell, 5, rows, 301, 75, dtype=torch.float32).to(dtype, requires_grad=True)


class RoundedLinear(torch.autograd.Function):
    """x W^T + b with every operand of its three products rounded to bfloat16."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return torch.nn.functional.linear(rounded(x), rounded(w), b)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        g = rounded(grad)
        return g @ rounded(w), g.flatten(0, -2).T @ rounded(x).flatten(0, -2), g.flatten(0, -2).sum(0)


def rounded(tensor):
    return tensor.bfloat16().to(tensor.dtype)


def run_with(isa, code):
    environment = os.environ | {"FASTRNN_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def by_isa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isa")
    found = {}
    for isa in ISAS:
        file = str(folder / isa)
        process = run_with(isa, SCRIPT.format(folders=FOLDERS, file=file))
        assert process.returncode == 0, process.stderr
        found[isa] = torch.load(file)
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES, ids=["sequence", "step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_matches_reference(by_isa, isa, dtype, size, cell, P):
    """Within a few roundings of float64 (sums of 40 products; 16-bit outputs round once more)."""
    assert by_isa[isa]["isa"] == isa
    case = make_case(cell, *size, P=P, D=2, lengths=True, resets=True)
    rounded = case.to(dtype).to(torch.float64, requires_grad=True)
    outputs, grads = rounded.outputs_and_grads(reference.layer)
    name = VARIANT_IDS[VARIANTS.index((cell, P))]
    for found, exact in zip(by_isa[isa][name, dtype, size], (*outputs, *grads), strict=True):
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_int8_products_are_the_same(by_isa, isa, cell, P):
    """Sums of integers: the same bits, but on base, whose activations round otherwise for want of fused multiply-adds.
    (There a second product, or a projection, may round one of its operands the other way.)"""
    name = VARIANT_IDS[VARIANTS.index((cell, P))]
    for found, widest in zip(by_isa[isa][name, "int8"], by_isa[ISAS[-1]][name, "int8"], strict=True):
        if isa == "base":
            assert ((found - widest).abs() < 1e-6).double().mean() > 0.95
            assert (found - widest).abs().max() < 2e-2
        else:
            assert torch.equal(found, widest)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cell", ROUNDED_CELLS)
def test_products_of_rounded_numbers(by_isa, monkeypatch, isa, cell):
    """Against the reference with rounded operands, in float64. What is left are sums in float32, and operands that
    these let round the other way: an ulp of bfloat16 of one of 75 or more. Where there are no such products, against
    the exact reference: the same tiles in float32, sums of up to 375 products."""
    has_products = by_isa[isa]["has rounded products"]
    if has_products:
        monkeypatch.setattr(reference, "linear", RoundedLinear.apply)
    for rows in ROUNDED_ROWS:
        outputs, grads = rounded_case(cell, rows, torch.float64).outputs_and_grads(reference.layer)
        for found, exact in zip(by_isa[isa]["rounded", cell, rows], (*outputs, *grads), strict=True):
            error = (found - exact).abs().max() / exact.abs().max()
            assert error < (4e-3 if has_products else 1e-5), (rows, error)


def test_default_is_the_widest():
    process = run_with("", "import fastrnn; print(fastrnn._C.build_info()['isa'])")
    assert process.stdout.strip() == ISAS[-1]


@pytest.mark.parametrize("name", ["sse9", "AVX512"])
def test_unknown_name_is_an_error_at_import(name):
    process = run_with(name, "import fastrnn")
    assert process.returncode != 0
    assert f"FASTRNN_CPU_ISA={name} is not available; this build and machine have: {', '.join(ISAS)}" in process.stderr
