"""The vector activations of the float32 kernels, over the whole range, in units in the last place."""

import pytest
import torch

import fastrnn
from fastrnn import ops
from fastrnn.reference import Weights

# Everything from denormals through the steep middle to saturation, both signs.
POINTS = torch.cat(
    [torch.logspace(-40, 0, 4001, dtype=torch.float64), torch.linspace(1, 87, 20001, dtype=torch.float64)]
)
POINTS = torch.cat([POINTS, -POINTS]).float()


def tanh(x):
    """tanh of every element, through an Elman layer of one unit with w_ih = 1 and w_hh = 0."""
    y, _, _ = ops.layer("rnn_tanh", x.view(1, -1, 1), None, None, [Weights(torch.ones(1, 1), torch.zeros(1, 1))])
    return y.flatten()


def sigmoid(x):
    """sigmoid of every element: the update gate of a GRU that is asked to mix n = 0 and h = 1."""
    w_ih = torch.tensor([[0.0], [1.0], [0.0]])
    y, _, _ = ops.layer("gru", x.view(1, -1, 1), torch.ones(1, x.numel(), 1), None, [Weights(w_ih, torch.zeros(3, 1))])
    return y.flatten()


@fastrnn.cell(gates="n", states="h")
def exponential(x, u, h):
    return torch.exp(x.n)


@fastrnn.cell(gates="n", states="h")
def log_of_sigmoid(x, u, h):
    return torch.nn.functional.logsigmoid(x.n)


@fastrnn.cell(gates="n", states="h")
def above_zero(x, u, h):
    return fastrnn.cells.step(x.n)


def exp(x):
    y, _, _ = ops.layer(exponential.name, x.view(1, -1, 1), None, None, [Weights(torch.ones(1, 1), None)])
    return y.flatten()


def logsigmoid(x):
    y, _, _ = ops.layer(log_of_sigmoid.name, x.view(1, -1, 1), None, None, [Weights(torch.ones(1, 1), None)])
    return y.flatten()


FUNCTIONS = {
    "tanh": (tanh, torch.tanh),
    "sigmoid": (sigmoid, torch.sigmoid),
    "exp": (exp, torch.exp),
    "logsigmoid": (logsigmoid, torch.nn.functional.logsigmoid),
}


def ulps(found, exact):
    """Distance in units in the last place of the float32 nearest to `exact`."""
    spacing = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs().clamp(min=2.0**-126))[1] - 24)
    return (found.double() - exact).abs() / spacing


@pytest.mark.parametrize(("function", "exact"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_error_in_ulp(function, exact):
    """At most 4: two roundings of the exponential's parts, one each of the sum, the quotient and the result; those of
    exp's root count twice."""
    error = ulps(function(POINTS), exact(POINTS.double()))
    worst = error.argmax()
    assert error[worst] <= 4, f"{error[worst]:.1f} ulp at {POINTS[worst]:g}"


def test_far_out():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -1e30, -200.0, 200.0, 1e30, inf, nan])
    torch.testing.assert_close(tanh(x), torch.tensor([-1.0, -1, -1, 1, 1, 1, nan]), rtol=0, atol=0, equal_nan=True)
    # sigmoid's infinities cannot be asked for this way: the GRU multiplies them by its zero weights. sigmoid(-200) is
    # 1e-87, below float32's range; any number below the smallest normal one, 1e-38, may stand for it.
    expected = torch.tensor([0.0, 0, 1, 1, nan])
    torch.testing.assert_close(sigmoid(x[[1, 2, 3, 4, 6]]), expected, rtol=0, atol=1e-37, equal_nan=True)
    # There e^x is 0 or infinite, and log(sigmoid(x)) is x, or so close to 0 that any number below 1e-37 stands for it.
    expected = torch.tensor([0.0, 0, 0, inf, inf, inf, nan])
    torch.testing.assert_close(exp(x), expected, rtol=0, atol=0, equal_nan=True)
    expected = torch.tensor([-inf, -1e30, -200, 0, 0, 0, nan])
    torch.testing.assert_close(logsigmoid(x), expected, rtol=0, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step(dtype):
    """1 above 0, 0 up to it, exactly; NaN stays NaN; no gradient."""
    tiny, inf, nan = torch.finfo(dtype).tiny, float("inf"), float("nan")
    x = torch.tensor([-inf, -1, -tiny, -0.0, 0, tiny, 1, inf, nan] * 5, dtype=dtype, requires_grad=True)
    expected = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, nan] * 5, dtype=dtype)
    one = Weights(torch.ones(1, 1, dtype=dtype), None)
    for layer in (ops.layer, fastrnn.reference.layer):
        y, _, _ = layer(above_zero.name, x.view(1, -1, 1), None, None, [one])
        torch.testing.assert_close(y.flatten(), expected, rtol=0, atol=0, equal_nan=True)
    finite = x.detach()[torch.isfinite(x)].requires_grad_()
    y, _, _ = ops.layer(above_zero.name, finite.view(1, -1, 1), None, None, [one])
    assert (torch.autograd.grad(y.sum(), finite)[0] == 0).all()
