"""CUDA kernels of cells that are compiled when they are first used, run by the emulator, against the reference: several
states, unit weights, masks, gates without one of the two products, no recurrent product at all.
"""

import pytest
import torch
from cases import ROWS, make_case
from emulated import DTYPES, KINDS, compare, prepare, run
from emulator import add_kernels
from own_cells import OWN, given_much, of_options, two_stages, two_states

from fastrnn import compiler, ops, reference
from fastrnn.cells import CELLS
from fastrnn.schema import SIZES

OPTIONS = of_options()
CPU_ALONE = [name for name in CELLS if SIZES[name]["is_normalized"]]
ADDED = [name for name, cell in CELLS.items() if not cell.has_all_kernels and name not in [*OPTIONS, *CPU_ALONE]]
SCANNED = [name for name in ADDED if not SIZES[name]["first_gates"]]
MULTIPLIED = [name for name in ADDED if name not in SCANNED]
# All that the kernels of one launch meet: three states and more, unit weights, masks, and gates without a product.
PERSISTENT = ["slstm", two_states.name, given_much.name]
VARIANTS = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3, "tf32": 4}  # of csrc/cuda/kernels.h


@pytest.fixture(autouse=True)
def added(emulator, monkeypatch):
    """What compiles kernels for the CPU compiles them for the emulator."""

    def prepare(cell, dtype, rounded=None):
        is_tf32 = dtype == ops.DTYPES[torch.float32] and torch.backends.cudnn.allow_tf32
        add_kernels(cell, VARIANTS["tf32"] if is_tf32 else dtype)
        return True

    monkeypatch.setattr(compiler, "prepare", prepare)
    return emulator


def test_list_of_cells():
    assert {"slstm", "mingru", "jordan"} | {cell.name for cell in OWN} <= set(ADDED)
    assert {"sru", "mingru", "indrnn"} <= set(SCANNED)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("cell", MULTIPLIED)
def test_stepwise(level, cell, rows, D):
    level("stepwise")
    compare(make_case(cell, 4, 5, 3, 10, D=D, seed=D, **rows), "float64")


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("cell", MULTIPLIED)
def test_gemm(level, unwritten_is_nan, cell, rows):
    level("gemm")
    compare(make_case(cell, 4, 11, 3, 40, D=2, **rows), "float64")


@pytest.mark.parametrize(
    ("cell", "kind"), [*(("mingru", kind) for kind in KINDS), ("indrnn", "bfloat16"), ("diagonal", "bfloat16")]
)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_scan(level, unwritten_is_nan, cell, rows, kind):
    """More steps than are loaded at once, a row of units that is no multiple of 8, more than one block of each kind."""
    level()
    compare(make_case(cell, 7, 11, 3, 37, D=2, **rows), kind)


@pytest.mark.parametrize("size", [(0, 2, 3, 16), (3, 0, 3, 16), (1, 1, 1, 1), (9, 33, 0, 72)], ids=str)
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("cell", SCANNED)
def test_sizes_of_scans(level, unwritten_is_nan, cell, states, size):
    level("scan")
    compare(make_case(cell, *size, D=2, states=states, bias=states, lengths=True, resets=True), "float64")


def test_scan_is_one_launch(emulator, level):
    level()
    case = make_case("mingru", 9, 2, 3, 16)

    def launches():
        return sum(count for name, count in emulator.launches().items() if "scan_steps" in name)

    before = launches()
    run(case, "float64")
    assert launches() == before + 2  # forward and backward


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("cell", PERSISTENT)
def test_persistent(level, cell, rows, kind):
    level("persistent")
    compare(make_case(cell, 4, 5, 3, 10, D=2, **rows), kind)


@pytest.mark.parametrize("seed", [0, 1])  # masks of every step, and the same in all
@pytest.mark.parametrize("tile", ["1,1", "4,4"])  # stepwise and persistent
def test_several_rows_of_a_thread(level, tile, seed):
    level(tile=tile)
    case = make_case(given_much.name, 4, 35, 3, 10, D=2, lengths=True, resets=True, seed=seed)
    compare(case, "bfloat16")


