"""The kernels of the GPU against those of the CPU in float64: every cell, type, level, tile and kind of rows."""

import re
from dataclasses import replace

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS
from gpu_cases import (
    LEVELS,
    ROUNDING,
    TYPES,
    Spec,
    check,
    expected,
    make,
    moved,
    on_device,
    outputs_and_grads,
    sampled_specs,
)

from benchmarks.measure import products_of
from fastrnn import ops

pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")

# Beside the sampled ones: 20000 steps, which is 40000 launches of a stepwise kernel or two of a persistent one; at the
# level gemm as many launches and products.
LONG = [Spec(cell, 20000, 2, 8, 16) for cell in ("lstm", "gru")]
QUICK = 9  # every so many-th spec is in the quick subset
SMALL = [Spec(cell, 3, 9, 5, 33, P and 11, rows="lengths+resets") for cell, P in VARIANTS]
SMALL += [replace(spec, H=40, P=spec.P and 16) for spec in SMALL]  # for the level gemm, which wants multiples of 8


def runs():
    """(spec, type, level) of every layer there is a kernel for; what they share comes one after the other."""
    for index, spec in enumerate([*sampled_specs(), *LONG]):
        marks = [pytest.mark.quick] if index % QUICK == 0 else []
        for name in TYPES:
            for level in LEVELS:
                if spec.may_be(level, name):
                    yield pytest.param(spec, name, level, marks=marks, id=f"{spec}-{name}-{level}")


def run(spec: Spec, name: str) -> dict:
    """Every output and gradient; the test is skipped where the weights do not fit on the chip, as persistent ones
    must."""
    found, refusal = try_to_run(spec, name)
    if "do not fit on the chip" in refusal:
        pytest.skip(refusal)
    assert not refusal
    return found


def try_to_run(spec: Spec, name: str) -> tuple[dict, str]:
    """Every output and gradient, or why there is no such kernel for this."""
    try:
        return on_device(spec, name), ""
    except RuntimeError as error:
        if " kernel, but " not in str(error):
            raise
        return {}, str(error)


def is_large(chip) -> bool:
    """Whether it is one of those that persistent kernels were written for: a layer of 1024 units has 128 blocks."""
    return chip.multi_processor_count >= 128 and chip.major in (9, 10)


@pytest.mark.parametrize(("spec", "name", "level"), list(runs()))
def test_layer(spec, name, level, force):
    force(level)
    check(spec, name, run(spec, name))


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("spec", "name", "level"),
    [
        pytest.param(spec, name, level, id=f"{spec}-{name}-{level}")
        for spec in SMALL
        for name in ("float32", "tf32", "bfloat16")
        for level in LEVELS
        if (spec.H == 40) == (level == "gemm") and spec.may_be(level, name)
    ],
)
def test_small_layer(spec, name, level, force):
    """More than one block of units and rows, rows that end and begin anew."""
    force(level)
    check(spec, name, run(spec, name))


def forced_tiles(spec, name, force):
    """Values of FASTRNN_CUDA_TILE: every tile shape of csrc/cuda/tile_shapes.h, of one pass each."""
    for value in ("{},", ",{}"):
        force(tile=value.format(9999))
        with pytest.raises(RuntimeError, match=r"FASTRNN_CUDA_TILE: expected 0 to \d+, got 9999") as refused:
            run(spec, name)
        last = int(re.search(r"expected 0 to (\d+)", str(refused.value))[1])
        yield from (value.format(tile) for tile in range(last + 1))


@pytest.mark.parametrize(
    ("cell", "P", "name"),
    [
        pytest.param(
            cell, P, name, marks=[pytest.mark.sanitizer] if (cell, P, name) == ("lstm", None, "bfloat16") else []
        )
        for cell, P in VARIANTS
        for name in TYPES
    ],
)
def test_every_tile(cell, P, name, force):
    """Each tile shape that the cell has kernels for: several blocks of units, a last group of rows that is not full."""
    spec = Spec(cell, 2, 35, 2, 41, P and 19, rows="lengths+resets")
    refused = []
    for tile in list(forced_tiles(spec, name, force)):
        force(tile=tile)
        found, refusal = try_to_run(spec, name)
        if refusal:
            refused.append(tile)
        else:
            check(spec, name, found)
    if spec.may_be_persistent(name) and torch.cuda.get_device_properties(0).major == 9:
        # In either pass: a matrix library takes multiples of 8 units alone, and a scan has no recurrent product. A cell
        # of one gate has too few rows for a product of warpgroups in its forward pass.
        assert len(refused) == 4 + (1 if cell.startswith("rnn") and name in ("bfloat16", "float16") else 0)


