"""The CUDA kernels, run by the emulator, against the reference: every kernel, every option, the odd sizes."""

import subprocess

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case
from emulated import (
    CLUSTER_TILES,
    KINDS,
    PERSISTENT_KINDS,
    SPLIT_TILES,
    STEPWISE_TILES,
    TILES,
    TOLERANCE,
    WGMMA_TILES,
    compare,
    expect,
    persistent_cells,
    prepare,
    run,
    tiles,
)
from emulator import run_races

from fastrnn import ops


def launches_of_steps(emulator):
    """Of kernels with a product of their own."""
    return sum(count for name, count in emulator.launches().items() if "run_steps" in name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_stepwise(emulator, level, cell, P, rows, D, kind):
    level("stepwise")
    compare(make_case(cell, 4, 5, 3, 10, P=P, D=D, **rows), kind)


@pytest.mark.parametrize("level_name", ["stepwise", "persistent"])
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_gate_gradients_of_every_step(emulator, level, cell, P, level_name):
    """As the CPU's; and gradients of what lies within the steps are refused."""
    level(level_name)
    case = make_case(cell, 4, 5, 3, 10, D=2, lengths=True, resets=True).to(torch.float32)
    own = *case.op_inputs(), case.lengths, case.resets, None, cell
    found = []
    for space in (torch.ops.fastrnn, torch.ops.fastrnn_emulated):
        y, _, _, saved, saved_c = space.layer_forward(*own, True)
        arguments = torch.ones_like(y), None, None, *own, y, saved, saved_c, [False] * (3 + len(own[3]))
        found.append(space.layer_backward(*arguments, None, True)[-1])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="grad_saved_c, grad_values: there are no kernels on a GPU"):
        space.layer_backward(*arguments, None, False, found[1])


