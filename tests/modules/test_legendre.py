"""The Legendre memory and the LMU against the lecture's formulas, SciPy's discretization and the paper's recurrence."""

import itertools
from math import comb

import numpy as np
import pytest
import torch
from scipy.signal import cont2discrete

import fastrnn
from fastrnn import LMU, LegendreMemory, legendre


def system(d):
    """The lecture's A and B, element by element."""
    a = np.array([[(2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1)) for j in range(d)] for i in range(d)], float)
    return a, np.array([[(2 * i + 1) * (-1) ** i] for i in range(d)], float)


@pytest.mark.parametrize(("d", "theta"), [(1, 3.0), (6, 10.0), (20, 100.5), (256, 784.0)])
def test_matrices(d, theta):
    """SciPy's zero-order hold takes the same exponential of other sums: of the norm of A some 1e-14."""
    a, b = system(d)
    for found, expected in zip(legendre.continuous(d), (a, b[:, 0]), strict=True):
        np.testing.assert_array_equal(found.numpy(), expected)
    expected = cont2discrete((a / theta, b / theta, np.eye(d), np.zeros((d, 1))), 1.0, method="zoh")
    for found, exact in zip(legendre.discrete(d, theta), (expected[0], expected[1][:, 0]), strict=True):
        np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-10)


def test_polynomials():
    """The lecture's sum of binomials."""
    r = np.linspace(0, 1, 7)
    exact = [
        [(-1) ** i * sum(comb(i, j) * comb(i + j, j) * (-x) ** j for j in range(i + 1)) for i in range(9)] for x in r
    ]
    np.testing.assert_allclose(legendre.polynomials(9, torch.from_numpy(r)).numpy(), exact, rtol=0, atol=1e-9)


def by_steps(d, theta, u, m=None):
    a, b = (part.numpy() for part in legendre.discrete(d, theta))
    m = np.zeros((*u.shape[1:], d)) if m is None else m
    found = []
    for now in u:
        m = m @ a.T + now[..., None] * b
        found.append(m)
    return np.stack(found) if found else np.zeros((0, *m.shape)), m


