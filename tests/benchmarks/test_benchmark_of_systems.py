"""`python -m benchmarks.systems`: it compares what it times, and writes down what it prints."""

import csv

import pytest
import torch

from benchmarks import systems


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"T": 7, "B": 3, "H": 6, "ORDER": 4, "STEPS": 2, "LARGE": 8}.items():
        monkeypatch.setattr(systems, name, value)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_loop_is_the_system(name):
    make, loop, backward = systems.SYSTEMS[name]
    module, x = make(), torch.randn(7, 3, 6, requires_grad=backward)
    torch.testing.assert_close(loop(module, x), module(x)[0])
    assert loop(module, x).requires_grad == backward


def test_prints_and_writes_all_systems(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(systems, "measure", lambda calls, protocol: {name: torch.ones(2).numpy() for name in calls})
    monkeypatch.setattr("sys.argv", ["systems", "--csv", str(tmp_path / "systems.csv")])
    systems.main()
    out = capsys.readouterr().out
    # W and U of 6x6, 7 steps, 3 rows: 3024 operations forward, as many for the weights' gradients and for those of what
    # they multiply, less 216 for the state before the first step; at the rate of 1024 a second.
    assert "leaky        1000.00 ms (865% of the limit), the loop   1.0 times as long" in out
    rows = list(csv.DictReader((tmp_path / "systems.csv").open()))
    assert [row["system"] for row in rows] == list(systems.SYSTEMS)