@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_persistent(emulator, level, cell, P, rows, D, kind):
    level("persistent")
    compare(make_case(cell, 4, 5, 3, 10, P=P, D=D, **rows), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_gemm(emulator, level, unwritten_is_nan, cell, P, rows, D, kind):
    """Several blocks of units and groups of rows."""
    level("gemm")
    before = launches_of_steps(emulator)
    compare(make_case(cell, 4, 11, 3, 40, P=P and 16, D=D, **rows), kind)
    assert launches_of_steps(emulator) == before


@pytest.mark.parametrize("size", [(0, 2, 3, 16), (3, 0, 3, 16), (1, 1, 1, 16), (3, 33, 0, 72)], ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_sizes_of_gemm(emulator, level, unwritten_is_nan, cell, P, size):
    level("gemm")
    for kind in ("float64", "float16"):
        compare(make_case(cell, *size, P=P and 8, D=2, states=False, lengths=True, resets=True), kind)


# T, B, I, H: nothing at all, less than a tile, a tile, more than one of each kind, more than 32 rows, no inputs.
SIZES = [(0, 2, 3, 4), (3, 0, 3, 4), (1, 1, 1, 1), (2, 3, 2, 8), (3, 9, 5, 17), (2, 33, 3, 33), (5, 17, 0, 24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_sizes(emulator, level, cell, P, size, kind):
    level()
    compare(make_case(cell, *size, P=P if size[3] > 3 else None, D=2, lengths=True, resets=True), kind)


@pytest.mark.parametrize(("kind", "i"), [(kind, i) for kind in KINDS for i in range(max(TILES[kind]))])
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_tiles(emulator, level, cell, P, kind, i):
    """Every tile shape there is, with several slices of K, several blocks of units and an incomplete group of rows."""
    if i >= STEPWISE_TILES and (cell, P) not in persistent_cells():
        level("persistent")
        with pytest.raises(RuntimeError, match=r"persistent kernel, but the (cell multiplies twice|layer has a proj)"):
            run(make_case(cell, 2, 2, 2, 4, P=P), kind)
        return
    level(tile=tiles(cell, kind)[i])
    compare(make_case(cell, 2, 35, 2, 41, P=P and 19, lengths=True, resets=True), kind)


def test_every_kernel_is_executed(emulator, level):
    """Runs all tiles of all cells once, then compares with the kernels that the extension contains."""
    for cell, P in VARIANTS:
        for kind in KINDS:
            for tile in tiles(cell, kind)[: None if (cell, P) in persistent_cells() else STEPWISE_TILES]:
                level(tile=tile)
                run(make_case(cell, 2, 1, 1, 34, P=P and 1), kind)  # more units than a block has
            level("gemm")
            run(make_case(cell, 2, 1, 1, 40, P=P and 8), kind)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", emulator.__file__], capture_output=True, text=True, check=True
    ).stdout
    names = ("run_steps", "finish_step", "pack_weights")
    kernels = {line.split()[-1] for line in symbols.splitlines() if any(name in line for name in names)}
    executed = {name for name, count in emulator.launches().items() if count}
    assert len(kernels) > 300
    assert kernels <= executed


@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_few_multiprocessors(emulator, level, cell, P, kind):
    """Blocks go through several groups of rows one after the other, all steps in one launch."""
    emulator.set_chip(80, 6, 163 << 10)
    level("persistent")
    before = launches_of_steps(emulator)
    compare(make_case(cell, 3, 37, 2, 20, D=2, lengths=True, resets=True), kind)
    assert launches_of_steps(emulator) == before + 2  # forward and backward


# dtype, tile, H. 256 is as much as tile 2 holds.
LONG_SUMS = [
    ("float64", 0, 264),
    ("float32", 0, 264),
    ("float32", 4, 264),
    ("tf32", 0, 264),
    ("tf32", 5, 264),
    ("bfloat16", 0, 264),
    ("bfloat16", 2, 256),
    ("bfloat16", 6, 264),
    ("bfloat16", 7, 264),
    ("bfloat16", 9, 264),
    ("bfloat16", "7,12", 264),
    ("bfloat16", "7,13", 264),
    ("bfloat16", "10,14", 256),
]


@pytest.mark.parametrize(("kind", "tile", "H"), LONG_SUMS)
def test_long_sums(emulator, level, kind, tile, H):
    """K so large that it reaches several slices of every kind, in registers, in shared memory and streamed."""
    level(tile=tile)
    compare(make_case("lstm", 3, 2, 2, H), kind)


# dtype, tile, B, H, of so long a K that the slices of registers are not enough; several rows where a warp has several
# columns of them, or where groups take turns.
SHARED_SLICES = [
    ("tf32", "7,5", 1, 560),
    ("tf32", "7,7", 1, 560),
    ("float16", "6,11", 1, 840),
    ("float16", "7,7", 1, 1080),
    ("float16", "11,7", 9, 840),
    ("float16", "7,13", 1, 1080),
    ("float16", "12,15", 33, 330),
    ("float16", "13,7", 9, 1080),
]


@pytest.mark.parametrize(("kind", "tile", "B", "H"), SHARED_SLICES)
def test_shared_slices(emulator, level, kind, tile, B, H):
    """Weights that stay in shared memory."""
    level(tile=tile)
    compare(make_case("lstm", 2, B, 1, H), kind)


@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_bits_do_not_depend_on_the_schedule(emulator, level, cell, P, kind):
    level("persistent")
    case = make_case(cell, 4, 9, 3, 33, lengths=True, resets=True)
    expected = run(case, kind)
    for seed in range(1, 5):
        emulator.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(case, kind), expected, strict=True))


@pytest.mark.parametrize("tile", [CLUSTER_TILES[0], f"2,{SPLIT_TILES[0]}", f"{WGMMA_TILES[0]},{SPLIT_TILES[4]}"])
def test_bits_of_clusters_do_not_depend_on_the_schedule(emulator, level, tile):
    level(tile=tile)
    case = make_case("lstm", 5, 9, 3, 40, lengths=True, resets=True)
    expected = run(case, "bfloat16")
    for seed in range(1, 8):
        emulator.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(case, "bfloat16"), expected, strict=True))


@pytest.mark.parametrize("tile", CLUSTER_TILES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("cell", "P"), persistent_cells(), ids=lambda value: value or "")
def test_clusters(emulator, level, cell, P, rows, tile):
    """Blocks that send to each other's shared memory: three of them, two directions, several groups of rows."""
    level(tile=tile)
    emulator.set_chip(90, 6, 227 << 10)
    emulator.set_seed(3)
    compare(make_case(cell, 4, 11, 3, 70, D=2, **rows), "float16")


def cells_by_products():
    """One of those that differ in what they compute of the sums alone."""
    return [variant for variant in persistent_cells() if variant[0] != "rnn_relu"]


@pytest.mark.parametrize("tile", SPLIT_TILES)
@pytest.mark.parametrize("rows", ["plain", "lengths+resets"])
@pytest.mark.parametrize(("cell", "P"), cells_by_products(), ids=lambda value: value or "")
def test_split_sums(emulator, level, cell, P, rows, tile):
    """Clusters that share K: two of them that exchange through memory, two directions, several groups of rows."""
    level(tile=f"2,{tile}")
    emulator.set_chip(90, 20, 227 << 10)
    emulator.set_seed(3)
    compare(make_case(cell, 3, 11 if tile in (10, 13) else 35, 3, 70, D=2, **ROWS[rows]), "bfloat16")


