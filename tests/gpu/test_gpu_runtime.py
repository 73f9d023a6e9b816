"""What surrounds a call on the GPU: streams, graphs, compilation, several devices, memory that is short."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_cases import LEVELS
from twins import tensors

import fastrnn

ROOT = Path(__file__).resolve().parents[2]

each_level = pytest.mark.parametrize("level", LEVELS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(name: str = "LSTM", dtype=torch.float32, **options) -> torch.nn.Module:
    """A module of 104 units in two layers, which all levels can run, and half a millisecond of work for each."""
    return getattr(fastrnn, name)(33, 104, 2, device="cuda", dtype=dtype, **options)


def draw(*shape: int, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


def step(module, optimizer, x, upstream) -> None:
    """One step of training."""
    module(x)[0].backward(upstream)
    optimizer.step()


def warm_up(call) -> None:
    """As torch asks for before a capture: a few calls on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


# ---- CUDA graphs


@pytest.mark.quick
@each_level
@each_dtype
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_replayed_graph_gives_the_bits_of_a_call(name, dtype, level, force):
    force(level)
    module, x = make(name, dtype, bidirectional=True), draw(7, 5, 33, dtype=dtype)
    lengths = torch.tensor([7, 2, 0, 5, 7], device="cuda")
    with torch.no_grad():
        warm_up(lambda: module(x, lengths=lengths))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x, lengths=lengths)
        for _ in range(3):
            x.copy_(draw(7, 5, 33, dtype=dtype))
            lengths.copy_(torch.randint(0, 8, (5,)))
            graph.replay()
            assert equal(captured, module(x, lengths=lengths))


@pytest.mark.quick
@each_level
@each_dtype
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_replayed_step_of_training_gives_the_bits_of_an_eager_one(name, dtype, level, force):
    force(level)
    captured = make(name, dtype)
    eager = copy.deepcopy(captured)
    optimizers = {module: torch.optim.SGD(module.parameters(), lr=0.1) for module in (captured, eager)}
    x, upstream = draw(7, 5, 33, dtype=dtype), draw(7, 5, 104, dtype=dtype)
    warm_up(lambda: step(captured, optimizers[captured], x, upstream))
    captured.load_state_dict(eager.state_dict())
    optimizers[captured].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[captured], x, upstream)
    for _ in range(3):
        x.copy_(draw(7, 5, 33, dtype=dtype))
        graph.replay()
        optimizers[eager].zero_grad(set_to_none=True)
        step(eager, optimizers[eager], x, upstream)
        assert equal(list(captured.parameters()), list(eager.parameters()))


# ---- streams and devices


@pytest.mark.quick
@each_level
def test_work_goes_to_the_current_stream(level, force):
    """The input is written on the stream after a long wait: a call on another stream would read what was there
    before."""
    force(level)
    module, x, upstream = make(), draw(7, 5, 33), draw(7, 5, 104)
    expected = outputs_and_grad(module, x, upstream)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        late.copy_(x)
        found = outputs_and_grad(module, late, upstream)
    stream.synchronize()
    assert equal(found, expected)


def outputs_and_grad(module, x, upstream):
    x = x.detach().requires_grad_()
    y, state = module(x)
    return y.detach(), tensors(state), torch.autograd.grad(y, x, upstream)


@pytest.mark.quick
@each_level
@each_dtype
def test_two_streams_at_once(dtype, level, force):
    """Two launches that fill the chip, each of which has to be on it as a whole."""
    force(level)
    modules = [fastrnn.LSTM(64, 512, device="cuda", dtype=dtype) for _ in range(2)]
    inputs = [draw(50, 33, 64, dtype=dtype) for _ in modules]
    with torch.no_grad():
        expected = [module(x) for module, x in zip(modules, inputs, strict=True)]
        streams = [torch.cuda.Stream() for _ in modules]
        torch.cuda.synchronize()
        found = []
        for _ in range(10):
            for module, x, stream in zip(modules, inputs, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(module(x))
        torch.cuda.synchronize()
    for index, result in enumerate(found):
        assert equal(result, expected[index % 2])


@pytest.mark.quick
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one CUDA device")
@each_level
def test_a_device_that_is_not_the_current_one(level, force):
    force(level)
    module, x, upstream = make(), draw(7, 5, 33), draw(7, 5, 104)
    expected = outputs_and_grad(module, x, upstream)
    found = outputs_and_grad(module.to("cuda:1"), x.to("cuda:1"), upstream.to("cuda:1"))
    assert {tensor.device.index for tensor in tensors(found)} == {1}
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(tensors(found), tensors(expected), strict=True))


# Prints the sums of the outputs and gradients of a module, to the bit.
PROGRAM = """
import os, torch, fastrnn
torch.backends.cudnn.allow_tf32 = False
for os.environ["FASTRNN_CUDA_LEVEL"] in ("stepwise", "gemm", "persistent"):
    torch.manual_seed(0)
    module, x = fastrnn.LSTM(33, 104, 2, device="cuda"), torch.randn(7, 5, 33, device="cuda", requires_grad=True)
    y, _ = module(x)
    grads = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    print(*(tensor.double().sum().item().hex() for tensor in (y, *grads)))
"""


def test_launches_that_wait(monkeypatch, capsys):
    """CUDA_LAUNCH_BLOCKING=1, which a process must start with, gives the same bits, forward and backward."""
    monkeypatch.setenv("FASTRNN_CUDA_LEVEL", "")  # put back after the test
    exec(PROGRAM, {})
    here = capsys.readouterr().out
    assert len(here.split()) == 3 * (2 + 8)
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == here, done.stderr


@pytest.mark.quick
@each_level
def test_explain_tells_the_level(level, force):
    force(level)
    text = fastrnn.explain(make(), draw(7, 5, 33))
    assert text.count(f"forward: {level}, ") == text.count(f"backward: {level}, ") == 2


# ---- memory


@pytest.mark.quick
def test_memory_that_is_short_is_an_error_and_nothing_else():
    """The output of 2^25 rows and 4096 units would have 550 GB."""
    module = fastrnn.RNN(1, 4096, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        module(draw(2**19, 64, 1))
    output, _ = module(draw(3, 2, 1))
    assert output.isfinite().all()


@pytest.mark.quick
@each_level
def test_calls_hold_no_memory(level, force):
    """After a call only its results are there; after they are dropped, nothing."""
    force(level)
    module, x = make(), draw(7, 5, 33)
    step(module, torch.optim.SGD(module.parameters(), lr=0.1), x, draw(7, 5, 104))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        y, _ = module(x)
        torch.autograd.grad(y.sum(), list(module.parameters()))
        del y, _
    for _ in range(100):  # the thread that walked backward may drop what it had after the call has returned
        if torch.cuda.memory_allocated() == before:
            break
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before


# ---- compilation


class Model(torch.nn.Module):
    """A recurrent layer between two others."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = torch.nn.Linear(5, 33), fastrnn.LSTM(33, 100), torch.nn.Linear(100, 3)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x).relu())[0])


def test_a_compiled_model_is_one_graph_with_the_same_results():
    """Also the gradients. Compiled code may fuse the layers around ours, and rounds there in its own way."""
    pytest.importorskip("triton")
    torch.compiler.reset()
    model, x = Model().cuda(), draw(7, 5, 5)
    compiled = torch.compile(model, fullgraph=True)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, list(model.parameters()), upstream) for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
