"""`fastrnn.Stack`: layers of any kind and size, one reading the other's output."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import GRU, LSTM, RNN, Stack

T, B = 6, 3


def test_is_its_layers_in_turn():
    stack = Stack(LSTM(5, 8, bidirectional=True), GRU(16, 4), RNN(4, 7))
    x, resets = torch.randn(T, B, 5), torch.rand(T, B) < 0.2
    lengths = torch.tensor([6, 2, 0])
    y, states = stack(x, lengths=lengths, resets=resets)
    for layer, state in zip(stack.layers, states, strict=True):
        x, expected = layer(x, lengths=lengths, resets=resets)
        assert type(state) is type(expected)
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    assert torch.equal(y, x)


def test_equal_layers_are_torch_nn_s_deep_layer():
    deep = torch.nn.LSTM(5, 8, num_layers=3, dtype=torch.float64)
    layers = [LSTM(5 if k == 0 else 8, 8, dtype=torch.float64) for k in range(3)]
    for k, layer in enumerate(layers):
        layer.load_state_dict({name: getattr(deep, name.replace("l0", f"l{k}")) for name in layer.state_dict()})
    x = torch.randn(T, B, 5, dtype=torch.float64)
    torch.testing.assert_close(Stack(*layers)(x)[0], deep(x)[0], rtol=1e-11, atol=1e-12)


def test_residual():
    stack = Stack(GRU(5, 8), LSTM(8, 8), RNN(8, 8), residual=True)
    x = torch.randn(T, B, 5)
    y = stack.layers[0](x)[0]
    for layer in stack.layers[1:]:
        y = y + layer(y)[0]
    assert torch.equal(stack(x)[0], y)


def test_packed_sequences():
    stack = Stack(GRU(5, 8), LSTM(8, 8), residual=True)
    x, lengths = torch.randn(T, B, 5), torch.tensor([2, 6, 4])
    packed, states = stack(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected, others = stack(x, lengths=lengths)
    mask = (torch.arange(T)[:, None] < lengths)[:, :, None]
    torch.testing.assert_close(pad_packed_sequence(packed)[0], expected * mask)
    torch.testing.assert_close(states[1][1], others[1][1])


@pytest.mark.parametrize("is_packed", [False, True])
def test_dropout(is_packed):
    """Between layers, while training: each element is dropped or doubled before the identity-like last layer."""
    stack = Stack(GRU(5, 400), GRU(400, 3), dropout=0.5)
    x = torch.randn(T, B, 5)
    if is_packed:
        x = pack_padded_sequence(x, torch.tensor([6, 5, 1]))
    seen = []
    stack.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(getattr(inputs[0], "data", inputs[0])))
    plain = getattr(stack.layers[0](x)[0], "data", None)
    stack(x)
    dropped = seen[0] == 0
    assert 0.45 < dropped.float().mean() < 0.55
    torch.testing.assert_close(seen[0][~dropped], 2 * plain[~dropped])
    stack.eval()(x)
    assert torch.equal(seen[1], plain)


def test_states_continue_a_sequence():
    stack = Stack(GRU(5, 8), LSTM(8, 8), residual=True)
    x = torch.randn(T, B, 5)
    whole, final = stack(x)
    first, states = stack(x[:2])
    second, end = stack(x[2:], states)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end[1][1], final[1][1])


@pytest.mark.parametrize("residual", [False, True])
def test_stream(residual):
    stack = Stack(GRU(5, 8), LSTM(8, 8), RNN(8, 8), residual=residual).eval()
    x = torch.randn(T, B, 5)
    with torch.no_grad():
        expected, states = stack(x)
    step = stack.stream(B)
    for _ in range(2):
        found = [step(x[t]).clone() for t in range(T)]
        torch.testing.assert_close(torch.stack(found), expected)
        torch.testing.assert_close(step.state[1][1], states[1][1])
        step.reset()
    step(x[0])
    step.reset(torch.tensor([True, False, True]))
    assert [bool(h.any()) for h in step.state[0][0]] == [False, True, False]


def test_torch_s_own_layers_and_copies():
    stack = fastrnn.convert(Stack(torch.nn.GRU(5, 4), torch.nn.LSTM(4, 6)))
    assert isinstance(stack.layers[0], GRU)
    x = torch.randn(T, B, 5)
    assert torch.equal(copy.deepcopy(stack)(x)[0], stack(x)[0])
    assert torch.equal(torch.compile(stack, backend="eager", fullgraph=True)(x)[0], stack(x)[0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="layers: expected at least one"):
        Stack()
    with pytest.raises(TypeError, match=r"layers\[1\]: expected a recurrent layer, got Linear"):
        Stack(GRU(2, 3), torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"layers\[0\]: expected a recurrent layer, got GRUCell"):
        Stack(fastrnn.GRUCell(3, 4))
    with pytest.raises(ValueError, match=r"layers\[1\]: expected input_size 6, got 3"):
        Stack(GRU(2, 3, bidirectional=True), GRU(3, 3))
    with pytest.raises(ValueError, match=r"layers\[1\]: expected an output of 3 features"):
        Stack(GRU(2, 3), GRU(3, 4), residual=True)
    with pytest.raises(ValueError, match="batch_first of all or of none"):
        Stack(GRU(2, 3), GRU(3, 4, batch_first=True))
    with pytest.raises(TypeError, match="residual: expected a bool, got int"):
        Stack(GRU(2, 3), residual=1)
    with pytest.raises(ValueError, match="dropout: expected a number between 0 and 1, got 2"):
        Stack(GRU(2, 3), dropout=2)
    stack = Stack(GRU(2, 3), GRU(3, 4))
    with pytest.raises(ValueError, match="hx: expected 2 states, got 1"):
        stack(torch.randn(1, 1, 2), (None,))
    with pytest.raises(TypeError, match="hx: expected a tuple of 2 states, got Tensor"):
        stack(torch.randn(1, 1, 2), torch.zeros(1, 1, 3))


def test_dilations_on_top_of_one_another():
    """As Chang et al. 2017 have them: 1, 2, 4 steps."""
    layers = [fastrnn.Dilated(RNN(5 if d == 1 else 4, 4), d) for d in (1, 2, 4)]
    x, lengths = torch.randn(9, B, 5), torch.tensor([9, 3, 6])
    y, states = Stack(*layers)(x, lengths=lengths)
    for layer in layers:
        x, _ = layer(x, lengths=lengths)
    assert torch.equal(y, x)
    assert [state.shape for state in states] == [(1, d * B, 4) for d in (1, 2, 4)]
    skip = fastrnn.Skip(GRU(5 + 4, 4), 2)
    assert Stack(skip, GRU(4, 3))(torch.randn(9, B, 5))[0].shape == (9, B, 3)
