"""`fastrnn.explain`: what it says of each way a call can go."""

import pytest
import torch

import fastrnn


def test_tells_every_layer():
    module = fastrnn.LSTM(6, 7, num_layers=2, bidirectional=True)
    text = fastrnn.explain(module, torch.randn(30, 4, 6))
    first, second = text.splitlines()
    assert first.startswith("layer 0: lstm, 2 direction(s), CPU, ")
    assert second.startswith("layer 1: lstm, 2 direction(s), CPU, ")
    assert fastrnn._C.build_info()["isa"] in first


@pytest.mark.parametrize(
    ("shape", "units", "expected"),
    [
        ((1, 1, 8), 8, "reads the weights where they lie"),
        ((100, 8, 300), 300, "keeps the packed weights"),
        ((100, 8, 8), 8, "packs the weights in every call"),
    ],
)
def test_tells_what_happens_to_the_weights(shape, units, expected):
    with torch.no_grad():
        assert expected in fastrnn.explain(fastrnn.GRU(shape[2], units), torch.randn(shape))


def test_takes_what_the_module_takes():
    layer = fastrnn.GRU(3, 4, batch_first=True)
    with torch.no_grad():
        one_row = fastrnn.explain(layer, torch.randn(1, 4, 3))
        one_step = fastrnn.explain(layer, torch.randn(5, 1, 3))
        assert "where they lie" in one_row
        assert "in every call" in one_step
        assert "where they lie" in fastrnn.explain(layer, torch.randn(4, 3))
        assert "where they lie" in fastrnn.explain(fastrnn.LSTMCell(3, 4), torch.randn(2, 3))
        packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(1, 3)])
        assert "where they lie" in fastrnn.explain(layer, packed)


def test_refuses_other_modules():
    with pytest.raises(TypeError, match="module: expected a layer or cell of fastrnn, got LSTM"):
        fastrnn.explain(torch.nn.LSTM(3, 4), torch.randn(5, 2, 3))
