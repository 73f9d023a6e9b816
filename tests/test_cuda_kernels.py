"""The CUDA kernels, run by the emulator, against the reference: every kernel, every option, the odd sizes."""

import subprocess

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case
from emulator import build, run_threads

from fastrnn import ops, reference

FLOATS = [torch.float64, torch.float32]
HALVES = [torch.bfloat16, torch.float16]
# How many tile shapes csrc/cuda/tile_shapes.h lists for a dtype, and how many of them are stepwise; they come first.
TILES = {torch.float64: 2, torch.float32: 5, torch.bfloat16: 8, torch.float16: 8}
STEPWISE_TILES = 2
H200 = (90, 132, 227 << 10)  # compute capability, multiprocessors, shared memory of a block

# Of the tensor's largest value. float64, float32: sums of up to 300 products, some units in the last place of each.
# 16 bits: y, the gates and the gate gradients are rounded in each of a few steps, each time by half a unit in the last
# place (2^-9 of bfloat16, 2^-12 of float16), and the gradients add such errors up. A term left out costs 1e-1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def extension():
    return build()


@pytest.fixture
def emulator(extension, monkeypatch):
    """The emulator of an H200, in the place of the CPU's kernels."""
    extension.set_chip(*H200)
    extension.set_seed(0)
    monkeypatch.setattr(torch.ops, "fastrnn", torch.ops.fastrnn_emulated)
    return extension


