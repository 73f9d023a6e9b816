"""What the machine code of the persistent CUDA kernels says of a pass; no GPU is needed.

usage: python -m benchmarks.machine_code library [--cells lstm gru]

Prints a row of CSV for each kernel whose blocks wait for each other's numbers in memory: registers, bytes of stack, and
of its time loop
  to_poll       instructions from the head of a pass to its first poll,
  to_publish    from its last poll to the last store that others wait for,
  instructions  all that there are, and of these `products` on tensor cores, for so many `passes`: one, or two of groups
                of rows that take turns,
  early_waits   loads of inputs that are waited for between that store and the products of the next pass.
The first is counted on the shortest way, rows of one length without resets; the second on the longest, less waiting.
With two passes, `to_poll` is that of the first, `to_publish` the longer one. Of `early_waits` there should be none:
whatever is under way when a pass begins to poll may be waited for with the polls. A warp has six scoreboards for all
that it loads, the polls take four or more of them, and a scoreboard counts, it does not name.

cuobjdump is a program of the CUDA toolkit, and Triton brings it along. What an instruction waits for stands in its
upper half, which NVIDIA does not document: Jia et al., Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking, 2018.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

NO_SCOREBOARD = 7
PLACE = re.compile(r"^arch = (\w+)|^\s*Function : (\w+)")
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/\s*$")
BRANCH = re.compile(r"\b(?:BRA|CALL\.REL)(?:\.\w+)* .*?0x([0-9a-f]+)$")
STEPWISE = re.compile(r"(?:Mma|Fma)Product\w+?ES\w*_Li0E")  # mangled: a product of no resident slices
POLL = "LDG.E.128.STRONG.GPU"
PUBLISH = re.compile(r"\bSTG\.E(\.\w+)*\.STRONG\.GPU")
KERNEL = re.compile(
    r"run_steps<(?P<pass_>Forward|Backward)Step<(?P<cell>\w+), (?P<type>\w+), \(\w+\)0, "
    r"Tile<(?P<units>\d+), (?P<rows>\d+), (?P<turns>\d+)>\s?>, "
    r"(?P<product>\w+)Product<[^<]*(?:Tile<[^>]*>, )(?P<parameters>[^>]*)>"
)


@dataclass
class Instruction:
    """One of a kernel."""

    address: int
    text: str
    sets: int  # the scoreboard that says when it has written
    waits: int  # a bit for each scoreboard that it waits for

    @property
    def target(self) -> int | None:
        """Where a branch goes; one that leaves lanes that have lost each other goes nowhere."""
        found = BRANCH.search(self.text)
        return int(found[1], 16) if found and "BRA.DIV" not in self.text else None

    @property
    def falls_through(self) -> bool:
        return not re.fullmatch(r"(BRA|CALL\.REL\.NOINC) 0x\w+|EXIT", self.text)

    def goes_back(self, to: "Instruction") -> bool:
        """Whether it branches to where another one is, or before it."""
        return self.target is not None and self.target <= to.address

    @property
    def loads_input(self) -> bool:
        """Whether it loads from memory, and is no poll, no look at what other blocks say, and no byte of resets.

        Those are in branches of their own, for layers with resets.
        """
        return "LDG." in self.text and not re.search(r"STRONG|\.U8", self.text) and self.sets != NO_SCOREBOARD


@dataclass
class Pass:
    """What there is to say of a kernel's time loop."""

    to_poll: int
    to_publish: int
    instructions: int
    products: int
    passes: int
    early_waits: str  # addresses of loads, hexadecimal


