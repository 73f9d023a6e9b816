"""The LSTM with bounds of its cell state, against a loop in float64."""

import copy
import io

import pytest
import torch

import fastrnn

T, B, I, H, CLIP = 9, 3, 4, 5, 0.4


def loop(layer, x):
    w_ih, w_hh, b_ih, b_hh = (getattr(layer, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = x.new_zeros(B, H)
    outputs = []
    for now in x:
        i, f, g, o = (now @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh).chunk(4, 1)
        c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).clamp(-CLIP, CLIP)
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def test_equation():
    layer = fastrnn.LSTM(I, H, cell_clip=CLIP, dtype=torch.float64)
    x = 3 * torch.randn(T, B, I, dtype=torch.float64)
    output, (h, c) = layer(x)
    expected = loop(layer, x)
    assert (expected[2].abs() == CLIP).any()
    for found, exact in zip((output, h[0], c[0]), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    parameters = list(layer.parameters())
    grads = [torch.autograd.grad(y.sin().sum(), parameters) for y in (output, expected[0])]
    for found, exact in zip(*grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


def test_options_go_with_it():
    x = torch.randn(B, T, I)
    layer = fastrnn.LSTM(I, H, 2, batch_first=True, bidirectional=True, cell_clip=CLIP, proj_size=2)
    assert layer(x, lengths=torch.tensor([9, 0, 4]))[1][1].abs().max() <= CLIP
    layer = fastrnn.LSTM(I, H, cell_clip=CLIP)
    step = layer.stream(B, copy=True)
    torch.testing.assert_close(torch.stack([step(now) for now in x.unbind(1)]), layer(x.transpose(0, 1))[0])
    assert "cell_clip=0.4" in repr(layer)
    assert layer.cell_clip == CLIP
    for again in (copy.deepcopy(layer), torch.load(_saved(layer), weights_only=False)):
        assert torch.equal(again(x)[0], layer(x)[0])
    assert type(fastrnn.revert(copy.deepcopy(layer))) is fastrnn.LSTM
    assert fastrnn.LSTM(I, H).cell_clip is None


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_bad_arguments():
    for clip in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cell_clip: expected a positive number, got"):
            fastrnn.LSTM(I, H, cell_clip=clip)
    for clip in ("3", True):
        with pytest.raises(TypeError, match="cell_clip: expected a number or None, got"):
            fastrnn.LSTM(I, H, cell_clip=clip)
    with pytest.raises(ValueError, match="peephole, cell_clip: expected one of them, got both"):
        fastrnn.LSTM(I, H, cell_clip=1.0, peephole=True)