@pytest.fixture
def unwritten_is_nan():
    """Memory that torch hands out holds NaN; bytes, such as those of the kernels' workspace, hold 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def level(monkeypatch):
    """A function that forces a level or a tile."""

    def force(name=None, tile=None):
        for variable, value in (("FASTRNN_CUDA_LEVEL", name), ("FASTRNN_CUDA_TILE", tile)):
            if value is None:
                monkeypatch.delenv(variable, raising=False)
            else:
                monkeypatch.setenv(variable, str(value))

    return force


def run(case, dtype):
    """Every output and gradient of a case."""
    outputs, grads = case.to(dtype, requires_grad=True).outputs_and_grads(ops.layer)
    return [*outputs, *grads]


def expect(case, dtype):
    """The same from the reference in float64, of the numbers that `dtype` can hold."""
    outputs, grads = case.to(dtype).to(torch.float64, requires_grad=True).outputs_and_grads(reference.layer)
    return [*outputs, *grads]


def compare(case, dtype):
    if case.tensors[0].shape[0] == 0:  # the reference has nothing to differentiate then
        found, expected = case.to(dtype).run(ops.layer), case.to(dtype).run(reference.layer)
        run(case, dtype)
    else:
        found, expected = run(case, dtype), expect(case, dtype)
    # relu's gradient jumps where a rounding takes a value to the other side of 0.
    if case.cell == "rnn_relu" and dtype in HALVES and not torch.equal(found[0] > 0, expected[0] > 0):
        found, expected = found[:2], expected[:2]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b).abs().max().item()
            assert error <= TOLERANCE[dtype] * max(1.0, b.abs().max().item())


def launches_of_steps(emulator):
    return sum(count for name, count in emulator.launches().items() if "run_steps" in name)


def persistent_cells():
    return [variant for variant in VARIANTS if variant[0] != "gru_reset_before" and variant[1] is None]


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_stepwise(emulator, level, cell, P, rows, D, dtype):
    level("stepwise")
    compare(make_case(cell, 4, 5, 3, 10, P=P, D=D, **rows), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_persistent(emulator, level, cell, P, rows, D, dtype):
    level("persistent")
    compare(make_case(cell, 4, 5, 3, 10, P=P, D=D, **rows), dtype)


# T, B, I, H: nothing at all, less than a tile, a tile, more than one of each kind, more than 32 rows, no inputs.
SIZES = [(0, 2, 3, 4), (3, 0, 3, 4), (1, 1, 1, 1), (2, 3, 2, 8), (3, 9, 5, 17), (2, 33, 3, 33), (5, 17, 0, 24)]


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_sizes(emulator, level, cell, P, size, dtype):
    level()
    compare(make_case(cell, *size, P=P if size[3] > 3 else None, D=2, lengths=True, resets=True), dtype)


@pytest.mark.parametrize(("dtype", "tile"), [(d, i) for d, count in TILES.items() for i in range(count)], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_tiles(emulator, level, cell, P, dtype, tile):
    """Every tile shape there is, with several slices of K, several blocks of units and an incomplete group of rows."""
    if tile >= STEPWISE_TILES and (cell, P) not in persistent_cells():
        level("persistent")
        with pytest.raises(RuntimeError, match=r"persistent kernel, but the (cell multiplies twice|layer has a proj)"):
            run(make_case(cell, 2, 2, 2, 4, P=P), dtype)
        return
    level(tile=tile)
    compare(make_case(cell, 2, 35, 2, 41, P=P and 19, lengths=True, resets=True), dtype)


def test_every_kernel_is_executed(emulator, level):
    """Runs all tiles of all cells once, then compares with the kernels that the extension contains."""
    for cell, P in VARIANTS:
        for dtype, count in TILES.items():
            for tile in range(count if (cell, P) in persistent_cells() else STEPWISE_TILES):
                level(tile=tile)
                run(make_case(cell, 2, 1, 1, 2, P=P and 1), dtype)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", emulator.__file__], capture_output=True, text=True, check=True
    ).stdout
    kernels = {line.split()[-1] for line in symbols.splitlines() if "run_steps" in line or "pack_weights" in line}
    executed = {name for name, count in emulator.launches().items() if count}
    assert len(kernels) > 300
    assert kernels <= executed
    print(f"{len(kernels)} kernels, {sum(emulator.launches().values())} launches")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_few_multiprocessors(emulator, level, cell, P, dtype):
    """Blocks go through several groups of rows one after the other, all steps in one launch."""
    emulator.set_chip(80, 6, 163 << 10)
    level("persistent")
    before = launches_of_steps(emulator)
    compare(make_case(cell, 3, 37, 2, 20, D=2, lengths=True, resets=True), dtype)
    assert launches_of_steps(emulator) == before + 2  # forward and backward


LONG_SUMS = [
    (torch.float64, 0),
    (torch.float32, 0),
    (torch.float32, 4),
    (torch.bfloat16, 0),
    (torch.bfloat16, 6),
    (torch.bfloat16, 7),
]


@pytest.mark.parametrize(("dtype", "tile"), LONG_SUMS, ids=str)
def test_long_sums(emulator, level, dtype, tile):
    """K so large that it reaches several slices of every kind, in registers, in shared memory and streamed."""
    level(tile=tile)
    compare(make_case("lstm", 3, 2, 2, 264), dtype)


# Chip, tile, H: K is longer than the tile, weights that exceed the shared memory, more blocks than multiprocessors.
TOO_LARGE = [(H200, 2, 264), ((90, 132, 64 << 10), 7, 20), ((90, 2, 227 << 10), 2, 33)]


@pytest.mark.parametrize(("chip", "tile", "H"), TOO_LARGE, ids=str)
def test_what_does_not_fit_is_not_persistent(emulator, level, chip, tile, H):
    emulator.set_chip(*chip)
    level(tile=tile)
    with pytest.raises(RuntimeError, match="the recurrent weights do not fit on the chip"):
        run(make_case("lstm", 2, 2, 2, H), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_bits_do_not_depend_on_the_schedule(emulator, level, cell, P, dtype):
    level("persistent")
    case = make_case(cell, 4, 9, 3, 33, lengths=True, resets=True)
    expected = run(case, dtype)
    for seed in range(1, 5):
        emulator.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(case, dtype), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_persistent_and_stepwise_agree(emulator, level, dtype):
    """They add in different orders, no more; float32 then differs in the last places."""
    case = make_case("lstm", 6, 9, 3, 33, D=2)
    level("stepwise")
    expected = run(case, dtype)
    level("persistent")
    for a, b in zip(run(case, dtype), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1 * TOLERANCE[dtype] * max(1.0, b.abs().max().item()))


def test_a_lost_block_ends_the_launch_with_an_error(emulator, level):
    level("persistent")
    case = make_case("lstm", 4, 2, 3, 40)
    emulator.set_lost_block(1, 50)
    try:
        with pytest.raises(RuntimeError, match="gave up waiting"):
            run(case, torch.bfloat16)
    finally:
        emulator.set_lost_block(-1, 1 << 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_wait_is_counted_by_itself(emulator, level, dtype):
    """A launch may poll more often than the limit of a single wait."""
    level("persistent")
    case = make_case("lstm", 60, 2, 1, 40)
    emulator.set_lost_block(-1, 200)
    try:
        run(case, dtype)
    finally:
        emulator.set_lost_block(-1, 1 << 24)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_nan_stays_in_its_row(emulator, level, dtype):
    """Also a NaN of the very bits that mark what is not yet written: nothing waits for it."""
    level("persistent")
    case = make_case("lstm", 4, 5, 3, 20).to(dtype)
    expected = case.run(ops.layer)
    x, h0, c0 = (tensor.clone() for tensor in case.tensors[:3])
    x[1, 2] = float("nan")
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    h0.view(bits)[0, 4] = -1
    c0.view(bits)[0, 3] = -1
    outputs = case.run(ops.layer, [x, h0, c0, *case.tensors[3:]])
    others = [0, 1]
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    assert outputs[0][1:, 2].isnan().all()
    assert outputs[0][:, 3:].isnan().all()


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_recompute_gives_the_same_gradients(emulator, level, cell, P, dtype):
    level()
    case = make_case(cell, 4, 5, 3, 10, P=P, D=2, lengths=True, resets=True).to(dtype, requires_grad=True)
    expected = case.outputs_and_grads(ops.layer)

    def recomputing(*args):
        return ops.layer(*args, recompute=True)

    for a, b in zip(case.outputs_and_grads(recomputing), expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_inference_is_training_without_what_backward_needs(emulator, level, cell, P):
    level()
    for dtype in (*FLOATS, *HALVES):
        case = make_case(cell, 4, 5, 3, 10, P=P, D=2, lengths=True, resets=True).to(dtype)
        expected = case.to(dtype, requires_grad=True).run(ops.layer)
        assert all(torch.equal(a, b) for a, b in zip(case.run(ops.layer), expected, strict=True))


def test_finished_rows_may_hold_anything(emulator, level):
    level()
    case = make_case("gru", 5, 4, 3, 10, D=2, lengths=True)
    case.lengths = torch.tensor([5, 0, 2, 3])
    expected = expect(case, torch.float64)
    finished = torch.arange(5)[:, None] >= case.lengths
    case.tensors[0] = case.tensors[0].masked_fill(finished[:, :, None], float("nan"))
    for a, b in zip(run(case, torch.float64), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_what_nobody_wrote_does_not_matter(emulator, level, unwritten_is_nan, cell, P, dtype):
    """Numbers of finished rows and of padding units are multiplied, if only by 0."""
    level()
    compare(make_case(cell, 3, 4, 2, 10, P=P, lengths=True), dtype)


@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_no_steps_hand_through_the_gradients_of_the_states(emulator, level, unwritten_is_nan, cell, P):
    level()
    case = make_case(cell, 0, 2, 3, 4, P=P, D=2).to(torch.float32, requires_grad=True)
    states, final = case.tensors[1:3], case.run(ops.layer)[1:]
    upstream = [torch.rand_like(state) for state in final]
    grads = torch.autograd.grad(final, states[: len(final)], upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads, upstream, strict=True))


def test_lengths_are_clamped(extension):
    """The op cannot check lengths that are on a GPU."""
    assert [extension.row_length(7, n) for n in (-(2**40), -1, 0, 3, 7, 8, 2**40)] == [0, 0, 0, 3, 7, 7, 7]


def test_missing_states_and_biases(emulator, level):
    level()
    for cell, P in VARIANTS:
        for dtype in (torch.float64, torch.bfloat16):
            compare(make_case(cell, 3, 4, 3, 10, P=P, D=2, bias=False, states=False, lengths=True), dtype)


def test_unknown_environment_values_are_errors(emulator, level):
    case = make_case("lstm", 2, 2, 2, 4)
    level("fast")
    with pytest.raises(RuntimeError, match="FASTRNN_CUDA_LEVEL: expected stepwise or persistent, got fast"):
        case.run(ops.layer)
    level(tile=99)
    with pytest.raises(RuntimeError, match="FASTRNN_CUDA_TILE: expected 0 to 1, got 99"):
        case.run(ops.layer)


def test_threads_do_not_race():
    """A thread for each CUDA thread, under ThreadSanitizer: what is handed over without a barrier is a race."""
    process = run_threads("thread")
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    assert process.stdout.count(": written") == 4
