"""The kernels against the reference: outputs and first-order gradients, every cell, dtype and row option."""

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrnn import _C, ops, reference
from fastrnn.equation import record

# Sizes that meet every edge of the kernels: less than a vector, more than one, odd rows, one row, many rows.
SIZES = {
    "tiny": (3, 2, 3, 4),
    "one-row": (11, 1, 5, 19),
    "two-rows": (4, 2, 70, 33),
    "odd": (5, 7, 9, 37),
    "wide": (6, 33, 40, 70),
    "long-k": (2, 3, 300, 150),
    "unpacked": (1, 3, 37, 21),
    "step": (1, 11, 300, 70),
    "step-of-many": (1, 98, 37, 21),
}
# Sums of up to 300 products; units in the last place of the dtype, with room for the activations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_matches_reference(cell, P, dtype, size, rows, D):
    case = make_case(cell, *size, P=P, D=D, **rows)
    expected = case.to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    found = case.to(dtype, requires_grad=True).outputs_and_grads(ops.layer)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_low_precision_errs_no_more_than_torch(cell, P, dtype, rows):
    """Our error against float64 is at most that of the same equations in plain torch at the same dtype.

    The gradient of relu jumps where a rounding takes a value to the other side of 0: then only outputs are compared.
    """
    case = make_case(cell, 12, 7, 40, 37, P=P, D=2, **rows).to(dtype)
    exact = case.to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    plain = case.to(dtype, requires_grad=True).outputs_and_grads(reference.layer)
    ours = case.to(dtype, requires_grad=True).outputs_and_grads(ops.layer)
    parts = [ours, plain, exact]
    if cell == "rnn_relu" and not torch.equal(ours[0][0] > 0, exact[0][0] > 0):
        parts = [part[:1] for part in parts]
    for ours_part, plain_part, exact_part in zip(*parts, strict=True):
        for a, b, truth in zip(ours_part, plain_part, exact_part, strict=True):
            rounding = torch.finfo(dtype).eps * truth.abs().max()
            assert (a.double() - truth).abs().max() <= (b.double() - truth).abs().max() + rounding


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_matches_reference_at_random(data):
    def size(high):
        return data.draw(st.integers(1, high))

    cell, projected = data.draw(st.sampled_from(VARIANTS))
    H = size(70)
    P = size(H - 1) if projected and H > 1 else None
    flags = {name: data.draw(st.booleans()) for name in ("bias", "states", "lengths", "resets")}
    seed = data.draw(st.integers(0, 2**31))
    case = make_case(cell, size(9), size(20), size(50), H, P=P, D=data.draw(st.integers(1, 2)), seed=seed, **flags)
    expected = case.to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    found = case.to(torch.float64, requires_grad=True).outputs_and_grads(ops.layer)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-12)


def test_core_and_reference_have_the_same_cells():
    built_in = {name: cell for name, cell in reference.CELLS.items() if name == cell.equation.__name__}
    sizes = {name: (len(record(cell).inputs), cell.carried) for name, cell in built_in.items()}
    assert {name: (cell["gates"], cell["carried"]) for name, cell in _C.cells().items()} == sizes


# Uneven shares of rows and columns; with one to four rows, threads share the units of each step instead.
SHARED = {
    "rows": (40, 13, 50, 70),
    "units-of-1-row": (9, 1, 60, 300),
    "units-of-3-rows": (9, 3, 60, 210),
    "unpacked": (1, 2, 600, 500),
}


@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", SHARED.values(), ids=SHARED)
def test_bits_do_not_depend_on_threads(cell, P, size, D, threads):
    """Each size is large enough for the work to be shared."""
    case = make_case(cell, *size, P=P and 50, D=D, lengths=True, resets=True, dtype=torch.float32)
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        outputs, grads = case.to(torch.float32, requires_grad=True).outputs_and_grads(ops.layer)
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    expected = case.to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    assert_close(results[0], [*expected[0], *expected[1]], TOLERANCE[torch.float32])


def test_workers_treat_denormals_as_the_caller_does(threads):
    """torch.set_flush_denormal changes the mode of the calling thread; the pool's threads take it over."""
    case = make_case("rnn_relu", 30, 64, 64, 64, bias=False, states=False, dtype=torch.float32)
    case.tensors[0] = case.tensors[0] * 1e-38
    threads(2)
    kept = case.run(ops.layer)[0]
    assert torch.set_flush_denormal(True)
    try:
        threads(1)
        flushed = case.run(ops.layer)[0].numpy().tobytes()
        threads(2)
        assert all(case.run(ops.layer)[0].numpy().tobytes() == flushed for _ in range(8))
    finally:
        torch.set_flush_denormal(False)
    assert kept.numpy().tobytes() != flushed


def test_finished_rows_ignore_their_padding():
    """NaN in the padding reaches neither outputs nor gradients."""
    case = make_case("lstm", 6, 5, 4, 9, D=2, lengths=True).to(torch.float64)
    padding = torch.arange(6)[:, None] >= case.lengths
    clean = case.to(torch.float64, requires_grad=True)
    case.tensors[0][padding] = float("nan")
    found = case.to(torch.float64, requires_grad=True).outputs_and_grads(ops.layer)
    expected = clean.outputs_and_grads(ops.layer)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def test_infinite_and_nan_inputs_give_what_torch_gives():
    case = make_case("rnn_tanh", 1, 5, 1, 1, bias=False, states=False, dtype=torch.float32)
    case.tensors[0] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30]).view(1, 5, 1)
    case.tensors[3] = torch.ones(1, 1)
    y = case.run(ops.layer)[0].flatten()
    torch.testing.assert_close(y, torch.tensor([1.0, -1.0, float("nan"), 1.0, -1.0]), rtol=0, atol=0, equal_nan=True)