def functions(lines: Iterable[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(architecture, mangled name, its lines) of each function that `cuobjdump -sass` prints."""
    architecture = name = ""
    body: list[str] = []
    for line in lines:
        if "/*" in line:
            body.append(line)
        elif place := PLACE.search(line):
            if name:
                yield architecture, name, body
            architecture, name, body = place[1] or architecture, place[2] or "", []
    if name:
        yield architecture, name, body


def parse(lines: list[str]) -> list[Instruction]:
    """The instructions of a function; each has two lines, the second with the upper half of its encoding."""
    found = []
    for line, after in pairwise(lines):
        if instruction := INSTRUCTION.match(line):
            control = int(ENCODING.findall(after)[0], 16) >> 41
            found.append(Instruction(int(instruction[1], 16), instruction[2], control >> 5 & 7, control >> 11 & 63))
    return found


def time_loop(code: list[Instruction]) -> range:
    """The smallest loop with a poll and, after it, a barrier of the block; empty if there is none."""
    best = range(0)
    places = {instruction.address: i for i, instruction in enumerate(code)}
    end = max((i for i, instruction in enumerate(code) if instruction.text.endswith("EXIT")), default=0)
    for i in range(end):  # behind it, lanes that have lost each other find together
        if not code[i].goes_back(code[i]):
            continue
        loop = range(places[code[i].target or 0], i + 1)
        polls = [j for j in loop if POLL in code[j].text]
        has_barrier = polls and any("BAR.SYNC" in code[j].text for j in range(polls[0], i))
        if has_barrier and (not best or len(loop) < len(best)):
            best = loop
    return best


def way(code: list[Instruction], begin: int, end: int, *, longest: bool) -> list[int]:
    """The instructions from one to another, without that, where each branch forward goes the longer or shorter way."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    length, following = {end: 0}, {end: end}
    for i in reversed(range(begin, end)):
        after = [i + 1] if code[i].falls_through else []
        target = places.get(code[i].target or 0, 0)
        after = [j for j in (*after, target) if j > i and j in length]
        if after:
            following[i] = (max if longest else min)(after, key=length.__getitem__)
            length[i] = length[following[i]] + 1
    found = []
    while begin != end:
        found.append(begin)
        begin = following[begin]
    return found


@dataclass
class Turn:
    """Instructions of a pass in the loop: its polls, and the last store that others wait for."""

    polls: list[int]
    publish: int


def turns(code: list[Instruction], loop: range) -> list[Turn]:
    """The passes in the loop: one, or two where groups of rows take turns."""
    found: list[Turn] = []
    polls: list[int] = []
    barrier = 0
    for i in loop:
        if POLL in code[i].text:
            if found and barrier and found[-1].publish > barrier:
                polls, barrier = [], 0
            polls.append(i)
        elif "BAR.SYNC" in code[i].text and polls and not barrier:
            barrier = i
            found.append(Turn(list(polls), 0))
        elif barrier and PUBLISH.search(code[i].text):
            found[-1].publish = i
    return found


def cycle(code: list[Instruction], loop: range, passes: list[Turn]) -> tuple[list[int], set[int]]:
    """Once around the loop, and which places on this way lie between a store and the arrival of what is polled next."""
    around: list[int] = []
    places: set[int] = set()
    for turn, before in zip(passes, [passes[-1], *passes], strict=False):
        begin, first, last = len(around), turn.polls[0], turn.polls[-1]
        if before.publish > first:
            around += way(code, before.publish, loop[-1], longest=True) + way(code, loop[0], first, longest=False)
        else:
            around += way(code, before.publish, first, longest=True)
        rest = way(code, first, turn.publish, longest=True)
        barrier = next(i for i in range(last, turn.publish) if "BAR.SYNC" in code[i].text)
        again = next((i for i in range(last, barrier) if code[i].goes_back(code[first])), last)
        around += rest
        places |= set(range(begin, len(around) - sum(i > again for i in rest)))
    return around, places


def describe(name: str, lines: list[str]) -> Pass | None:
    """What a function does in a pass, or None if it is no kernel that polls memory."""
    if "run_steps" not in name or STEPWISE.search(name):
        return None
    code = parse(lines)
    loop = time_loop(code)
    if not loop:
        return None
    passes = turns(code, loop)
    around, early_places = cycle(code, loop, passes)
    early = []
    for place, i in enumerate(around):
        if code[i].loads_input:
            after = [*range(place + 1, len(around)), *range(place + 1)]
            waiter = next((j for j in after if code[around[j]].waits >> code[i].sets & 1), None)
            if waiter in early_places:
                early.append(code[i].address)
    return Pass(
        to_poll=len(way(code, loop[0], passes[0].polls[0], longest=False)),
        to_publish=max(len(way(code, turn.polls[-1], turn.publish, longest=True)) for turn in passes),
        instructions=len(loop),
        products=sum("HMMA." in code[i].text or "HGMMA." in code[i].text for i in loop),
        passes=len(passes),
        early_waits=" ".join(f"{address:x}" for address in early),
    )


def output(*arguments: str | Path) -> Iterator[str]:
    """What cuobjdump prints, line by line: there are millions."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    program = shutil.which("cuobjdump") or bundled
    if not Path(program).is_file():
        raise SystemExit("There is no cuobjdump here.")
    with subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise SystemExit(f"This failed: {program} {' '.join(map(str, arguments))}")


def resources(lines: Iterable[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """(architecture, mangled name) -> registers and bytes of stack, as `cuobjdump -res-usage` prints them."""
    found, architecture, name = {}, "", ""
    for line in lines:
        if place := re.search(r"^arch = (\w+)|^\s*Function (\w+):", line):
            architecture, name = place[1] or architecture, place[2] or name
        elif usage := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[architecture, name] = int(usage[1]), int(usage[2])
    return found


def readable(names: list[str]) -> list[str]:
    """Mangled ones, without namespaces and parameters."""
    process = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return re.sub(r"fastrnn::(cuda::)?|^void |(?<=>)\(.*", "", process.stdout, flags=re.MULTILINE).splitlines()


def tile_of(kernel: re.Match[str]) -> str:
    """Units x rows of a block, slices of K / those in registers, and whose product it is, as tile_shapes.h has them."""
    numbers = kernel["parameters"].split(", ")
    tile = f"{kernel['units']}x{kernel['rows']} {numbers[0]}"
    if kernel["product"] == "Mma":
        tile += f"/{numbers[1]}" + (f" split {numbers[3]}" if numbers[3] != "1" else "")
    elif kernel["product"] == "Wgmma":
        tile += " wgmma" + (f" split {numbers[1]}" if numbers[1] != "1" else "")
    return tile + (" in turns" if kernel["turns"] != "1" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--cells", nargs="*", default=["lstm", "gru"])
    options = parser.parse_args()
    usage = resources(output("-res-usage", options.library))
    found = []
    for architecture, name, lines in functions(output("-sass", options.library)):
        if described := describe(name, lines):
            found.append((architecture, name, described))
    rows = []
    for (architecture, name, described), text in zip(found, readable([name for _, name, _ in found]), strict=True):
        kernel = KERNEL.search(text)
        if not kernel or kernel["cell"].lower() not in options.cells:
            continue
        registers, stack = usage[architecture, name]
        head = [architecture, kernel["pass_"].lower(), kernel["cell"].lower(), kernel["type"].lower(), tile_of(kernel)]
        rows.append([*head, registers, stack, *asdict(described).values()])
    columns = ["architecture", "pass", "cell", "type", "tile", "registers", "stack", *(f.name for f in fields(Pass))]
    csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *sorted(rows)])


if __name__ == "__main__":
    main()