# Of a cluster, products of warpgroups, split sums, groups in turns.
@pytest.mark.parametrize(
    ("tile", "refused"), [("8", 8), ("10,14", 10), ("2,11", 11), ("12,2", 12), ("13,2", 13), ("2,15", 15)]
)
def test_variants_are_of_the_built_in_cells_alone(level, tile, refused):
    level(tile=tile)
    with pytest.raises(RuntimeError, match=f"tile {refused} cannot take this layer on this device"):
        run(make_case("slstm", 4, 11, 3, 40), "bfloat16")


@pytest.mark.parametrize("level_name", ["stepwise", "gemm"])
def test_projection(level, level_name):
    level(level_name)
    compare(make_case("slstm", 4, 5, 3, 24, P=16, D=2, lengths=True, resets=True), "float64")


@pytest.mark.parametrize("cell", ["slstm", "mingru", two_stages.name, given_much.name])
def test_recompute(level, cell):
    level()
    case = prepare(make_case(cell, 5, 3, 4, 6, D=2, lengths=True, resets=True), "float64", requires_grad=True)

    def layer(*args):
        return ops.layer(*args, recompute=True)

    for a, b in zip(case.outputs_and_grads(layer), case.outputs_and_grads(ops.layer), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_masks(level, seed):
    """Of every step, and the same in all."""
    level()
    case = make_case(given_much.name, 4, 3, 4, 6, D=2, seed=seed)
    assert case.masks.shape[1] == (1 if seed else 4)
    compare(case, "float64")


@pytest.mark.parametrize("level_name", ["stepwise", "gemm"])
@pytest.mark.parametrize("cell", OPTIONS)
def test_cells_of_options(level, cell, level_name):
    """With a bound of a state, and with noise: states and masks that the cell of the same gates does not have."""
    level(level_name)
    compare(make_case(cell, 4, 5, 3, 16, D=2, lengths=True, resets=True), "float64")


def test_missing_kernels_are_an_error(monkeypatch):
    case = prepare(make_case("qrnn", 2, 2, 3, 4), "float16")
    monkeypatch.setattr(compiler, "prepare", lambda *args: True)
    with pytest.raises(RuntimeError, match=r"cell qrnn: this process has no kernels of the GPU for float16"):
        case.run(ops.layer)


def test_wrong_levels_are_errors(level):
    for name, cell, why in (
        ("stepwise", "mingru", "the cell has no recurrent product"),
        ("persistent", "mingru", "the cell has no recurrent product"),
        ("scan", "mgu", "the cell has recurrent products"),
    ):
        level(name)
        with pytest.raises(RuntimeError, match=f"asks for a {name} kernel, but {why}"):
            run(make_case(cell, 2, 2, 3, 4), "float64")


def test_explanation(level):
    level()
    add_kernels("mingru", VARIANTS["bfloat16"])
    x = torch.empty((), dtype=DTYPES["bfloat16"]).expand(100, 64, 512)
    lines = torch.ops.fastrnn.explain(x, "mingru", 512, 512, 1, False, True).splitlines()[1:]
    for line, direction in zip(lines, ("forward", "backward"), strict=True):
        assert line.startswith(
            f"  {direction}: scan, one launch for all steps, without products: 128 blocks of 32 units"
        )
        assert line.endswith("because the cell has no recurrent product")


@pytest.mark.parametrize("seed", range(20))
def test_random_layers(level, seed):
    """Any cell, any option, in float64."""
    level()
    random = torch.Generator().manual_seed(seed)

    def draw(most, least=0):
        return int(torch.randint(least, most + 1, (), generator=random))

    cell = ADDED[draw(len(ADDED) - 1)]
    options = {name: bool(draw(1)) for name in ("bias", "states", "lengths", "resets")}
    compare(make_case(cell, draw(6, 1), draw(12), draw(5), draw(40, 1), D=draw(2, 1), seed=seed, **options), "float64")
    assert cell in reference.CELLS