@pytest.mark.parametrize("tile", WGMMA_TILES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_warpgroups(emulator, level, cell, rows, tile):
    """Products of warpgroups: several blocks of units and groups of rows."""
    level(tile=f"{tile},2")
    emulator.set_chip(90, 10, 227 << 10)
    emulator.set_seed(3)
    compare(make_case(cell, 3, 37, 3, 70, D=2, **rows), "float16")


# Forward and backward, and tiles without turns that add in the same order.
TURNS = {"12,15": "4,4", "13,16": "7,6", "12,17": "4,11"}


@pytest.mark.parametrize("tile", TURNS)
@pytest.mark.parametrize("rows", ["plain", "lengths+resets"])
@pytest.mark.parametrize(("cell", "P"), cells_by_products(), ids=lambda value: value or "")
def test_turns(emulator, level, cell, P, rows, tile):
    """Two groups of rows in turns, one pair after another, the last without a second group; several blocks of units."""
    level(tile=tile)
    emulator.set_chip(90, 18, 227 << 10)
    emulator.set_seed(3)
    compare(make_case(cell, 3, 70, 3, 70, D=2, **ROWS[rows]), "float16")


@pytest.mark.parametrize("tile", TURNS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_turns_change_no_bits(emulator, level, rows, tile):
    emulator.set_chip(90, 40, 227 << 10)
    case = make_case("lstm", 3, 70, 3, 40, **rows)
    level(tile=TURNS[tile])
    expected = run(case, "bfloat16")
    level(tile=tile)
    for seed in range(2):
        emulator.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(case, "bfloat16"), expected, strict=True))


def test_clusters_that_do_not_fill_the_chip(emulator, level):
    """20 multiprocessors in one part of a chip: the emulator lets them hold four clusters of four blocks, not five."""
    level(tile=f"2,{SPLIT_TILES[0]}")
    emulator.set_chip(90, 20, 227 << 10)
    x = torch.empty((), dtype=torch.bfloat16).expand(100, 40, 60)
    assert "backward: persistent, one launch for all steps: 16 blocks" in torch.ops.fastrnn.explain(
        x, "lstm", 60, 60, 1, False, True
    )
    compare(make_case("lstm", 2, 40, 3, 60), "bfloat16")


@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
def test_persistent_and_stepwise_agree(emulator, level, kind):
    """They add in different orders, no more; float32 then differs in the last places."""
    case = make_case("lstm", 6, 9, 3, 33, D=2)
    level("stepwise")
    expected = run(case, kind)
    level("persistent")
    for a, b in zip(run(case, kind), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1 * TOLERANCE[kind] * max(1.0, b.abs().max().item()))


def test_a_lost_block_ends_the_launch_with_an_error(emulator, level):
    level("persistent")
    case = make_case("lstm", 4, 2, 3, 40)
    emulator.set_lost_block(1, 50)
    try:
        with pytest.raises(RuntimeError, match="gave up waiting"):
            run(case, "bfloat16")
    finally:
        emulator.set_lost_block(-1, 1 << 24)


@pytest.fixture
def refuses(emulator):
    """A device on which no launch finds all of its blocks room at once, although it said that they have."""
    emulator.set_refuses(True)
    yield
    emulator.set_refuses(False)


