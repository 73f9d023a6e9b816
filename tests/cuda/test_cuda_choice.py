"""Which way `choose` goes for a layer, what it refuses, and what `explain` says of it."""

import math
import re

import pytest
import torch
from cases import make_case
from emulated import (
    DTYPES,
    H200,
    PERSISTENT_KINDS,
    TILES,
    TURN_TILES,
    WGMMA_TILES,
    few_gates,
    persistent_cells,
    run,
)

from fastrnn import ops


def test_gemm_needs_multiples_of_8(emulator, level):
    level("gemm")
    for H, P in ((20, None), (24, 20)):
        with pytest.raises(RuntimeError, match="asks for a gemm kernel, but units and outputs are no multiples of 8"):
            run(make_case("lstm", 2, 2, 2, H, P=P), "float32")


# Chip, tile, H: K is longer than the tile, weights that exceed the shared memory, more blocks than multiprocessors.
TOO_LARGE = [(H200, 2, 264), ((90, 132, 64 << 10), 7, 20), ((90, 2, 227 << 10), 2, 33)]


@pytest.mark.parametrize(("chip", "tile", "H"), TOO_LARGE, ids=str)
def test_what_does_not_fit_is_not_persistent(emulator, level, chip, tile, H):
    emulator.set_chip(*chip)
    level(tile=tile)
    with pytest.raises(RuntimeError, match=f"tile {tile} cannot take this layer on this device"):
        run(make_case("lstm", 2, 2, 2, H), "bfloat16")


@pytest.mark.parametrize(
    ("cell", "chip"),
    [*((cell, H200) for cell, _ in persistent_cells() if few_gates(cell)), ("lstm", (100, 148, 227 << 10))],
    ids=str,
)
def test_warpgroups_need_hopper_and_several_gates(emulator, level, cell, chip):
    emulator.set_chip(*chip)
    level(tile=f"{WGMMA_TILES[0]},2")
    with pytest.raises(RuntimeError, match="tile 10 cannot take this layer on this device"):
        run(make_case(cell, 2, 2, 2, 20), "bfloat16")


def test_clusters_need_hopper_and_sixteen_blocks(emulator, level):
    level(tile=9)
    x = torch.empty((), dtype=torch.bfloat16).expand(100, 1, 512)
    assert "persistent" in torch.ops.fastrnn.explain(x, "lstm", 512, 512, 1, False, True)
    for H in (520, 32):  # too many, and no others to send to
        with pytest.raises(RuntimeError, match="tile 9 cannot take this layer"):
            torch.ops.fastrnn.explain(x, "lstm", H, H, 1, False, True)
    emulator.set_chip(80, 108, 163 << 10)
    with pytest.raises(RuntimeError, match="tile 9 cannot take this layer"):
        torch.ops.fastrnn.explain(x, "lstm", 64, 64, 1, False, True)


def test_unknown_environment_values_are_errors(emulator, level):
    case = make_case("lstm", 2, 2, 2, 4)
    level("fast")
    with pytest.raises(RuntimeError, match="FASTRNN_CUDA_LEVEL: expected stepwise, gemm, persistent or scan, got fast"):
        case.run(ops.layer)
    for tile in ("99", "-1", "1x", "abc", "99999999999"):
        level(tile=tile)
        with pytest.raises(RuntimeError, match=f"FASTRNN_CUDA_TILE: expected 0 to 3, got {tile}"):
            case.run(ops.layer)
    level("persistent", tile=0)
    with pytest.raises(RuntimeError, match="tile 0 is not persistent, as FASTRNN_CUDA_LEVEL asks"):
        case.run(ops.layer)


def test_explain_checks_its_sizes(emulator):
    x = torch.empty((), dtype=torch.bfloat16).expand(10, 4, 8)
    for H, P, D in ((0, 0, 1), (8, 8, 0), (8, 8, 3), (-8, -8, 1)):
        with pytest.raises(ValueError, match="explain: expected units, outputs and 1 or 2 directions"):
            torch.ops.fastrnn.explain(x, "lstm", H, P, D, False, True)
    with pytest.raises(ValueError, match="expected at most 262144 units on a GPU"):
        torch.ops.fastrnn.explain(x, "lstm", 2**33, 2**33, 1, False, True)


# What an H200 does with a layer of one direction: dtype, cell, rows, units.
CHOICES = [
    ("bfloat16", "lstm", 1, 64, "persistent"),
    ("bfloat16", "lstm", 64, 1024, "persistent"),
    ("bfloat16", "lstm", 1, 2048, "persistent"),
    ("bfloat16", "lstm", 1, 2100, "stepwise"),
    ("float16", "gru", 64, 1000, "persistent"),
    ("float32", "gru", 1, 1024, "persistent"),
    ("bfloat16", "lstm", 256, 1024, "gemm"),
    ("float32", "lstm", 16, 1100, "stepwise"),
    ("tf32", "lstm", 16, 1024, "persistent"),
    ("float64", "lstm", 1, 64, "stepwise"),
    ("float64", "lstm", 256, 1024, "gemm"),
    ("bfloat16", "gru_reset_before", 1, 64, "stepwise"),
    ("bfloat16", "gru_reset_before", 512, 1024, "gemm"),
    ("bfloat16", "lstm", 256, 4096, "gemm"),
    ("float32", "lstm", 512, 1024, "gemm"),
]


@pytest.mark.parametrize(("kind", "cell", "B", "H", "expected"), CHOICES, ids=str)
def test_choice(emulator, level, kind, cell, B, H, expected):
    level()
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    x = torch.empty((), dtype=DTYPES[kind]).expand(100, B, H)
    forward, backward = torch.ops.fastrnn.explain(x, cell, H, H, 1, False, True).splitlines()[1:]
    assert forward.startswith(f"  forward: {expected}, ")
    assert backward.startswith(f"  backward: {expected}, ")


