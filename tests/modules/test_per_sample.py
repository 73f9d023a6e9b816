"""Gradients and norms by row, against a backward pass for each row alone, in float64."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn import per_sample_gradients, per_sample_norms

T, B, I, H = 6, 4, 5, 3
LAYERS = {
    "LSTM": lambda **options: fastrnn.LSTM(I, H, **options),
    "LSTM-peephole": lambda **options: fastrnn.LSTM(I, H, peephole=True, **options),
    "GRU": lambda **options: fastrnn.GRU(I, H, **options),
    "GRU-reset-before": lambda **options: fastrnn.GRU(I, H, reset_after=False, **options),
    "RNN": lambda **options: fastrnn.RNN(I, H, nonlinearity="relu", **options),
    "RNN-leak": lambda **options: fastrnn.RNN(I, H, leak=torch.nn.Parameter(torch.full((H,), 0.3)), **options),
    "RNN-fixed-leak": lambda **options: fastrnn.RNN(I, H, leak=0.3, **options),
    "MinGRU": lambda **options: fastrnn.MinGRU(I, H, **options),
    "IndRNN": lambda **options: fastrnn.IndRNN(I, H, **options),
    "SRU": lambda **options: fastrnn.SRU(I, H, **options),
    "LayerNormLSTM": lambda **options: fastrnn.LayerNormLSTM(I, H, **options),
    "LayerNormLSTM-carried": lambda **options: fastrnn.LayerNormLSTM(I, H, carries_normalized=True, **options),
    "LayerNormGRU": lambda **options: fastrnn.LayerNormGRU(I, H, **options),
    "LayerNormGRU-joint": lambda **options: fastrnn.LayerNormGRU(I, H, joint=True, **options),
}


def one_by_one(layer, x, grad_output, hx, grad_state, lengths, resets):
    found = []
    for b in range(B):
        row = slice(b, b + 1)
        own = tree_map(lambda t, row=row: t[:, row], (hx, grad_state))
        own_lengths, own_resets = (None if t is None else t[row] for t in (lengths, resets))
        output, state = layer(x[row], own[0], own_lengths, own_resets)
        outputs, grads = [output, *tree_leaves(state)], [grad_output[row], *tree_leaves(own[1])]
        found.append(torch.autograd.grad(outputs, list(layer.parameters()), grads))
    return [torch.stack(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", [False, True], ids=["plain", "lengths-resets"])
def test_gradients_and_norms(kind, rows):
    """The same sums in another order: some 1e-15 of the largest numbers. Norms come of both ways, by the sizes."""
    layer = LAYERS[kind](num_layers=2, bidirectional=True, batch_first=True).double()
    x = torch.randn(B, T, I, dtype=torch.float64)
    output, state = layer(x)
    hx, grad_state, grad_output = (tree_map(torch.randn_like, like) for like in (state, state, output))
    lengths, resets = (torch.tensor([6, 0, 3, 5]), torch.rand(B, T) < 0.3) if rows else (None, None)
    expected = one_by_one(layer, x, grad_output, hx, grad_state, lengths, resets)
    options = {"lengths": lengths, "resets": resets, "grad_state": grad_state}
    found = per_sample_gradients(layer, x, grad_output, hx, **options)
    norms = per_sample_norms(layer, x, grad_output, hx, **options)
    names = [name for name, _ in layer.named_parameters()]
    assert sorted(found) == sorted(norms) == sorted(names)
    for name, exact in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], exact, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(norms[name], exact.flatten(1).norm(dim=1), rtol=1e-10, atol=1e-10)


def test_units_with_several_weights():
    """One of which is named as that of an `RNN`."""
    layer, x, grad_output = fastrnn.Recurrent("spiking", I, H), torch.randn(T, B, I), torch.randn(T, B, H)
    found = per_sample_gradients(layer, x, grad_output)
    assert found.keys() == dict(layer.named_parameters()).keys() >= {"leak_l0", "threshold_l0", "refractory_l0"}
    for name, exact in zip(found, torch.autograd.grad(layer(x)[0], list(layer.parameters()), grad_output), strict=True):
        torch.testing.assert_close(found[name].sum(0), exact, rtol=1e-4, atol=1e-5)


def test_states_that_require_gradients():
    layer, h0 = fastrnn.GRU(I, H), torch.randn(1, B, H, requires_grad=True)
    found = per_sample_gradients(layer, torch.randn(T, B, I), torch.ones(T, B, H), h0)
    assert not any(gradient.requires_grad for gradient in found.values())


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: fastrnn.LSTM(I, H, peephole=True), "peephole_l0"),
        (lambda: fastrnn.IndRNN(I, H), "w_l0"),
        (lambda: fastrnn.LayerNormGRU(I, H), "gain_hh_l0"),
    ],
)
def test_computed_weights_of_units(make, name):
    layer = make()
    torch.nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    with pytest.raises(ValueError, match=f"layer: expected weights that are parameters, got {name}, which is computed"):
        per_sample_gradients(layer, torch.randn(T, B, I), torch.ones(T, B, H))


def test_norms_of_gram_matrices():
    """Few steps, large weights: without the gradients."""
    layer = fastrnn.GRU(40, 50).double()
    x = torch.randn(3, B, 40, dtype=torch.float64)
    grad_output = torch.randn(3, B, 50, dtype=torch.float64)
    gradients, norms = (f(layer, x, grad_output) for f in (per_sample_gradients, per_sample_norms))
    for name, gradient in gradients.items():
        torch.testing.assert_close(norms[name], gradient.flatten(1).norm(dim=1), rtol=1e-10, atol=1e-10)


def test_nothing_is_left_behind():
    """No gradients in the parameters, and calls afterwards are as before."""
    layer = fastrnn.LSTM(I, H).requires_grad_(False)
    x = torch.randn(T, B, I)
    before = layer(x)[0]
    per_sample_norms(layer, x, torch.ones(T, B, H))
    assert torch.equal(layer(x)[0], before)
    assert not layer(x)[0].requires_grad
    assert all(p.grad is None for p in layer.parameters())


def test_bad_arguments():
    x, grad = torch.randn(T, B, I), torch.ones(T, B, H)
    for layer, error, text in (
        (torch.nn.GRU(I, H), TypeError, "layer: expected an LSTM, GRU, RNN or Recurrent of fastrnn, got GRU"),
        (fastrnn.GRU(I, H, 2, dropout=0.5), ValueError, "layer: expected no dropout between layers"),
        (fastrnn.GRU(I, H, weights="int8"), ValueError, "layer: expected one without weights='int8'"),
        (fastrnn.LSTM(I, H, proj_size=2), NotImplementedError, "layer: expected one without proj_size"),
    ):
        with pytest.raises(error, match=text):
            per_sample_gradients(layer, x, grad)
    gru = fastrnn.GRU(I, H)
    for given, text in (
        ((x[0], grad), "input: expected a tensor of 3 dimensions, got 2"),
        ((x, grad[1:]), r"grad_output: expected shape \(6, 4, 3\) of torch.float32, got \(5, 4, 3\)"),
        ((x, grad.double()), r"grad_output: expected .* of torch.float32, got \(6, 4, 3\) of torch.float64"),
        ((x, None), r"grad_output: expected shape \(6, 4, 3\) of torch.float32, got NoneType"),
    ):
        with pytest.raises(ValueError, match=text):
            per_sample_norms(gru, *given)
    with pytest.raises(ValueError, match=r"grad_state: expected shape \(1, 4, 3\)"):
        per_sample_norms(gru, x, grad, grad_state=torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="grad_state: expected 1 tensors, got 2"):
        per_sample_norms(gru, x, grad, grad_state=(torch.ones(1, 4, 3),) * 2)
    with pytest.raises(TypeError, match="steps: expected an argument among lengths, resets, grad_state"):
        per_sample_norms(gru, x, grad, steps=3)
    with pytest.raises(NotImplementedError, match=r"expected a call outside of torch\.func's transforms"):
        torch.vmap(lambda x: per_sample_norms(gru, x, grad)["bias_ih_l0"])(x[None])
    torch.nn.utils.parametrizations.weight_norm(gru, "weight_hh_l0")
    with pytest.raises(ValueError, match="expected weights that are parameters, got weight_hh_l0, which is computed"):
        per_sample_norms(gru, x, grad)


def test_no_rows():
    found = per_sample_gradients(fastrnn.LSTM(I, H), torch.randn(T, 0, I), torch.ones(T, 0, H))
    assert found["weight_hh_l0"].shape == (0, 4 * H, H)
