"""`python -m benchmarks.tiles` with the emulator in the place of a GPU: what it forces, and what it says of it."""

import math
import os
import subprocess
import sys

import pytest
import torch
from emulator import ROOT, build

from benchmarks import tiles
from benchmarks.cases import Shape


@pytest.fixture
def emulated(monkeypatch):
    build().set_chip(90, 132, 227 << 10)
    monkeypatch.setattr(torch.ops, "fastrnn", torch.ops.fastrnn_emulated)
    monkeypatch.delenv(tiles.VARIABLE, raising=False)


@pytest.mark.parametrize("cell", ["lstm", "rnn", "gru_reset_before"])
def test_every_tile_of_both_passes_is_timed(emulated, cell):
    layer = tiles.Layer(cell, Shape(2, 3, 4, 40), torch.bfloat16, "cpu")
    found = list(tiles.measure(layer, seconds=1e-6))
    for name in tiles.PASSES:
        of_pass = [measured for measured in found if measured.pass_name == name]
        assert [measured.tile for measured in of_pass] == list(range(len(tiles.values_for(name, layer))))
        assert sum(measured.is_chosen for measured in of_pass) == 1
        timed = [measured for measured in of_pass if not math.isnan(measured.microseconds)]
        assert all(measured.microseconds > 0 for measured in timed)
        anyhow = [measured for measured in timed if measured.path.startswith(("stepwise", "gemm"))]
        assert len(anyhow) == 3
        if cell == "gru_reset_before":
            assert timed == anyhow
            assert "the cell multiplies twice in a step" in of_pass[-3].path
        else:  # none is a scan, and a cell of one gate has no product of warpgroups in its forward pass
            assert len(of_pass) - len(timed) == 1 + (1 if cell == "rnn" and name == "forward" else 0)
    assert tiles.VARIABLE not in os.environ


def test_without_a_gpu_there_is_nothing_to_time():
    command = [sys.executable, "-m", "benchmarks.tiles"]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "torch sees no CUDA device" in process.stderr
