"""What the project says of itself in several places is the same, and what it refers to is there."""

import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import yaml

import fastrnn
from fastrnn import built

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What a wheel that is built here would say."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", folder]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    return Parser().parsestr(next(folder.glob("*/METADATA")).read_text())


def test_requirements(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == [built.served(torch.__version__), "numpy"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_version(metadata):
    assert metadata["Version"] == fastrnn.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastrnn.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastrnn.__version__
    latest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest[1] == fastrnn.__version__


def test_workflows_call_targets_that_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for step in job["steps"]:
                called |= set(re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.MULTILINE))
    assert {"test", "lint", "wheel"} <= called <= targets
