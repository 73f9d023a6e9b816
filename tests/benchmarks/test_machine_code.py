"""benchmarks/machine_code.py on code that was made up; tests/cuda_build has the kernels themselves."""

from benchmarks import machine_code
from benchmarks.machine_code import NO_SCOREBOARD

HEAD = ["arch = sm_90a", "\tcode for sm_90", "\t\tFunction : run_steps"]


def listing(*code):
    """As cuobjdump prints it; of each instruction its text, the scoreboard it sets, or None, and those it waits for."""
    lines = list(HEAD)
    for i, (text, sets, *waits) in enumerate(code):
        board = NO_SCOREBOARD if sets is None else sets
        control = board << 5 | NO_SCOREBOARD << 8 | sum(1 << wait for wait in waits) << 11
        lines.append(f"        /*{16 * i:04x}*/   {text} ;   /* 0x0000000000007947 */")
        lines.append(f"                           /* 0x{control << 41:016x} */")
    return lines


def loop(*, poll_shares=3, waits=(5,), late_waits=(), head="0x20"):
    """A pass: something to do with lengths, polls, products, an input, a barrier, the store that others wait for."""
    return listing(
        ("S2R R0, SR_TID.X", 0),
        ("MOV R1, R2", None),
        ("@!P0 BRA 0x40", None),  # the head
        ("VOTE.ANY R3, PT, P1", None),
        ("LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64]", 2),
        ("@P0 LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64+0x200]", poll_shares),
        ("ISETP.NE.AND P1, PT, R4, -0x1, PT", None, 2, poll_shares),
        ("@P1 BRA 0x40", None),
        ("HMMA.16816.F32.BF16 R12, R16, R4, RZ", None),
        ("LDG.E.U16 R20, desc[UR4][R6.64]", 5),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", None),
        ("IMAD.U32 R21, R20, 0x10000, RZ", None, *waits),
        ("STG.E.STRONG.GPU desc[UR4][R8.64], R21", None),
        ("MOV R22, R20", None, *late_waits),
        (f"@!P2 BRA {head}", None),
        ("EXIT", None),
    )


def of(lines):
    ((architecture, name, body),) = machine_code.functions(lines)
    assert (architecture, name) == ("sm_90a", "run_steps")
    return machine_code.describe(name, body)


def test_a_pass_is_counted():
    found = of(loop())
    assert found.instructions == 13
    assert found.products == 1
    assert found.passes == 1
    assert found.to_poll == 1  # the vote is skipped
    assert found.to_publish == 7
    assert found.early_waits == ""


def test_loads_that_are_waited_for_too_early():
    assert of(loop(waits=(), late_waits=(5,))).early_waits == "90"  # after the store
    assert of(loop(waits=(), poll_shares=5)).early_waits == "90"  # with the polls of the next pass
    assert of(loop(waits=())).early_waits == ""  # nobody waits


def taking_turns(*, first_waits=(5,), second_polls=2, more=()):
    """Two passes in a loop, of two groups; the second without inputs."""
    return listing(
        ("MOV R1, R2", None),
        ("LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64]", 2),  # the head
        ("ISETP.NE.AND P1, PT, R4, -0x1, PT", None, 2),
        ("@P1 BRA 0x10", None),
        ("LDG.E.U16 R20, desc[UR4][R6.64]", 5),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", None),
        ("IMAD.U32 R21, R20, 0x10000, RZ", None, *first_waits),
        ("STG.E.STRONG.GPU desc[UR4][R8.64], R21", None),
        ("LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64+0x400]", second_polls),
        ("ISETP.NE.AND P1, PT, R4, -0x1, PT", None, second_polls),
        ("@P1 BRA 0x80", None),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", None),
        *more,
        ("STG.E.STRONG.GPU desc[UR4][R8.64+0x400], R21", None),
        ("@!P2 BRA 0x10", None),
        ("EXIT", None),
    )


def test_groups_in_turns_have_two_passes():
    found = of(taking_turns(more=3 * [("MOV R21, R1", None)]))
    assert (found.to_poll, found.to_publish, found.instructions, found.passes) == (0, 7, 16, 2)
    assert found.early_waits == ""
    assert of(taking_turns(first_waits=(), second_polls=5)).early_waits == "40"  # with the polls of the other group
    assert of(taking_turns(first_waits=(), more=[("MOV R21, R20", None, 5)])).early_waits == ""


def test_code_without_polls_has_no_pass():
    assert of(listing(("MOV R1, R2", None), ("BAR.SYNC 0x0", None), ("BRA 0x0", None))) is None


def test_a_loop_around_the_polls_alone_is_no_pass():
    assert of(loop(head="0xd0")) is None


def test_resources():
    said = ["arch = sm_80", " Function run_steps:", "  REG:232 STACK:8 SHARED:1024 LOCAL:0", "arch = sm_90a"]
    assert machine_code.resources([*said, " Function run_steps:", "  REG:240 STACK:0"]) == {
        ("sm_80", "run_steps"): (232, 8),
        ("sm_90a", "run_steps"): (240, 0),
    }


def test_tiles_are_read_from_the_kernels_names():
    step = "void run_steps<BackwardStep<Lstm, BFloat16, (BackwardPhase)0, Tile<16, 8, 1> >, "
    names = {
        "MmaProduct<BFloat16, 64, Tile<16, 8, 1>, 8, 4, false, 4> >": "16x8 8/4 split 4",
        "MmaProduct<BFloat16, 16, Tile<16, 8, 1>, 16, 16, false, 1> >": "16x8 16/16",
        "WgmmaProduct<BFloat16, Tile<16, 8, 1>, 2, 1> >": "16x8 2 wgmma",
        "FmaProduct<float, 32, Tile<16, 8, 1>, 2> >": "16x8 2",
    }
    assert {end: machine_code.tile_of(machine_code.KERNEL.search(step + end)) for end in names} == names
    in_turns = (step + "MmaProduct<BFloat16, 64, Tile<16, 8, 1>, 8, 4, false, 1> >").replace("8, 1>", "8, 2>")
    assert machine_code.tile_of(machine_code.KERNEL.search(in_turns)) == "16x8 8/4 in turns"
