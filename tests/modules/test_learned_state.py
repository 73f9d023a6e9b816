"""A trained initial state, against one that is passed by hand."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves
from twins import assert_same

import fastrnn

T, B, I, H = 5, 3, 4, 6
LAYERS = {
    "LSTM": lambda **o: fastrnn.LSTM(I, H, **o),
    "LSTM-projected": lambda **o: fastrnn.LSTM(I, H, proj_size=2, **o),
    "GRU": lambda **o: fastrnn.GRU(I, H, **o),
    "SLSTM": lambda **o: fastrnn.SLSTM(I, H, **o),
    "Regularized": lambda **o: fastrnn.Regularized(fastrnn.GRU(I, H, **o), zoneout=0.3),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("layout", ["time-first", "batch-first", "unbatched", "packed"])
def test_is_the_state_passed_by_hand(kind, layout):
    module = fastrnn.LearnedState(LAYERS[kind](num_layers=2, bidirectional=True, batch_first=layout == "batch-first"))
    module.double().eval()
    names = [name for name, _ in module.named_parameters() if name.endswith("_0")]
    with torch.no_grad():
        for name in names:
            module.get_parameter(name).copy_(torch.rand_like(module.get_parameter(name)) + 0.5)
    x = torch.randn({"unbatched": (T, I)}.get(layout, (T, B, I)), dtype=torch.float64)
    rows = () if layout == "unbatched" else (B,)
    given = tuple(
        (p[:, None].expand(-1, B, -1) if rows else p).detach().clone().requires_grad_()
        for p in map(module.get_parameter, names)
    )
    if layout == "packed":
        x = pack_padded_sequence(x, torch.tensor([5, 3, 1]))
    elif layout == "batch-first":
        x = x.transpose(0, 1)
    found = tree_leaves(module(x)) if layout != "packed" else [module(x)[0].data]
    by_hand = module.layer(x, given if len(given) > 1 else given[0])
    expected = tree_leaves(by_hand) if layout != "packed" else [by_hand[0].data]
    assert_same(found, expected)
    grads = torch.autograd.grad(sum(t.sin().sum() for t in found), [module.get_parameter(name) for name in names])
    exact = torch.autograd.grad(sum(t.sin().sum() for t in expected), given)
    assert_same(list(grads), [g.sum(1) if rows else g for g in exact])


def test_a_state_that_is_given_is_taken():
    module, x = fastrnn.LearnedState(fastrnn.GRU(I, H)), torch.randn(T, B, I)
    torch.nn.init.ones_(module.h_0)
    zeros = torch.zeros(1, B, H)
    assert torch.equal(module(x, zeros)[0], module.layer(x)[0])
    lengths = torch.tensor([5, 0, 2])
    assert torch.equal(module(x, lengths=lengths)[1], module.layer(x, module.state(x), lengths)[1])


def test_starts_from_zero_and_has_names():
    module = fastrnn.LearnedState(fastrnn.LSTM(I, H, dtype=torch.float64))
    assert {name for name, _ in module.named_parameters() if "layer" not in name} == {"h_0", "c_0"}
    assert module.c_0.dtype == torch.float64
    assert not module.h_0.any()


def test_other_modules_are_refused():
    for other in (torch.nn.GRU(I, H), fastrnn.GRUCell(I, H), fastrnn.DiagonalSSM(I, H)):
        with pytest.raises(TypeError, match="layer: expected an LSTM, GRU, RNN or Recurrent of fastrnn, got"):
            fastrnn.LearnedState(other)
