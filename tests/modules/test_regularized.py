"""Noise in the steps of a layer, against loops over torch.nn's cells with the same noise, in float64."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.regularized import _Noise

T, B, I, H = 7, 3, 5, 4
KINDS = {"RNN": {}, "GRU": {}, "LSTM": {}}
OPTIONS = {
    "recurrent dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "weight dropout": {"weight_dropout": 0.3},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "weight_dropout": 0.2},
}


def seeded():
    return torch.Generator().manual_seed(5)


def noise_of(module, x):
    """What a call draws for a layer of one direction, in its order."""
    noise = _Noise(module, seeded())
    masks = noise.masks(x, 1, H)
    dropped = noise.dropped(module._weights()[0][0]).w_hh
    passes = masks.pop(0)[0, 0] if noise.recurrent_dropout else torch.ones(())
    keeps = [keep for mask in masks for keep in mask[0].expand(T, B, -1).split(H, dim=-1)]
    return passes, keeps, dropped


def loop(kind, module, x):
    """h of every step, and the final states."""
    passes, keeps, w_hh = noise_of(module, x)
    w = module._weights()[0][0]
    states = [x.new_zeros(B, H) for _ in range(2 if kind == "LSTM" else 1)]
    outputs = []
    for t in range(T):
        a, u = x[t] @ w.w_ih.t() + w.b_ih, (passes * states[0]) @ w_hh.t() + w.b_hh
        if kind == "RNN":
            new = [torch.tanh(a + u)]
        elif kind == "GRU":
            (r, z), n = (a + u)[:, : 2 * H].sigmoid().chunk(2, 1), a[:, 2 * H :]
            n = torch.tanh(n + r * u[:, 2 * H :])
            new = [(1 - z) * n + z * states[0]]
        else:
            i, f, g, o = (a + u).chunk(4, 1)
            c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
            new = [o.sigmoid() * c.tanh(), c]
        if keeps:
            new = [k[t] * old + (1 - k[t]) * now for k, old, now in zip(keeps, states, new, strict=True)]
        states = new
        outputs.append(states[0])
    return torch.stack(outputs), states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equations(kind, options, training):
    """Outputs, states, and the gradients of the input and all parameters."""
    module = fastrnn.Regularized(getattr(fastrnn, kind)(I, H, dtype=torch.float64), **options).train(training)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    output, state = module(x, generator=seeded())
    found = [output, *(s[0] for s in tree_leaves(state))]
    expected, states = loop(kind, module, x)
    expected = [expected, *states]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    losses = (sum((out * out).sum() for out in outs) for outs in (found, expected))
    grads = [torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in losses]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_same_generator_same_bits_on_any_number_of_threads(kind, threads):
    module = fastrnn.Regularized(getattr(fastrnn, kind)(I, 64, 2, bidirectional=True), **OPTIONS["all"])
    x = torch.randn(T, 40, I)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(tree_leaves(module(x, generator=seeded())))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert not torch.equal(module(x, generator=torch.Generator().manual_seed(6))[0], found[0][0])


def test_frequencies_and_means():
    """1e4 draws or more: within five standard deviations."""
    module = fastrnn.Regularized(fastrnn.LSTM(I, 50), recurrent_dropout=0.2, zoneout=(0.0, 0.3), weight_dropout=0.4)
    noise = _Noise(module, seeded())
    passes, keeps = noise.masks(torch.randn(10, 100, I), 1, 50)
    assert set(passes.unique().tolist()) == {0.0, 1.25}
    assert abs((passes == 0).float().mean() - 0.2) < 5 * (0.16 / passes.numel()) ** 0.5
    assert keeps.shape == (1, 10, 100, 50)
    assert abs(keeps.mean() - 0.3) < 5 * (0.21 / keeps.numel()) ** 0.5
    w = module._weights()[0][0]
    ratio = noise.dropped(w).w_hh / w.w_hh
    assert abs((ratio == 0).float().mean() - 0.4) < 5 * (0.24 / ratio.numel()) ** 0.5
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.6))


def test_without_noise_it_is_the_layer():
    layer = fastrnn.GRU(I, H, batch_first=True)
    module = fastrnn.Regularized(layer, recurrent_dropout=0.5, weight_dropout=0.5)
    x = torch.randn(B, T, I)
    module.eval()
    assert all(map(torch.equal, module(x), layer(x)))
    assert torch.equal(module.stream(B)(x[:, 0]), layer.stream(B)(x[:, 0]))
    assert dict(module.state_dict()).keys() == {f"layer.{name}" for name in layer.state_dict()}


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_resets_packed_sequences_and_unbatched_input(kind):
    """Rows by themselves: noise of the same in all steps is the row's own, so it is put to one row at a time."""
    module = fastrnn.Regularized(getattr(fastrnn, kind)(I, H, bidirectional=True, dtype=torch.float64), zoneout=0.25)
    module.eval()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([7, 4, 2])
    output, state = module(x, lengths=lengths)
    packed, packed_state = module(pack_padded_sequence(x, lengths))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output, rtol=1e-12, atol=1e-12)
    for a, b in zip(tree_leaves(packed_state), tree_leaves(state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for b, n in enumerate(lengths):
        alone, _ = module(x[:n, b])
        torch.testing.assert_close(output[:n, b], alone, rtol=1e-12, atol=1e-12)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    parts = [module(part)[0] for part in (x[:3], x[3:])]
    torch.testing.assert_close(module(x, resets=resets)[0], torch.cat(parts), rtol=1e-12, atol=1e-12)


def test_second_derivatives_and_transforms():
    module = fastrnn.Regularized(fastrnn.LSTM(I, H, dtype=torch.float64), **OPTIONS["all"])
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)

    def run(x):
        return module(x, generator=seeded())[0]

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x,), fast_mode=True)


