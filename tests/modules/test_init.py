"""`fastrnn.init`."""

import pytest
import torch

import fastrnn


@pytest.mark.parametrize(
    "module",
    [
        fastrnn.LSTM(5, 8, num_layers=2, bidirectional=True),
        fastrnn.LSTM(5, 8, proj_size=3),
        fastrnn.GRUCell(5, 8),
        fastrnn.JordanRNN(5, 8),
    ],
    ids=lambda module: module._get_name(),
)
def test_orthogonal(module):
    """Of each gate's matrix all singular values are the gain."""
    assert fastrnn.init.orthogonal_(module, gain=1.5) is module
    matrices = [p for name, p in module.named_parameters() if name.startswith("weight_hh")]
    for gate in torch.cat([m.detach() for m in matrices]).split(8):
        values = torch.linalg.svdvals(gate)
        torch.testing.assert_close(values, torch.full_like(values, 1.5), rtol=1e-5, atol=0)


def test_orthogonal_by_a_generator():
    draws = [fastrnn.init.orthogonal_(fastrnn.GRU(3, 4), generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*(module.weight_hh_l0 for module in draws))


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.SLSTM, fastrnn.LSTMCell])
def test_forget_bias_is_what_the_gate_gets(kind):
    """The second row block; the two biases are added."""
    module = kind(5, 8)
    other = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert fastrnn.init.forget_bias_(module, 2) is module
    suffix = "" if kind is fastrnn.LSTMCell else "_l0"
    both = getattr(module, f"bias_ih{suffix}") + getattr(module, f"bias_hh{suffix}")
    assert (both[8:16] == 2).all()
    for name, p in module.named_parameters():
        rest = torch.ones(len(p), dtype=torch.bool)
        rest[8:16] = not name.startswith("bias")
        assert torch.equal(p[rest], other[name][rest])


def test_forget_bias_of_cells_with_one_bias_and_of_other_gates():
    qrnn = fastrnn.init.forget_bias_(fastrnn.QRNN(5, 8), 3.0)
    assert (qrnn.bias_ih_l0[8:16] == 3).all()
    gru = fastrnn.init.forget_bias_(fastrnn.GRU(5, 8), -1.0, gate="z")
    assert ((gru.bias_ih_l0 + gru.bias_hh_l0)[8:16] == -1).all()
    jordan = fastrnn.init.forget_bias_(fastrnn.JordanRNN(5, 8), 4.0, gate="y")  # a gate with the recurrent bias alone
    assert (jordan.bias_hh_l0[8:] == 4).all()


def test_bad_arguments():
    with pytest.raises(TypeError, match="module: expected a layer or cell of fastrnn, got Linear"):
        fastrnn.init.orthogonal_(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got LSTM"):
        fastrnn.init.forget_bias_(torch.nn.LSTM(2, 2))
    with pytest.raises(ValueError, match="expected recurrent matrices, got MinGRU"):
        fastrnn.init.orthogonal_(fastrnn.MinGRU(2, 2))
    computed = torch.nn.utils.parametrizations.weight_norm(fastrnn.LSTM(2, 2, 2), "weight_hh_l0")
    for call in (fastrnn.init.orthogonal_, fastrnn.init.forget_bias_):
        with pytest.raises(ValueError, match="a parametrization that computes weight_hh_l0"):
            call(computed)
    with pytest.raises(ValueError, match="gain: expected a finite number, got nan"):
        fastrnn.init.orthogonal_(fastrnn.GRU(2, 2), gain=float("nan"))
    with pytest.raises(ValueError, match="gate: expected one of r, z, n, got 'f'"):
        fastrnn.init.forget_bias_(fastrnn.GRU(2, 2))
    with pytest.raises(ValueError, match="expected biases, got LSTM without any"):
        fastrnn.init.forget_bias_(fastrnn.LSTM(2, 2, bias=False))
    with pytest.raises(ValueError, match="value: expected a finite number, got nan"):
        fastrnn.init.forget_bias_(fastrnn.LSTM(2, 2), float("nan"))
    with pytest.raises(TypeError, match="value: expected a number, got str"):
        fastrnn.init.forget_bias_(fastrnn.LSTM(2, 2), "1")
