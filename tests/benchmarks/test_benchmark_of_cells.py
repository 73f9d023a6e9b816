"""`python -m benchmarks.cells`: it compares what it times, and writes down what it prints."""

import csv

import pytest
import torch

import fastrnn
from benchmarks import cells


@pytest.mark.parametrize("name", fastrnn.papers.__all__)
def test_loop_is_the_layer(name):
    layer, x = getattr(fastrnn, name)(5, 6), torch.randn(7, 3, 5)
    torch.testing.assert_close(cells.loop(layer, x), layer(x)[0])


def test_products_of_a_step():
    counts = {name: cells.products(getattr(fastrnn, name)(5, 6)) for name in ("MGU", "IndRNN", "JordanRNN", "SLSTM")}
    assert counts == {"MGU": 4, "IndRNN": 1, "JordanRNN": 3, "SLSTM": 8}
    assert cells.products(fastrnn.LSTM(5, 6)) == 8


def test_prints_and_writes_all_cells(monkeypatch, capsys, tmp_path):
    for name, value in {"T": 3, "B": 2, "H": 8, "SCAN": (4, 2, 8)}.items():
        monkeypatch.setattr(cells, name, value)
    monkeypatch.setattr(cells, "measure", lambda calls, protocol: {name: torch.ones(2).numpy() for name in calls})
    monkeypatch.setattr("sys.argv", ["cells", "--csv", str(tmp_path / "cells.csv")])
    cells.main()
    out = capsys.readouterr().out
    assert "MGU            1000.0 ms, the loop   1.0 times as long, per product 2.00 of LSTM's" in out
    assert "MinGRU         1000.0 ms, the product alone 1.00 times as long" in out
    rows = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert len(rows) == 3 * len(fastrnn.papers.__all__) + 4 * 5
    assert {row["table"] for row in rows} == {"training 3,2,8,8", "inference 4,2,8,8"}