def test_generator_is_of_dropout_between_layers_too():
    for options in ({}, {"zoneout": 0.1}):
        module = fastrnn.Regularized(fastrnn.GRU(I, H, 2, dropout=0.5), **options)
        x = torch.randn(T, B, I)
        assert torch.equal(module(x, generator=seeded())[0], module(x, generator=seeded())[0])
        assert not torch.equal(module(x)[0], module(x)[0])


def test_autocast():
    """As the layer: its results have autocast's dtype, its gradients that of the parameters."""
    module, x = fastrnn.Regularized(fastrnn.LSTM(I, H), **OPTIONS["all"]), torch.randn(T, B, I)
    exact = module(x, generator=seeded())[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x, generator=seeded())[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.05)  # a few roundings of 2^-9
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_noise_under_vmap():
    module, x = fastrnn.Regularized(fastrnn.LSTM(I, H), **OPTIONS["all"]), torch.randn(T, B, I)
    for randomness, is_same in (("same", True), ("different", False)):
        a, b = torch.vmap(lambda x: module(x)[0], randomness=randomness)(torch.stack([x, x]))
        assert torch.equal(a, b) == is_same


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_noise_in_gradients_of_each_sample(options):
    module, x = fastrnn.Regularized(fastrnn.GRU(I, H), **options), torch.randn(B, T, I)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, row):
        return functional_call(module, parameters, (row[:, None],))[0].square().sum()

    def of_each(randomness, rows):
        torch.manual_seed(1)
        return vmap(grad(loss), in_dims=(None, 0), randomness=randomness)(parameters, rows)

    for name, found in of_each("same", x).items():
        torch.manual_seed(1)
        torch.testing.assert_close(found[1], grad(loss)(parameters, x[1])[name])
    first, second = of_each("different", x[:1].expand(2, -1, -1))["layer.weight_ih_l0"]
    assert not torch.equal(first, second)


def test_compiles_without_a_call_before():
    """Its cell is made on the way."""
    module, x = fastrnn.Regularized(fastrnn.MGU(I, H), zoneout=0.37), torch.randn(T, B, I)
    found = torch.compile(module.eval(), backend="aot_eager", fullgraph=True)(x)[0]
    torch.testing.assert_close(found, module(x)[0])


def test_pickle_after_use():
    """The cells that were made on the way stay out of it."""
    module, x = fastrnn.Regularized(fastrnn.SLSTM(I, H), zoneout=0.5), torch.randn(T, B, I)
    torch.func.jvp(lambda x: module.eval()(x)[0], (x,), (x,))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(x)[0], module(x)[0])
    code = "import pickle, sys, torch, fastrnn; print(pickle.load(sys.stdin.buffer))"
    child = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(module), capture_output=True, check=True)
    assert b"SLSTM(slstm, 5, 4)" in child.stdout