@pytest.mark.parametrize("H", [37, 40])
@pytest.mark.parametrize("rows", ["plain", "lengths", "resets"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_refused_launch_becomes_many(emulator, level, refuses, cell, rows, H):
    case = make_case(cell, 5, 9, 3, H, D=2, **ROWS[rows])
    level("stepwise")
    expected = run(case, "bfloat16")
    level()
    assert "persistent" in torch.ops.fastrnn.explain(case.tensors[0].bfloat16(), cell, H, H, 2, False, True)
    before = emulator.launches()
    with pytest.warns(UserWarning, match="has no room now for all blocks of a launch at once"):
        found = run(case, "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(emulator.launches().values()) > sum(before.values()) + 2 * 5


def test_a_refused_launch_that_was_asked_for_is_an_error(level, refuses):
    level("persistent")
    with pytest.raises(RuntimeError, match="the device cannot hold all blocks at once"):
        run(make_case("lstm", 5, 9, 3, 40), "bfloat16")


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_each_wait_is_counted_by_itself(emulator, level, kind):
    """A launch may poll more often than the limit of a single wait."""
    level("persistent")
    case = make_case("lstm", 300, 2, 1, 40)
    emulator.set_seed(2)  # blocks wait for each other in turns, some of them up to five polls
    emulator.set_lost_block(-1, 7)
    try:
        run(case, kind)
    finally:
        emulator.set_lost_block(-1, 1 << 24)


@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
def test_nan_stays_in_its_row(emulator, level, kind):
    """Also a NaN of the very bits that mark what is not yet written: nothing waits for it."""
    level("persistent")
    case = prepare(make_case("lstm", 4, 5, 3, 20), kind)
    expected = case.run(ops.layer)
    x, h0, c0 = (tensor.clone() for tensor in case.tensors[:3])
    x[1, 2] = float("nan")
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    h0.view(bits)[0, 4] = -1
    c0.view(bits)[0, 3] = -1
    outputs = case.run(ops.layer, [x, h0, c0, *case.tensors[3:]])
    others = [0, 1]
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    assert outputs[0][1:, 2].isnan().all()
    assert outputs[0][:, 3:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_recompute_gives_the_same_gradients(emulator, level, cell, P, kind):
    level()
    case = prepare(make_case(cell, 4, 5, 3, 10, P=P, D=2, lengths=True, resets=True), kind, requires_grad=True)
    expected = case.outputs_and_grads(ops.layer)

    def recomputing(*args):
        return ops.layer(*args, recompute=True)

    for a, b in zip(case.outputs_and_grads(recomputing), expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("tile", "B"), [(None, 5), ("1,1", 35)])  # one row of a thread, and two
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_inference_is_training_without_what_backward_needs(emulator, level, cell, P, tile, B):
    level(tile=tile)
    for kind in KINDS:
        case = prepare(make_case(cell, 4, B, 3, 10, P=P, D=2, lengths=True, resets=True), kind)
        expected = prepare(case, kind, requires_grad=True).run(ops.layer)
        assert all(torch.equal(a, b) for a, b in zip(case.run(ops.layer), expected, strict=True))


def test_finished_rows_may_hold_anything(emulator, level):
    level()
    case = make_case("gru", 5, 4, 3, 10, D=2, lengths=True)
    case.lengths = torch.tensor([5, 0, 2, 3])
    expected = expect(case, "float64")
    finished = torch.arange(5)[:, None] >= case.lengths
    case.tensors[0] = case.tensors[0].masked_fill(finished[:, :, None], float("nan"))
    for a, b in zip(run(case, "float64"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_what_nobody_wrote_does_not_matter(emulator, level, unwritten_is_nan, cell, P, kind):
    """Numbers of finished rows and of padding units are multiplied, if only by 0."""
    level()
    compare(make_case(cell, 3, 4, 2, 10, P=P, lengths=True), kind)


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
def test_what_is_exchanged_is_marked_before(emulator, level, unwritten_is_nan, kind, seed):
    """Several blocks, some of them ahead of others: what nobody has written yet must not be taken for a number."""
    level("persistent")
    emulator.set_seed(seed)
    compare(make_case("lstm", 12, 3, 2, 40), kind)  # rows of y, since H is a multiple of 8


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
        for kind in ("float64", "bfloat16"):
            compare(make_case(cell, 3, 4, 3, 10, P=P, D=2, bias=False, states=False, lengths=True), kind)


def test_tf32_is_rounded_to_nearest(emulator, level):
    """Cut off instead, numbers of one sign would all err to the same side, and a sum of 256 products with them."""
    level("stepwise")
    case = make_case("lstm", 1, 8, 1, 256, bias=False)
    case.tensors = [t if t is None else t.abs() for t in case.tensors]
    case.tensors[1] *= 0.1
    exact = expect(case, "tf32")[0]
    error = (run(case, "tf32")[0].double() - exact) / exact
    assert error.mean().abs() < 5e-5  # 5e-6; with either operand cut off 2e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_little_shared_memory_is_enough(emulator, level, cell, P, kind):
    """The least that a GPU from compute capability 8.0 on has: 99 KB."""
    level()
    emulator.set_chip(89, 128, 99 << 10)
    compare(make_case(cell, 1, 9, 3, 20, P=P), kind)
    compare(make_case(cell, 3, 9, 3, 20, P=P), kind)


@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
@pytest.mark.parametrize("name", ["stepwise", "persistent"])
def test_infinite_weights_do_not_meet_rows_without_a_state(emulator, level, name, kind):
    """0 times infinity is NaN; but the last step has no later one, and a restarted row nothing before."""
    level(name)
    case = prepare(make_case("lstm", 2, 3, 1, 1), kind, requires_grad=True)
    with torch.no_grad():
        case.tensors[4][:] = torch.tensor([[float("inf")], [0], [0], [0]])
    case.resets = torch.ones(2, 3, dtype=torch.bool)
    outputs, grads = case.outputs_and_grads(ops.layer)
    assert all(tensor.isfinite().all() for tensor in (*outputs, *grads[:3]))


def test_threads_do_not_race():
    """ThreadSanitizer sees a thread in each CUDA thread: what is handed over without a barrier is a race."""
    process = run_races()
    assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    assert process.stdout.count(": written") == 10
