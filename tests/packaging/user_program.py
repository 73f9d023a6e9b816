"""A user's program that names all that is public, for type checkers; it runs, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn.cells import U, X


@fastrnn.cell(gates="f n", states="h", unit_weights="rate")
def own(x: X, u: U, h: Tensor, rate: Tensor) -> Tensor:
    f = fastrnn.cells.sigmoid(x.f + u.f(h) + rate)
    return (1 - f) * h + f * torch.tanh(x.n + u.n(f * h))


def layers(x: Tensor) -> Tensor:
    lengths, resets = torch.tensor([3, 5]), torch.zeros(5, 2, dtype=torch.bool)
    lstm = fastrnn.LSTM(4, 8, 2, batch_first=False, dropout=0.1, proj_size=3, weights=None, cell_clip=3.0)
    output, (h_n, c_n) = lstm(x, lengths=lengths, resets=resets)
    output, (h_n, c_n) = lstm(x, (h_n, c_n))
    gru = fastrnn.GRU(4, 8, bidirectional=True, device="cpu", dtype=torch.float32, reset_after=False)
    output, h_n = gru(x)
    packed: PackedSequence = pack_padded_sequence(x, lengths, enforce_sorted=False)
    packed_output, _ = gru(packed)
    assert packed_output.data.shape == (8, 16)
    rnn = fastrnn.RNN(4, 8, nonlinearity="relu", leak=0.3, recompute=True)
    output, h_n = rnn(x, h_n[:1])
    assert output.shape == (5, 2, 8)
    h: Tensor = fastrnn.RNNCell(4, 8)(x[0])
    h = fastrnn.GRUCell(4, 8, reset_after=True)(x[0], h)
    h, c = fastrnn.LSTMCell(4, 8)(x[0], (h, h))
    own_layer = fastrnn.Recurrent(own, 4, 8, num_layers=2)
    step: fastrnn.Stream = fastrnn.MGU(4, 8).stream(batch=2, copy=True)
    y: Tensor = step(x[0])
    own_layer(x)
    y = fastrnn.RecurrentCell(own, 4, 8)(x[0])
    return y + c


def papers(x: Tensor) -> None:
    fastrnn.SLSTM(4, 8, num_layers=2)(x)
    fastrnn.CTRNN(4, 8, leak=0.5, bias=False)(x)
    fastrnn.MGU(4, 8)(x)
    fastrnn.LightGRU(4, 8, batch_first=True)(x)
    fastrnn.JordanRNN(4, 8)(x)
    fastrnn.IndRNN(4, 8)(x)
    fastrnn.SRU(4, 8)(x)
    fastrnn.QRNN(4, 8, dropout=0.0)(x)
    fastrnn.MinGRU(4, 8, recompute=True)(x)
    fastrnn.MinLSTM(4, 8, device="cpu")(x)
    fastrnn.LayerNormLSTM(4, 8, carries_normalized=True)(x)
    fastrnn.LayerNormGRU(4, 8, joint=True)(x)


def systems(x: Tensor) -> None:
    stack = fastrnn.Stack(fastrnn.GRU(4, 8), fastrnn.LSTM(8, 8), residual=True)
    stack(x)
    fastrnn.Skip(fastrnn.GRU(4 + 8, 8), steps=2)(x)
    fastrnn.Dilated(fastrnn.GRU(4, 8), steps=2)(x)
    memory = fastrnn.LegendreMemory(order=3, theta=5.0)
    _states, _last = memory.forward(x)
    fastrnn.LMU(4, 8, order=3, theta=5.0)(x)
    fastrnn.DiagonalSSM(4, 8, dt_min=1e-2)(x)
    fastrnn.LearnedState(fastrnn.GRU(4, 8))(x)
    noisy = fastrnn.Regularized(fastrnn.GRU(4, 8), zoneout=0.1)
    noisy(x, generator=torch.Generator())


def tools(x: Tensor) -> dict[str, Tensor]:
    model = fastrnn.convert(torch.nn.Sequential(torch.nn.GRU(4, 8)), weights=None)
    text: str = fastrnn.explain(model, x)
    assert text
    fastrnn.revert(model)
    layer: fastrnn.LSTM = fastrnn.init.forget_bias_(fastrnn.init.orthogonal_(fastrnn.LSTM(4, 8)), 1.0)
    for output, _state, start, stop in fastrnn.truncated(layer, x, 2):
        assert len(output) == stop - start
    weights = layer._weights()
    y, h_n, c_n = fastrnn.functional.rnn("lstm", x, None, None, weights)
    y, h_n, c_n = fastrnn.ops.layer("lstm", x, h_n, c_n, weights[0])
    y, _, _ = fastrnn.reference.layer("lstm", x, None, None, weights[0])
    norms: dict[str, Tensor] = fastrnn.per_sample_norms(layer, x, torch.ones_like(y))
    assert norms
    return fastrnn.per_sample_gradients(layer, x, torch.ones_like(y))


def files(path: str) -> None:
    found = fastrnn.from_onnx(path)
    layer = found[0] if isinstance(found, list) else found
    fastrnn.to_keras(layer)
    fastrnn.from_keras(path, name="encoder")


if __name__ == "__main__":
    x = torch.randn(5, 2, 4)
    layers(x)
    papers(x)
    systems(x)
    tools(x)
    print(fastrnn.__version__)