@pytest.mark.quick
@pytest.mark.parametrize("tile", ["12,15", "13,16", "12,17"])
def test_groups_in_turns(tile, force):
    """More passes than memory is brought in ahead of, a pair of groups after another, the last one without a second."""
    if tile == "12,17" and torch.cuda.get_device_properties(0).major < 9:
        pytest.skip("blocks that share K need clusters")
    spec = Spec("lstm", 9, 230, 5, 300, D=2, rows="lengths+resets")
    force(tile=tile)
    check(spec, "bfloat16", run(spec, "bfloat16"))


@pytest.mark.quick
@pytest.mark.parametrize("B", [1, 64])
@pytest.mark.parametrize("H", [256, 512, 1024])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_large_chip_holds_layers_of_1024_units(cell, H, B, force):
    """So that none of the tests above is skipped where it counts."""
    chip = torch.cuda.get_device_properties(0)
    if not is_large(chip):
        pytest.skip(f"{chip.name} has {chip.multi_processor_count} multiprocessors")
    force("persistent")
    spec = Spec(cell, 2, B, 64, H)
    check(spec, "bfloat16", on_device(spec, "bfloat16"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (Spec("gru_reset_before", 3, 2, 4, 8), "float32"),
        (Spec("lstm", 3, 2, 4, 8, P=3), "float32"),
        (Spec("lstm", 3, 2, 4, 8), "float64"),
        (Spec("lstm", 1, 2, 4, 8), "float32"),
        (Spec("rnn_tanh", 3, 2, 4, 2048), "float32"),
    ],
    ids=["two-products", "projection", "float64", "one-step", "too-large"],
)
def test_what_cannot_be_persistent_is_refused_with_a_reason(spec, name, force):
    force("persistent")
    with pytest.raises(RuntimeError, match="persistent kernel, but "):
        on_device(spec, name)
    force()
    check(spec, name, on_device(spec, name))


def test_a_level_that_does_not_exist_is_refused(force):
    force("fast")
    with pytest.raises(RuntimeError, match="FASTRNN_CUDA_LEVEL: expected stepwise, gemm, persistent or scan, got fast"):
        run(Spec("lstm", 3, 2, 4, 8), "float32")


