"""`make docs`: built strictly, without a network, it loads nothing from elsewhere and has all that is public."""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

import fastrnn

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).resolve().parents[2]
NO_NETWORK = """
import socket, sys
def refuse(*_):
    raise OSError("the documentation is built without a network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from mkdocs.__main__ import cli
cli()
"""


class Page(HTMLParser):
    """The ids of a page, its links, what it loads, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("rel") != "canonical":
            self.loads.append(attrs["href"])
        elif "src" in attrs:
            self.loads.append(attrs["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", NO_NETWORK, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_links_lead_somewhere(site, pages):
    """Those within the site, with their anchors."""
    bad, count = [], 0
    for path, page in pages.items():
        if path.name == "404.html":  # whose links start from the address of the site
            continue
        for link in page.links + page.loads:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            is_there = target.exists() and target.is_relative_to(site)
            if not is_there or (anchor and target in pages and anchor not in pages[target].ids and anchor != "__toc"):
                bad.append(f"{path.relative_to(site)}: {link}")
    assert count > 500
    assert not bad


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = [load for page in pages.values() for load in page.loads]
    assert not [load for load in loads if urlparse(load).netloc]
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", style.read_text())
        assert "@import" not in style.read_text()


def test_readme_is_there_and_its_plots(site):
    """Parts of README.md stand on the pages."""
    text = (site / "speed.html").read_text()
    assert "48,48,300,600" in text
    assert "<!-- README" not in "".join(path.read_text() for path in site.rglob("*.html"))
    assert len(list((site / "results").glob("*.png"))) == len(list((ROOT / "benchmarks/results").glob("*.png")))


def public() -> list[set[str]]:
    """The names of every class and function that a user may ask for: the short one, and that of where it is defined."""
    names = []
    for module in (fastrnn, importlib.import_module("fastrnn.reservoir")):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                names.append((f"{module.__name__}.{name}", value))
                continue
            listed = getattr(value, "__all__", None) or [key for key in vars(value) if not key.startswith("_")]
            members = {key: getattr(value, key) for key in listed}
            names += [
                (f"{value.__name__}.{key}", member)
                for key, member in members.items()
                if (inspect.isclass(member) or inspect.isfunction(member)) and member.__module__ == value.__name__
            ]
    return [{name, f"{value.__module__}.{value.__qualname__}"} for name, value in names]


def test_every_class_and_function_is_there(pages):
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "reference"))
    found = public()
    assert len(found) > 60
    assert not [names for names in found if not names & ids]


def test_equations_are_drawn(site):
    """No page shows the source of an equation."""
    for path in (site / "reference").glob("*.html"):
        text = path.read_text()
        assert ":math:" not in text
        assert ".. math::" not in text
        assert not re.search(r"<m(i|o|text)[^>]*>[^<]*\\", text)
    assert (site / "reference" / "layers.html").read_text().count("<math") > 5


def test_make_has_the_target():
    assert (
        shutil.which("make") is None
        or "make docs" in subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
