"""Cells whose kernels nvcc compiles when they are first used, against the CPU's in float64."""

import pytest
from cases import ROWS
from gpu_cases import TYPES, Spec, check, on_device
from own_cells import given_much, two_stages

from fastrnn import compiler

CELLS = ["slstm", "mingru", given_much.name, two_stages.name]


@pytest.fixture(autouse=True)
def has_nvcc():
    if compiler.for_gpu() is None:
        pytest.skip("needs an nvcc of torch's CUDA version")


@pytest.mark.quick
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_layer(cell, name, rows):
    spec = Spec(cell, 9, 17, 5, 40, D=2, rows=rows)
    check(spec, name, on_device(spec, name))


@pytest.mark.sanitizer
@pytest.mark.parametrize("cell", CELLS)
def test_layer_under_a_sanitizer(cell):
    spec = Spec(cell, 5, 9, 5, 33, rows="lengths+resets")
    check(spec, "float32", on_device(spec, "float32"))
