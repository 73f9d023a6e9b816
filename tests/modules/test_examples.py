"""The programs in examples/, as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_own_cell():
    """It compares its layer with its loop, and fails if they differ; the cell takes less than 20 lines."""
    out = run("own_cell.py", "--steps", "40")
    assert re.search(r"loss: 0\.\d+ at first, 0\.\d+ after 40 steps", out)
    assert re.search(r"the loop \d+\.\d ms, \d+\.\d times as long", out)
    source = (EXAMPLES / "own_cell.py").read_text()
    cell = re.search(r"@fastrnn\.cell.*?\n\n\n", source, re.DOTALL)[0]
    assert len(cell.splitlines()) < 20
