"""What `make docs` adds to the pages: parts of README.md, its plots, and links to the reference."""

import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.append(str(Path(__file__).parent))
from names import linked

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^<!-- README: (.+?)(?:, before: (.+))? -->$", re.MULTILINE)
HEADING = re.compile(r"^(#{2,3}) (.+)$", re.MULTILINE)


def section(title: str) -> str:
    """What stands in README.md under a heading, with the headings below it."""
    text = (ROOT / "README.md").read_text()
    headings = list(HEADING.finditer(text))
    for number, found in enumerate(headings):
        if found[2] == title:
            after = (other.start() for other in headings[number + 1 :] if len(other[1]) <= len(found[1]))
            return text[found.end() : next(after, len(text))].strip()
    raise PluginError(f"README.md has no heading {title!r}")


def on_files(files, config):
    """The plots of benchmarks/results."""
    for plot in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, **_):
    """`<!-- README: heading, before: text -->` becomes that part of README.md, up to the text if there is one."""
    up = "../" * page.file.src_uri.count("/")

    def included(found):
        text = section(found[1])
        if found[2]:
            if found[2] not in text:
                raise PluginError(f"README.md has no {found[2]!r} under {found[1]!r}")
            text = text[: text.index(found[2])]
        text = re.sub(r"\]\(benchmarks/results/", f"]({up}results/", text)
        return re.sub(r"\]\(docs/", f"]({up}", text)

    return linked(INCLUDE.sub(included, markdown))


def on_page_content(html, **_):
    """A result without a type has no dash in front of it."""
    return re.sub(r'(<li class="doc-section-item field-body">)\s*\u2013', r"\1", html)
