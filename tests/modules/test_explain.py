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


class Model(torch.nn.Module):
    """A layer, a cell that is called twice, one of torch.nn's, one that is not called."""

    def __init__(self):
        super().__init__()
        self.layer, self.cell, self.theirs = fastrnn.LSTM(3, 4), fastrnn.GRUCell(4, 4), torch.nn.RNN(4, 4)
        self.unused = fastrnn.RNN(3, 4)

    def forward(self, x, *, lengths):
        y, _ = self.layer(x, lengths=lengths)
        h = self.cell(y[1], hx=self.cell(input=y[0]))
        return self.theirs(h)


def test_tells_of_a_whole_model():
    model, lengths = Model(), torch.tensor([5, 2])
    layer, cell, theirs, unused = fastrnn.explain(model, torch.randn(5, 2, 3), lengths=lengths).splitlines()
    assert layer.startswith("layer: layer 0: lstm, 1 direction(s), CPU, ")
    assert cell.startswith("cell: layer 0: gru, ")
    assert theirs == "theirs: torch.nn.RNN, not of fastrnn: fastrnn.convert(model) replaces it"
    assert unused == "unused: not called"
    assert not any(module._forward_pre_hooks for module in model.modules())


class OwnArguments(fastrnn.GRU):
    def forward(self, a, b, scale=1):
        return super().forward((a + b) * scale)


def test_subclasses_with_arguments_of_their_own():
    class Owner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.stack = OwnArguments(3, 4), fastrnn.LSTM(4, 4, 2)

        def forward(self, model):
            return self.stack(self.rnn(model, b=model, scale=2)[0])

    lines = fastrnn.explain(Owner(), model=torch.randn(5, 2, 3)).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "rnn: layer 0: gru",
        "stack: layer 0: lstm",
        "stack: layer 1: lstm",
    ]


def test_tells_of_a_whole_model_that_has_none():
    assert fastrnn.explain(torch.nn.Linear(3, 4)) == "no recurrent modules"
    text = fastrnn.explain(torch.nn.LSTM(3, 4), torch.randn(5, 2, 3))
    assert text == "(the model itself): torch.nn.LSTM, not of fastrnn: fastrnn.convert(model) replaces it"


def test_hooks_are_gone_after_an_error():
    model = torch.nn.Sequential(fastrnn.LSTM(3, 4), fastrnn.GRU(4, 4))
    with pytest.raises(AttributeError):
        fastrnn.explain(model, torch.randn(5, 2, 3))  # the second one is given a tuple
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got type"):
        fastrnn.explain(torch.nn.LSTM, torch.randn(5, 2, 3))
    with pytest.raises(TypeError, match="input"):
        fastrnn.explain(fastrnn.LSTM(3, 4))
