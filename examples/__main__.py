"""The recurrent systems of the lectures, each as a program that shows what its lecture shows.

python -m examples --list
python -m examples NAME [--effort E] [--out DIR]
python -m examples --all [--effort E] [--out DIR]

A plot is left under examples/out; docs/gallery.md shows them all, docs/lectures.md says which lectures are meant.
Needs what `pip install "fastrnn[examples]"` installs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem[0] != "_")


def first_line(name: str) -> str:
    """Of an example's docstring, without importing what the example needs."""
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())).partition("\n")[0]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m examples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help="one of those that --list shows")
    parser.add_argument("--list", action="store_true", help="name all examples")
    parser.add_argument("--all", action="store_true", help="run one after the other")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the steps of training (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the plots (default: examples/out)")
    arguments = parser.parse_args()
    if arguments.list:
        width = max(map(len, NAMES))
        print("\n".join(f"{name:{width}}  {first_line(name)}" for name in NAMES))
        return
    if (arguments.name is None) != arguments.all:
        parser.error("expected --list, --all or the name of an example")
    if not 0 < arguments.effort <= 100:
        parser.error(f"--effort: expected a number above 0 and up to 100, got {arguments.effort}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder, or where one can be made: {error}")
    if arguments.all:  # each in a process of its own, whose settings and threads are no other's
        options = ["--effort", str(arguments.effort), "--out", str(arguments.out)]
        for name in NAMES:
            subprocess.run([sys.executable, "-m", "examples", name, *options], check=True)
    else:
        run(arguments.name, arguments.effort, arguments.out)


def run(name: str, effort: float, out: Path):
    example = importlib.import_module(f"examples.{name}")
    print(inspect.getdoc(example), end="\n\n")
    begin = time.perf_counter()
    example.main(effort, out)
    print(f"\n{time.perf_counter() - begin:.0f} s; plot in {out / name}.png")


if __name__ == "__main__":
    main()
