"""What setup.py decides, with a torch that has CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def setup(**environment):
    """Runs it, building nothing, and returns its exit status and what it says."""
    known = {name: value for name, value in os.environ.items() if name not in ("FASTRNN_CUDA", "TORCH_CUDA_ARCH_LIST")}
    command = [sys.executable, "setup.py", "--version"]
    process = subprocess.run(
        command, cwd=ROOT, env=known | environment, capture_output=True, text=True, timeout=120, check=False
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize("wanted", ["", "1"])
def test_on_for_the_named_architectures(wanted):
    status, said = setup(FASTRNN_CUDA=wanted, TORCH_CUDA_ARCH_LIST="8.6;9.0a 12.0+PTX")
    assert status == 0
    assert "fastrnn: CUDA on (sm_86 sm_90a sm_120), CPU kernels for " in said


@pytest.mark.parametrize("environment", [{"FASTRNN_CUDA": "0"}, {"CUDA_HOME": "/nowhere"}], ids=str)
def test_off(environment):
    status, said = setup(**environment)
    assert status == 0
    assert "fastrnn: CUDA off, CPU kernels for " in said


def test_impossible():
    status, said = setup(FASTRNN_CUDA="1", CUDA_HOME="/nowhere")
    assert status != 0
    assert f"torch.version.cuda is {torch.version.cuda}, CUDA_HOME is None" in said


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTRNN_CUDA": "yes"}, "FASTRNN_CUDA: expected 0 or 1, got 'yes'"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 Hopper"}, "TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0"),
    ],
    ids=str,
)
def test_bad_values(environment, message):
    status, said = setup(**environment)
    assert status != 0
    assert message in said
