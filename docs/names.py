"""Links from names of fastrnn's to where docs/reference tells of them."""

import re
from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
NAME = re.compile(r"(?<![\[`])`(fastrnn(?:\.\w+)+)`(?!`)")
FENCE = re.compile(r"^( *```.*?^ *```)$", re.MULTILINE | re.DOTALL)


def targets() -> dict[str, str]:
    """By the name that a user writes, that of what is told there; the same but for what is defined elsewhere."""
    listed = [name for page in REFERENCE.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    short = {f"fastrnn.{name.rpartition('.')[2]}": name for name in listed if name.count(".") == 2}
    of_modules = {f"fastrnn.{name}" for name in ("init", "legendre", "reservoir")}
    short = {key: name for key, name in short.items() if name.rpartition(".")[0] not in of_modules}
    methods = {f"{name}.{method}" for name in ("fastrnn.LSTM", "fastrnn.Recurrent") for method in ("forward", "stream")}
    methods |= {"fastrnn.Stream.reset", "fastrnn.Stream.state", "fastrnn.functional.rnn", "fastrnn.ops.layer"}
    methods |= {"fastrnn.ops.PackedLayers", "fastrnn.reference.layer_with_states", "fastrnn.ops.prepare"}
    return short | {name: name for name in {*listed, *methods}}


TARGETS = targets()


def linked(text: str) -> str:
    """Markdown in which such names are links, but for those in blocks of code and in headings."""

    def link(found):
        return f"[`{found[1]}`][{TARGETS[found[1]]}]" if found[1] in TARGETS else found[0]

    parts = FENCE.split(text)
    for index in range(0, len(parts), 2):
        lines = parts[index].split("\n")
        parts[index] = "\n".join(line if line.startswith("#") else NAME.sub(link, line) for line in lines)
    return "".join(parts)
