"""Every block of Python in README.md and docs/ runs, and prints what the page says that it prints.

The blocks of a page run in order, in one namespace, in an empty folder. What a page needs that is not among the
dependencies of `dev` stands in a comment above the block, `<!-- needs: module, ... -->`: without it the page's test is
skipped, and says so. A block of text right after one of Python is what that prints.
"""

import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
BLOCK = re.compile(  # in a list it is indented
    r"(?:^ *<!-- needs: (?P<needs>.+?) -->\n+)?^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```\n",
    re.MULTILINE | re.DOTALL,
)
PRINTS = re.compile(r"\s*```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
ANY = re.compile(r"^( *)```(.*)\n(?:.*\n)*?\1```$", re.MULTILINE)


def blocks(page: str) -> list[tuple[str, list[str], str | None, int]]:
    """Code, what it needs, what it prints, and its line, of each block."""
    text = (ROOT / page).read_text()
    found = []
    for block in BLOCK.finditer(text):
        prints = PRINTS.match(text, block.end())
        needs = block["needs"].split(", ") if block["needs"] else []
        line = text[: block.start("code")].count("\n")
        found.append((textwrap.dedent(block["code"]), needs, prints and prints[1], line))
    return found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, and settings of torch's, logging's and matplotlib's that are as before after the test."""
    monkeypatch.chdir(tmp_path)
    threads, level = torch.get_num_threads(), logging.getLogger("fastrnn").level
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    logging.getLogger("fastrnn").setLevel(level)
    assert torch.is_grad_enabled()


def prepare_readme() -> dict:
    """What README's block on Keras speaks of: a file, and a masked batch."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    inputs = keras.Input((None, 32))
    keras.Model(inputs, keras.layers.LSTM(8, name="encoder")(inputs)).save("model.keras")
    return {"mask": torch.ones(8, 100, dtype=torch.bool)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_run(page, alone):
    given = prepare_readme() if page == "README.md" else {}
    module = types.ModuleType("page")  # of this name, so that a cell of the page's can be found again
    sys.modules["page"] = module
    missing = set()
    try:
        for code, needs, prints, line in blocks(page):
            lacking = {name for name in needs if not _is_there(name)}
            missing |= lacking
            if lacking:
                continue
            vars(module).update(given)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + code, str(ROOT / page), "exec"), vars(module))
            if prints is not None:
                assert out.getvalue() == prints, f"{page}, line {line}"
    finally:
        del sys.modules["page"]
    if missing:
        pytest.skip(f"blocks that need {', '.join(sorted(missing))} did not run; `make clients` runs them")


def _is_there(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """A language that this file knows to run or not to run: no code stands there untried by an oversight."""
    opened = [found[2] for found in ANY.finditer((ROOT / page).read_text())]
    assert set(opened) <= {"python", "sh", "text"}
    assert len(blocks(page)) == opened.count("python")


def test_readme_and_most_pages_have_code():
    assert "README.md" in WITH_CODE
    assert len(WITH_CODE) > 10
