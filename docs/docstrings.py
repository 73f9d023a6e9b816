"""How the docstrings become pages: equations as MathML, the sections' names, links to what is named."""

import re
import sys
from pathlib import Path

import griffe
from latex2mathml.converter import convert

sys.path.append(str(Path(__file__).parent))
from names import linked

ATTRIBUTES = re.compile(r"^( *)Attributes( \(.*\))?:\n((?:\1 {4}.*\n|\n(?=\1 {4}))+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math::(.*\n(?:(?:\1 +.*)?\n)*)", re.MULTILINE)


def mathml(latex: str, display: str) -> str:
    """Browsers draw it without a script."""
    if "&" in latex.replace(r"\begin{cases}", "\n").split("\n", 1)[0]:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    return convert(latex.replace(r"\_", "_"), display=display).replace("\n", " ")


def rendered(text: str) -> str:
    """A docstring as Markdown."""
    text = re.sub(r"^( *)Keyword-only:$", r"\1Keyword Args:", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)Args, .*:$", r"\1Args:", text, flags=re.MULTILINE)

    text = ATTRIBUTES.sub(listed, text + "\n")

    def block(found):
        latex = " ".join(line.strip() for line in found[2].splitlines()).strip()
        return f'{found[1]}<div class="equation">{mathml(latex, "block")}</div>\n\n'

    text = BLOCK.sub(block, text + "\n").rstrip()
    text = INLINE.sub(lambda found: mathml(found[1].replace("\\\\", "\\"), "inline"), text)
    return linked(text)


def listed(found) -> str:
    """A section of attributes as a list: several names may share a line, which Griffe's own section has no form for."""
    indent, more, items = found[1], found[2] or "", []
    for line in found[3].splitlines():
        if re.match(rf"{indent} {{4}}\S", line):
            names, _, what = line.strip().partition(": ")
            names = names if "`" in names else ", ".join(f"`{name}`" for name in names.split(", "))
            items.append(f"{indent}- {names}: {what}")
        elif line.strip():
            items.append(f"{indent}    {line.strip()}")
    return f"{indent}**Attributes**{more}\n\n" + "\n".join(items) + "\n\n"


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = rendered(obj.docstring.value)