@pytest.mark.quick
@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 5), (3, 0, 4, 5), (0, 0, 4, 5), (3, 2, 0, 5)], ids=["T0", "B0", "T0-B0", "I0"]
)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_nothing_to_do(cell, P, sizes, force):
    """No steps, no rows, no inputs: the states pass through, and gradients of weights without terms are 0."""
    force()
    for rows in ROWS:
        spec = Spec(cell, *sizes, P, D=2, rows=rows)
        truth = expected(spec)
        for name, dtype in TYPES.items():
            found = run(spec, name)
            assert found.keys() == truth.keys()
            tolerance = 20 * ROUNDING.get(name, torch.finfo(dtype).eps)  # at most three steps
            for tensor, value in truth.items():
                torch.testing.assert_close(found[tensor].double().cpu(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.quick
def test_products_of_steps_are_no_less_exact_than_recurrent_layers_may_be(force):
    """Where matrix products alone may be of TF32, a library does not make those of the steps."""
    force("gemm")
    with products_of("float32"):
        torch.backends.cuda.matmul.allow_tf32 = True
        with pytest.raises(RuntimeError, match="gemm kernel, but matrix products are of TF32"):
            moved(make(Spec("lstm", 5, 64, 8, 512)), torch.float32).run(ops.layer)


@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("sizes", [(0, 3, 4, 16), (3, 0, 4, 16)], ids=["T0", "B0"])
def test_nothing_to_multiply(cell, P, sizes, force):
    force("gemm")
    spec = Spec(cell, *sizes, P and 8, D=2)
    found, truth = run(spec, "float64"), expected(spec)
    for tensor, value in truth.items():
        torch.testing.assert_close(found[tensor].double().cpu(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_a_row_of_nan_harms_no_other(cell, name, level, force):
    """Nothing waits for a number that is NaN, also one with all bits set; other rows keep every bit."""
    force(level)
    spec = Spec(cell, 5, 9, 4, 40, D=2)
    case = moved(make(spec), TYPES[name])
    with torch.no_grad():
        case.tensors[0][1, 2] = float("nan")
        case.tensors[1].view({2: torch.int16, 4: torch.int32}[TYPES[name].itemsize])[:, 5] = -1
    with products_of(name):
        found = outputs_and_grads(case, ops.layer)
    sound = on_device(spec, name)
    others = [0, 1, 3, 4, 6, 7, 8]
    for tensor in ("y", "h_n", "gradient of x", "gradient of h0"):
        assert torch.equal(found[tensor][:, others], sound[tensor][:, others])
    if cell != "rnn_relu":  # the derivative of a rectifier drops what is not positive
        assert found["gradient of x"][1, 2].isnan().all()
    assert found["y"][1:, 2, :40].isnan().all()
    assert found["y"][:2, 2, 40:].isnan().all()
    assert found["y"][:, 5].isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_same_call_gives_the_same_bits(cell, name, level, force):
    force(level)
    spec = Spec(cell, 30, 33, 100, 264 if level == "gemm" else 257, rows="lengths+resets")
    first = run(spec, name)
    for _ in range(3):
        assert same_bits(run(spec, name), first)


def same_bits(found: dict, expected: dict) -> bool:
    return all(torch.equal(found[tensor], value) for tensor, value in expected.items())


@pytest.mark.quick
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_gives_the_bits_of_training(dtype, level, force):
    force(level)
    for cell in ("lstm", "gru", "rnn_tanh"):
        case = moved(make(Spec(cell, 7, 17, 33, 104, rows="lengths")), dtype)
        recorded = case.run(ops.layer)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(case.run(ops.layer), recorded, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_recomputed_gates_give_the_same_gradients(cell, P, dtype, force):
    force()
    case = moved(make(Spec(cell, 7, 9, 5, 33, P and 11, D=2, rows="lengths+resets")), dtype)
    kept = outputs_and_grads(case, ops.layer)
    recomputed = outputs_and_grads(case, lambda *arguments: ops.layer(*arguments, recompute=True))
    assert same_bits(recomputed, kept)


@pytest.mark.quick
def test_lengths_beyond_the_steps_are_clamped(force):
    """A look at their values would wait for the device."""
    force()
    case = moved(make(Spec("lstm", 4, 3, 5, 6, rows="lengths")), torch.float64)
    case.lengths = torch.tensor([9, -3, 2], device=case.tensors[0].device)
    found = outputs_and_grads(case, ops.layer)
    case.lengths = torch.tensor([4, 0, 2], device=case.tensors[0].device)
    assert same_bits(found, outputs_and_grads(case, ops.layer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tensors_need_not_be_contiguous(dtype, force):
    force()
    case = moved(make(Spec("lstm", 5, 4, 6, 9, D=2, rows="lengths+resets")), dtype)
    dense = outputs_and_grads(case, ops.layer)
    case.tensors = [None if t is None else spread(t.detach()).requires_grad_() for t in case.tensors]
    case.lengths, case.resets = spread(case.lengths), spread(case.resets)
    assert not any(t.is_contiguous() for t in (*case.tensors, case.lengths, case.resets) if t is not None)
    assert same_bits(outputs_and_grads(case, ops.layer), dense)


def spread(tensor):
    """The same numbers, every second one in memory."""
    return torch.stack([tensor] * 2, -1)[..., 0]


@pytest.mark.quick
def test_gradcheck(force):
    """Also that a second call gives the same gradients, to the bit."""
    force()
    for cell, P in VARIANTS:
        case = moved(make(Spec(cell, 3, 2, 3, 4, P and 3, D=2, rows="lengths+resets")), torch.float64)
        present = [t for t in case.tensors if t is not None]

        def function(*given, case=case):
            given = iter(given)
            return case.run(ops.layer, [None if t is None else next(given) for t in case.tensors])

        assert torch.autograd.gradcheck(function, present)
        assert torch.autograd.gradgradcheck(function, present, fast_mode=True)


# ---- wrong use

PLACES = {"h0": 1, "c0": 2, "w_ih": 3, "w_hh": 4, "b_ih": 5, "b_hh": 6, "w_hr": 7}


@pytest.mark.quick
@pytest.mark.parametrize("records", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", [*PLACES, "lengths", "resets"])
def test_a_tensor_elsewhere_is_named(name, records):
    case = moved(make(Spec("lstm", 3, 2, 4, 6, P=3, rows="lengths+resets")), torch.float32)
    if name in PLACES:
        case.tensors[PLACES[name]] = case.tensors[PLACES[name]].detach().cpu()
    else:
        setattr(case, name, getattr(case, name).cpu())
    with (
        torch.set_grad_enabled(records),
        pytest.raises(RuntimeError, match=f"{name}: expected device cuda:0 as x, got cpu"),
    ):
        case.run(ops.layer)


@pytest.mark.quick
@pytest.mark.parametrize("records", [False, True], ids=["inference", "training"])
def test_an_input_elsewhere_is_named(records):
    case = moved(make(Spec("gru", 3, 2, 4, 6)), torch.float32)
    case.tensors[0] = case.tensors[0].detach().cpu()
    with torch.set_grad_enabled(records), pytest.raises(RuntimeError, match=r"expected device cpu as x, got cuda:0"):
        case.run(ops.layer)