@pytest.mark.parametrize(
    ("compute", "blocks"), [(90, "96 blocks of 16 units x 8 rows, 4 of 4 parts"), (100, "16 of 16")]
)
def test_blocks_share_k_where_that_was_measured(emulator, level, compute, blocks):
    """By themselves, of a chip that it was measured on; the tile says so by how few parts of K a block has."""
    level()
    emulator.set_chip(compute, 132, 227 << 10)
    x = torch.empty((), dtype=torch.bfloat16).expand(100, 16, 768)
    backward = torch.ops.fastrnn.explain(x, "lstm", 768, 768, 1, False, True).splitlines()[-1]
    assert blocks in backward


def test_blocks_of_both_directions_are_counted(emulator, level):
    level()
    x = torch.empty((), dtype=torch.bfloat16).expand(100, 8, 1024)
    for D in (1, 2):
        assert torch.ops.fastrnn.explain(x, "lstm", 1024, 1024, D, False, True).count(f" {64 * D} blocks of 16 ") == 2


@pytest.mark.parametrize("B", [1, 64, 600])
@pytest.mark.parametrize("kind", PERSISTENT_KINDS)
def test_the_fastest_by_the_model_is_chosen(emulator, level, kind, B):
    """Of what needs no Hopper and takes no turns; with many rows, blocks of few walk one group after another."""
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    emulator.set_chip(80, 132, 163 << 10)
    x = torch.empty((), dtype=DTYPES[kind]).expand(100, B, 504)

    def predicted(line, tile=None):  # in microseconds
        level(tile=tile)
        try:
            text = torch.ops.fastrnn.explain(x, "lstm", 504, 504, 1, False, True)
        except RuntimeError:  # the tile cannot take this layer
            return math.inf
        match = re.search(r" (\S+) us a step", text.splitlines()[line])
        return float(match[1]) if match else math.inf

    for line, count, turns, tile in zip((1, 2), TILES[kind], TURN_TILES, ("{},", ",{}"), strict=True):
        usual = [i for i in range(count + 1) if i not in turns]
        assert predicted(line) == min(predicted(line, tile.format(i)) for i in usual) < math.inf


def test_a_library_is_as_fast_as_its_flag_allows(emulator, level):
    """Products of TF32 are PyTorch's to make or not, whatever recurrent layers may do."""
    level()
    x = torch.empty(()).expand(100, 256, 1024)

    def explain():
        return torch.ops.fastrnn.explain(x, "lstm", 1024, 1024, 1, False, False)

    torch.backends.cudnn.allow_tf32 = True
    assert "gemm" not in explain()
    torch.backends.cuda.matmul.allow_tf32 = True
    assert "forward: gemm" in explain()
    torch.backends.cudnn.allow_tf32 = False
    assert "gemm" not in explain()
    level("gemm")
    with pytest.raises(RuntimeError, match="gemm kernel, but matrix products are of TF32 and recurrent layers may not"):
        explain()


def test_shared_memory_that_is_too_small_is_not_used(emulator, level):
    level()
    x = torch.empty((), dtype=torch.bfloat16).expand(100, 1, 2048)
    emulator.set_chip(86, 200, 99 << 10)
    assert "stepwise" in torch.ops.fastrnn.explain(x, "lstm", 2048, 2048, 1, False, False)
    assert "do not fit on the chip" in torch.ops.fastrnn.explain(x, "lstm", 2048, 2048, 1, False, False)


def test_chips_before_ampere_are_refused(emulator, level):
    level()
    emulator.set_chip(75, 40, 64 << 10)
    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0 or newer, got 7\.5"):
        make_case("lstm", 2, 2, 2, 4).run(ops.layer)


def test_groups_in_turns_are_for_those_who_ask(emulator, level):
    """Where the model says that they are faster, too."""

    def explain(B, H, tile=None):
        level(tile=tile)
        x = torch.empty((), dtype=torch.bfloat16).expand(100, B, H)
        lines = torch.ops.fastrnn.explain(x, "lstm", H, H, 1, False, True).splitlines()[1:]
        return lines, [float(re.search(r" (\S+) us a step", line)[1]) for line in lines]

    for B, H, tile, what in ((256, 512, "12,15", "128 blocks of 16 units x 32 rows"), (64, 768, "13,17", "96 blocks")):
        usual, times = explain(B, H)
        assert "in turns" not in "".join(usual)
        in_turns, times_in_turns = explain(B, H, tile)
        assert what in in_turns[1]
        assert all("2 groups of rows in turns" in line for line in in_turns)
        # Twice 350 cycles of 1900 a us: what two passes do not wait.
        assert times[1] - times_in_turns[1] == pytest.approx(0.37, abs=0.1)


@pytest.mark.parametrize(("B", "passes"), [(32, 1), (64, 2), (96, 3), (128, 4)])
def test_the_model_counts_the_passes_that_there_are(emulator, level, B, passes):
    """Of blocks with room for one pair of groups at a time."""
    emulator.set_chip(90, 32, 227 << 10)
    x = torch.empty((), dtype=torch.bfloat16).expand(100, B, 512)

    def predicted(tile):
        level(tile=tile)
        line = torch.ops.fastrnn.explain(x, "lstm", 512, 512, 1, False, True).splitlines()[1]
        return float(re.search(r" (\S+) us a step", line)[1])

    hidden = 0.184 * passes if passes > 1 else 0
    assert predicted("4,") - predicted("12,") == pytest.approx(hidden, abs=0.1)