@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("with_state", [False, True])
def test_memory_by_chunks_is_the_recurrence(T, with_state):
    d, theta = 7, 20.0
    u, m = np.random.randn(T, 3, 2), np.random.randn(3, 2, d) if with_state else None
    memory = LegendreMemory(d, theta, batch_first=True, dtype=torch.float64)
    x, state = torch.from_numpy(u).transpose(0, 1), None if m is None else torch.from_numpy(m)
    found, last = memory(x, state)
    expected, final = by_steps(d, theta, u, m)
    np.testing.assert_allclose(found.transpose(0, 1).numpy(), expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(last.numpy(), final, rtol=1e-10, atol=1e-11)
    # and so is the fused recurrence, which streams use
    step = memory.stream(6)
    if m is not None:
        step.state[0] = state.reshape(6, d)
    streamed = [step(torch.from_numpy(now).reshape(6, 1)).clone().view(3, 2, d) for now in u]
    np.testing.assert_allclose(torch.stack(streamed).numpy(), expected, rtol=1e-10, atol=1e-11)


def test_memory_of_no_steps():
    memory = LegendreMemory(4, 9.0)
    states, last = memory(torch.zeros(0, 2, 3), torch.ones(2, 3, 4))
    assert states.shape == (0, 2, 3, 4)
    assert (last == 1).all()


def test_memory_s_gradients():
    memory = LegendreMemory(3, 9.0, dtype=torch.float64)
    u, m = torch.randn(35, 1, 1, dtype=torch.float64), torch.randn(1, 1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(memory, (u.requires_grad_(), m.requires_grad_()))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("with_lengths", "with_resets"), [(True, False), (False, True), (True, True)])
def test_memory_with_lengths_and_resets(with_lengths, with_resets, batch_first, with_state):
    """Row by row, from each reset on, as far as it goes."""
    d, T, B, I = 5, 40, 4, 2
    u, m = torch.randn(T, B, I, dtype=torch.float64), torch.randn(B, I, d, dtype=torch.float64)
    lengths = torch.tensor([T, 13, 0, 1]) if with_lengths else None
    resets = torch.rand(T, B) < 0.1 if with_resets else None
    expected = torch.zeros(T, B, I, d, dtype=torch.float64)
    ends = m.clone() if with_state else torch.zeros_like(m)
    for b in range(B):
        end = T if lengths is None else int(lengths[b])
        starts = [0, *([] if resets is None else resets[:end, b].nonzero().flatten().tolist()), end]
        for index, (start, stop) in enumerate(itertools.pairwise(starts)):
            state = ends[b].numpy() if index == 0 else np.zeros((I, d))
            found, last = by_steps(d, 15.0, u[start:stop, b].numpy(), state)
            expected[start:stop, b], ends[b] = torch.from_numpy(found), torch.from_numpy(last)
    memory = LegendreMemory(d, 15.0, batch_first=batch_first, dtype=torch.float64)
    layout = (lambda tensor: tensor.transpose(0, 1)) if batch_first else (lambda tensor: tensor)
    marks = None if resets is None else layout(resets)
    found, last = memory(layout(u), m if with_state else None, lengths, marks)
    torch.testing.assert_close(layout(found), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(last, ends, rtol=1e-10, atol=1e-11)


def test_memory_s_gradients_with_lengths_and_resets():
    memory = LegendreMemory(3, 9.0, dtype=torch.float64)
    u, m = torch.randn(5, 2, 2, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    rows = torch.tensor([5, 3]), torch.rand(5, 2) < 0.3
    assert torch.autograd.gradcheck(lambda *given: memory(*given, *rows), (u.requires_grad_(), m.requires_grad_()))


@pytest.mark.parametrize("with_lengths", [False, True])
def test_memory_of_low_precision(with_lengths):
    """A window of 1000 steps, whose matrices bfloat16 cannot tell from the identity and zero: ones stay [1, 0, 0]."""
    u = torch.ones(3000, 1, 1)
    lengths = torch.tensor([3000]) if with_lengths else None
    memory = LegendreMemory(3, 1000.0)
    with torch.autocast("cpu", torch.bfloat16):
        states, last = memory(u, None, lengths)
        memory(u, last, lengths)
    assert (states.dtype, last.dtype) == (torch.float32, torch.float32)
    expected = torch.tensor([[[1.0, 0.0, 0.0]]])
    torch.testing.assert_close(last, expected, rtol=0, atol=0.05)
    states, last = memory.bfloat16()(u.bfloat16(), None, lengths)
    assert (states.dtype, last.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(last.float(), expected, rtol=0, atol=0.05)


def test_memory_of_no_steps_with_rows():
    memory, u, m = LegendreMemory(4, 9.0), torch.zeros(0, 2, 3), torch.ones(2, 3, 4)
    for rows in ({"lengths": torch.zeros(2, dtype=torch.int64)}, {"resets": torch.zeros(0, 2, dtype=torch.bool)}):
        states, last = memory(u, m, **rows)
        assert states.shape == (0, 2, 3, 4)
        assert torch.equal(last, m)


def test_memory_s_bad_rows():
    memory, u = LegendreMemory(3, 9.0), torch.randn(5, 2, 1)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\), got \(3,\)"):
        memory(u, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match=r"resets: expected a tensor of dtype torch\.bool"):
        memory(u, resets=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="lengths: expected values"):
        memory(u, lengths=torch.tensor([1, 6]))


def test_decodes_what_was_there():
    """Order 12 over 100 steps: a sine of period 50, at every delay, within 2 %; 4 coefficients cannot hold it."""
    t = torch.arange(400.0)
    u = torch.sin(2 * torch.pi * t / 50)
    delays = torch.tensor([0.0, 25, 50, 99])
    errors = {}
    for order in (4, 12):
        memory = LegendreMemory(order, 100.0)
        m, _ = memory(u[:, None, None])
        found = m[200:, 0, 0] @ memory.decoder(delays).T
        exact = torch.stack([u[200 - int(delay) : 400 - int(delay)] for delay in delays], dim=1)
        errors[order] = (found - exact).abs().amax(0)
    assert (errors[12][1:] < 0.02).all()
    assert (errors[4][1:] > 0.1).all()


def lmu_by_steps(layer, x, h, m):
    """The paper's three lines, in NumPy."""
    p = {name: value.detach().numpy() for name, value in [*layer.named_parameters(), *layer.named_buffers()]}
    M, d = layer.memory_size, layer.order
    b = p.get("bias", 0)
    outputs = []
    for now in x:
        u = now @ p["input_encoders"].T + h @ p["hidden_encoders"].T + m @ p["memory_encoders"].T
        m = (m.reshape(-1, M, d) @ p["A"].T + u[:, :, None] * p["B"]).reshape(-1, M * d)
        h = np.tanh(now @ p["input_kernel"].T + h @ p["hidden_kernel"].T + m @ p["memory_kernel"].T + b)
        outputs.append(h)
    return np.stack(outputs), h, m


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_lmu_is_the_paper_s(M, bias):
    layer = LMU(3, 5, order=4, theta=12.0, memory_size=M, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, h, m = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 2, 3), (1, 2, 5), (1, 2, 4 * M)))
    y, (h_n, m_n) = layer(x, (h, m))
    expected = lmu_by_steps(layer, x.numpy(), h[0].numpy(), m[0].numpy())
    for found, exact in zip((y, h_n[0], m_n[0]), expected, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), exact, rtol=1e-11, atol=1e-12)


def test_lmu_s_gradients():
    layer = LMU(2, 3, order=2, theta=5.0, memory_size=2, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.memory_encoders, std=0.3)
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 2]), torch.rand(2, 4) < 0.3
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, None, *rows)[0], (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x, None, *rows)[0], (x, *layer.parameters()))


