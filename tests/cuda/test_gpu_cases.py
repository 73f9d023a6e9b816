"""The helpers of tests/gpu, on the CPU: what is sampled, that numbers are exact, and that errors are found."""

from dataclasses import replace

import gpu_cases
import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS
from gpu_cases import (
    BATCHES,
    MOST_FLOPS,
    STEPS,
    TYPES,
    UNITS,
    Spec,
    check,
    error,
    exact,
    expected,
    make,
    moved,
    on_device,
    outputs_and_grads,
    sampled_specs,
    torch_layer,
)

from fastrnn import reference

SPECS = sampled_specs()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")


def test_every_size_and_kind_of_rows_is_sampled():
    for cell, P in VARIANTS:
        own = [spec for spec in SPECS if spec.cell == cell and (spec.P is None or P)]
        assert {spec.H for spec in own} == set(UNITS)
        assert {(spec.rows, spec.D) for spec in own} == {(rows, D) for rows in ROWS for D in (1, 2)}
    assert {spec.T for spec in SPECS} == set(STEPS)
    assert {spec.B for spec in SPECS} == set(BATCHES)
    assert len(set(map(str, SPECS))) == len(SPECS)
    assert max(spec.flops for spec in SPECS) <= MOST_FLOPS


def test_the_numbers_are_exact_in_every_type():
    tensors = [tensor for tensor in make(Spec("lstm", 3, 2, 4, 300, P=100, D=2)).tensors if tensor is not None]
    tensors.append(exact(torch.rand(1000) * 1e-6))
    for dtype in TYPES.values():
        assert all(torch.equal(tensor.to(dtype).double(), tensor) for tensor in tensors)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.cell == "rnn_relu" and s.flops < 1e8], ids=str)
def test_no_rounding_switches_a_rectifier(spec):
    y = expected(spec)["y"]
    assert ((y == 0) | (y > 1)).all()


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(
    "spec", [s for s in (Spec(cell, 5, 3, 4, 6, P) for cell, P in VARIANTS) if s.in_torch], ids=str
)
def test_torch_computes_what_the_reference_does(spec, D):
    spec = replace(spec, D=D)
    case = moved(make(spec), torch.float64)
    found, truth = (outputs_and_grads(case, layer) for layer in (torch_layer, reference.layer))
    assert found.keys() == truth.keys()
    assert all(error(spec, tensor, found[tensor], value) < 1e-12 for tensor, value in truth.items())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", ["plain", "lengths+resets"])
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_the_cpu_is_accurate_enough(cell, P, rows, name):
    """Its kernels pass the check that those of the GPU have to."""
    spec = Spec(cell, 7, 9, 5, 33, P, D=2, rows=rows)
    check(spec, name, on_device(spec, name))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_a_wrong_number_is_found(cell, name):
    """One number of a tensor that is off by a fifth of the largest, or not a number."""
    spec = Spec(cell, 7, 9, 5, 33)
    found = on_device(spec, name)
    for tensor in found:
        for wrong in (found[tensor].abs().max() / 5, float("nan")):
            altered = found[tensor].clone()
            altered.view(-1)[-1] += wrong
            with pytest.raises(AssertionError, match=f"^{tensor}: off by"):
                check(spec, name, found | {tensor: altered})


def test_a_missing_row_is_found():
    spec = Spec("gru", 3, 2, 4, 5)
    found = on_device(spec, "float32")
    assert error(spec, "y", found["y"][:2], expected(spec)["y"]) == float("inf")


def test_an_empty_tensor_has_no_error():
    empty = torch.empty(0, 3)
    assert error(Spec("gru", 0, 2, 4, 5), "y", empty, empty) == 0