def test_other_layers():
    for layer in (fastrnn.SLSTM(I, H), fastrnn.MGU(I, H), fastrnn.IndRNN(I, H), fastrnn.LSTM(I, H, peephole=True)):
        noise = {} if isinstance(layer, fastrnn.IndRNN) else {"recurrent_dropout": 0.5}
        module = fastrnn.Regularized(layer, zoneout=0.5, **noise)
        output = module(torch.randn(T, B, I))[0]
        output.sum().backward()
        assert output.isfinite().all()
        assert all(p.grad is not None for p in module.parameters())


def test_bad_arguments():
    lstm = fastrnn.LSTM(I, H)
    for options, text in (
        ({"zoneout": 1.5}, "zoneout: expected a probability, got 1.5"),
        ({"zoneout": (0.1,)}, "zoneout: expected one for each of h, c, got 1"),
        ({"recurrent_dropout": 1}, "recurrent_dropout: expected a probability below 1, got 1"),
        ({"weight_dropout": "a"}, "weight_dropout: expected a probability, got 'a'"),
    ):
        with pytest.raises(ValueError, match=text):
            fastrnn.Regularized(lstm, **options)
    for layer, text in (
        (fastrnn.LSTM(I, H, proj_size=2), "without proj_size"),
        (fastrnn.GRU(I, H, weights="int8"), "without weights"),
    ):
        with pytest.raises(ValueError, match=text):
            fastrnn.Regularized(layer, zoneout=0.1)
    with pytest.raises(ValueError, match="recurrent_dropout: expected 0 for cell mingru, which has no recurrent"):
        fastrnn.Regularized(fastrnn.MinGRU(I, H), recurrent_dropout=0.1)
    with pytest.raises(TypeError, match=r"layer: expected a recurrent layer of fastrnn, got LSTM"):
        fastrnn.Regularized(torch.nn.LSTM(I, H), zoneout=0.1)
    module = fastrnn.Regularized(lstm, zoneout=0.1)
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, got int"):
        module(torch.randn(T, B, I), generator=5)
    with pytest.raises(ValueError, match="stream: expected no zoneout"):
        module.stream()
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        module(torch.randn(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, 2)))


def test_explain_tells_the_noise():
    layer = fastrnn.Regularized(fastrnn.LSTM(I, H), recurrent_dropout=0.2, zoneout=(0.1, 0.0), weight_dropout=0.3)
    noise = "recurrent dropout 0.2, zoneout 0.1 of h, weight dropout 0.3"
    first, second = fastrnn.explain(layer, torch.randn(T, B, I)).splitlines()
    assert first == f"noise: {noise}"
    assert second.startswith("layer 0: lstm_noisy_fed_h, 1 direction(s), CPU, ")
    first, second = fastrnn.explain(layer.eval(), torch.randn(T, B, I)).splitlines()
    assert first == f"zoneout's mean (0.1 of h), no noise, since it is not training ({noise})"
    assert second.startswith("layer 0: lstm_noisy_h, ")
    layer = fastrnn.Regularized(fastrnn.GRU(I, H), weight_dropout=0.3)
    lines = fastrnn.explain(torch.nn.Sequential(layer), torch.randn(T, B, I)).splitlines()
    assert lines[0] == "0: noise: weight dropout 0.3"
    assert lines[1].startswith("0: layer 0: gru, ")
    assert len(lines) == 2
    first, second = fastrnn.explain(layer.eval(), torch.randn(T, B, I)).splitlines()
    assert first == "no noise, since it is not training (weight dropout 0.3)"
    assert second.startswith("layer 0: gru, ")


def test_scripting_says_what_to_do():
    with pytest.raises(NotImplementedError, match=r"fastrnn\.Regularized: torch\.jit\.script .* use torch\.jit\.trace"):
        torch.jit.script(torch.nn.Sequential(fastrnn.Regularized(fastrnn.GRU(I, H), zoneout=0.1)))


@pytest.mark.parametrize("training", [True, False])
def test_is_a_leaf_of_fx(training):
    """One node, whatever the mode was: later calls draw noise, or none, as the module does."""
    model = torch.nn.Sequential(
        fastrnn.Regularized(fastrnn.GRU(I, H), recurrent_dropout=0.5, weight_dropout=0.1)
    ).train(training)
    traced = torch.fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
    x = torch.randn(T, B, I)
    for mode in (True, False):
        found = []
        for each in (model.train(mode), traced.train(mode)):
            torch.manual_seed(3)
            found.append(each(x)[0])
        assert torch.equal(*found)
        assert torch.equal(traced(x)[0], found[0]) is not mode
