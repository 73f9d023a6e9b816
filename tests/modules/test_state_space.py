"""`fastrnn.DiagonalSSM` against its complex recurrence and its closed form, in NumPy."""

import numpy as np
import pytest
import torch

from fastrnn import DiagonalSSM


def make(**options):
    layer = DiagonalSSM(3, 5, dt_min=0.05, dt_max=0.5, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.log_rate, std=0.5)
    return layer


def complex_system(layer):
    """The definition: A and B held for a step."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    a = -np.exp(p["log_rate"]) + 1j * p["frequency"]
    b = p["weight_re"] + 1j * p["weight_im"]
    a_bar = np.exp(np.exp(p["log_dt"]) * a)
    return a_bar, ((a_bar - 1) / a)[:, None] * b


def test_is_the_recurrence():
    layer = make()
    x, s = torch.randn(9, 2, 3, dtype=torch.float64), torch.randn(2, 1, 2, 5, dtype=torch.float64)
    y, (re, im) = layer(x, tuple(s))
    a, b = complex_system(layer)
    state = s[0, 0].numpy() + 1j * s[1, 0].numpy()
    for now, found in zip(x.numpy(), y.detach().numpy(), strict=True):
        state = a * state + now @ b.T
        np.testing.assert_allclose(found, state.real, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(re[0].detach().numpy(), state.real, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(im[0].detach().numpy(), state.imag, rtol=1e-11, atol=1e-12)


def test_is_the_convolution():
    """An impulse's response is Re(A^t B), for any t at once."""
    layer = make()
    x = torch.zeros(50, 1, 3, dtype=torch.float64)
    x[0, 0, 1] = 1
    a, b = complex_system(layer)
    expected = (a ** np.arange(50)[:, None] * b[:, 1]).real
    np.testing.assert_allclose(layer(x)[0][:, 0].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_unit_without_a_frequency_is_an_exponential_average():
    layer = DiagonalSSM(1, 1, dt_min=0.1, dt_max=0.1, dtype=torch.float64)
    torch.nn.init.ones_(layer.weight_re)
    y, _ = layer(torch.ones(30, 1, 1, dtype=torch.float64))
    t = 0.1 * np.arange(1, 31)
    np.testing.assert_allclose(y[:, 0, 0].detach().numpy(), 2 * (1 - np.exp(-t / 2)), rtol=1e-12)


def test_gradients():
    layer = make(batch_first=True)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 2]), torch.rand(2, 4) < 0.3
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, None, *rows)[0], (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x, None, *rows)[0], (x, *layer.parameters()))


def test_has_what_layers_have():
    layer = DiagonalSSM(3, 5)
    x = torch.randn(9, 2, 3)
    whole, final = layer(x)
    first, state = layer(x[:4])
    second, end = layer(x[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, final)
    step = layer.stream(2)
    torch.testing.assert_close(torch.stack([step(x[t]).clone() for t in range(9)]), whole)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], whole)
    again = DiagonalSSM(3, 5)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], whole)
    assert repr(layer) == "DiagonalSSM(3, 5, dt_min=0.001, dt_max=0.1)"
    torch.manual_seed(1)
    assert (layer.frequency == torch.pi * torch.arange(5)).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        DiagonalSSM(3, 0)
    with pytest.raises(ValueError, match=r"dt_min, dt_max: expected positive numbers in order, got 0.2, 0.1"):
        DiagonalSSM(3, 5, dt_min=0.2)
    with pytest.raises(TypeError, match="dt_min: expected a number, got str"):
        DiagonalSSM(3, 5, "a")
    with pytest.raises(TypeError, match="recompute: expected a bool"):
        DiagonalSSM(3, 5, recompute=1)
    with pytest.raises(TypeError, match=r"hx: expected a tuple \(h_0, v_0\)"):
        DiagonalSSM(3, 5)(torch.zeros(2, 1, 3), torch.zeros(1, 1, 5))


@pytest.mark.parametrize("dt", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("log_rate", [2.0, -0.7, -20.0, -80.0])
def test_float32_is_as_good_as_its_numbers(dt, log_rate):
    """A few roundings of B's factor and of its gradients, however small the step, the rate and the frequency are."""
    exact = DiagonalSSM(2, 3, dt, dt, dtype=torch.float64)
    torch.nn.init.constant_(exact.log_rate, log_rate)
    layer = DiagonalSSM(2, 3, dt, dt)
    layer.load_state_dict(exact.state_dict())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            exact.get_parameter(name).copy_(parameter)
    found, expected = layer.discrete(), exact.discrete()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-7 * b.abs().max().item())
    for a, b in zip(found[2:], expected[2:], strict=True):
        grads = [
            torch.autograd.grad(part.sum(), m.log_dt, retain_graph=True)[0] for part, m in ((a, layer), (b, exact))
        ]
        largest = grads[1].abs().max().item()
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-4 * largest)


def test_float16_has_all_units():
    layer = DiagonalSSM(3, 128)
    y = layer.half()(torch.randn(20, 1, 3).half())[0]
    assert y.isfinite().all()
    assert not (y == 0).all(0).any()