def test_lmu_has_what_layers_have():
    layer = LMU(3, 5, order=4, theta=12.0)
    x = torch.randn(9, 2, 3)
    whole, (h, m) = layer(x)
    first, state = layer(x[:4])
    second, end = layer(x[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, (h, m))
    step = layer.stream(2)
    torch.testing.assert_close(torch.stack([step(x[t]).clone() for t in range(9)]), whole)
    assert step.nbytes > sum(weight.nbytes for weight in layer.parameters())
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([9, 4]))
    short, _ = torch.nn.utils.rnn.pad_packed_sequence(layer(packed)[0])
    torch.testing.assert_close(short[:4], whole[:4])
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], whole)
    again = LMU(3, 5, order=4, theta=12.0)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], whole)
    assert repr(layer) == "LMU(3, 5, order=4, theta=12.0)"


def test_bad_arguments():
    for kind, sizes in ((LegendreMemory, ()), (LMU, (3, 5))):
        with pytest.raises(ValueError, match="order must be greater than zero, got 0"):
            kind(*sizes, order=0, theta=1.0)
        with pytest.raises(ValueError, match="theta: expected a positive number of steps, got 0"):
            kind(*sizes, order=2, theta=0)
    with pytest.raises(ValueError, match="memory_size must be greater than zero"):
        LMU(3, 5, 2, 4.0, memory_size=0)
    with pytest.raises(TypeError, match="bias: expected a bool, got int"):
        LMU(3, 5, 2, 4.0, bias=1)
    memory = LegendreMemory(4, 9.0)
    with pytest.raises(ValueError, match=r"input: expected 3 dimensions of torch\.float32, got 2 of torch\.float32"):
        memory(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"got 3 of torch\.float64"):
        memory(torch.zeros(3, 2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"hx: expected shape \(2, 1, 4\) of torch\.float32, got \(1, 2, 4\)"):
        memory(torch.zeros(3, 2, 1), torch.zeros(1, 2, 4))
    layer = LMU(3, 5, 2, 4.0)
    with pytest.raises(RuntimeError, match=r"hx: m: expected 2 features, got shape \(1, 2, 3\)"):
        layer(torch.zeros(4, 2, 3), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 3)))
    with pytest.raises(TypeError, match=r"hx: expected a tuple \(h_0, m_0\)"):
        layer(torch.zeros(4, 2, 3), torch.zeros(1, 2, 7))


def test_refuses_what_only_torch_nn_s_layers_can():
    with pytest.raises(NotImplementedError, match="compiles Python code"):
        torch.jit.script(fastrnn.LMU(3, 5, 2, 4.0))


def test_readers_know_it():
    model = torch.nn.Sequential(fastrnn.LMU(3, 5, 2, 4.0))
    assert "call_module" in {node.op for node in torch.fx.symbolic_trace(model).graph.nodes}
    assert "0: layer 0: lmu, 1 direction(s), CPU" in fastrnn.explain(model, torch.randn(3, 2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_no_step_before_it(value):
    memory, u = LegendreMemory(4, 10.0), torch.randn(70, 2, 1)
    expected, _ = memory(u)
    u[40, 1] = value
    found, last = memory(u)
    assert torch.equal(found[:40], expected[:40])
    assert torch.equal(found[:, 0], expected[:, 0])
    assert not found[40:, 1].isfinite().any()
    assert not last[1].isfinite().any()


@pytest.mark.parametrize("make", [lambda theta: LegendreMemory(4, theta), lambda theta: LMU(1, 3, 4, theta)])
def test_window_is_the_constructor_s(make):
    """And so is what is derived from it: none of it is in a state_dict, and meta modules get it by reset_parameters."""
    module, x = make(10.0), torch.randn(50, 1, 1)
    before = module.A.clone()
    module.load_state_dict(make(99.0).state_dict())
    assert torch.equal(module.A, before)
    late = make(10.0).to("meta").to_empty(device="cpu")
    late.reset_parameters()
    late.load_state_dict(module.state_dict())
    assert torch.equal(late(x)[0], module(x)[0])


def test_lmu_streams_in_a_stack():
    stack = fastrnn.Stack(fastrnn.LSTM(3, 5), LMU(5, 5, 2, 9.0), LMU(5, 5, 3, 9.0), residual=True)
    x = torch.randn(6, 2, 3)
    step = stack.stream(2)
    torch.testing.assert_close(torch.stack([step(now).clone() for now in x]), stack(x)[0])
    states = stack(x)[1]
    torch.testing.assert_close(step.state[2], states[2])


def test_lmu_s_states_in_the_wrong_order():
    layer, x = LMU(3, 4, 5, 10.0), torch.zeros(6, 2, 3)
    with pytest.raises(RuntimeError, match=r"hx: h: expected 4 features, got shape \(1, 2, 5\)"):
        layer(x, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4)))
    with pytest.raises(TypeError, match="hx: h: expected a tensor, got NoneType"):
        layer(x, (None, None))
