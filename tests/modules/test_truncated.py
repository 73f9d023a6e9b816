"""`fastrnn.truncated`: against the loop that it replaces, against one call of the whole sequence, and in bounded
memory."""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map
from twins import assert_same, tensors

import fastrnn
from fastrnn import GRU, LSTM, RNN, Dilated, Recurrent, Skip, Stack

T, B, I, H = 23, 4, 3, 5
STEPS = 5  # the last chunk has three
LENGTHS = torch.tensor([23, 12, 0, 5])  # within chunks, before them, and at the end of one

KINDS = {
    "LSTM": lambda **o: LSTM(I, H, 2, **o),
    "LSTM-projected": lambda **o: LSTM(I, H, proj_size=2, **o),
    "LSTM-peephole": lambda **o: LSTM(I, H, peephole=True, **o),
    "GRU": lambda **o: GRU(I, H, **o),
    "RNN-leak": lambda **o: RNN(I, H, leak=torch.nn.Parameter(torch.rand(H)), **o),
    "Recurrent": lambda **o: Recurrent("slstm", I, H, **o),
    "LMU": lambda **o: fastrnn.LMU(I, H, 3, 4.0, **o),
    "Stack": lambda **o: Stack(LSTM(I, H, **o), GRU(H, H, **o), residual=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, **options):
    return KINDS[kind](**options).double()


def walk(module, x, hx=None, lengths=None, resets=None, time=0):
    """The loop as one writes it by hand."""
    for start in range(0, T, STEPS):
        stop = min(start + STEPS, T)
        part = [slice(None)] * time + [slice(start, stop)]
        rows = {} if lengths is None else {"lengths": (lengths - start).clamp(0, stop - start)}
        rows |= {} if resets is None else {"resets": resets[tuple(part)]}
        output, state = module(x[tuple(part)], hx, **rows)
        yield output, state, start, stop
        hx = tree_map(lambda t: t.detach(), state)


def learned(module, chunks):
    """Outputs, states and bounds of all chunks, and the gradients of the parameters."""
    module.zero_grad()
    found = []
    for output, state, start, stop in chunks:
        (output.square().sum() + sum(s.sum() for s in tree_leaves(state))).backward()
        found.append((output.detach(), *(s.detach() for s in tree_leaves(state)), start, stop))
    return found, [p.grad.clone() for p in module.parameters()]


def assert_equal(found, expected):
    """To the bit: they are the same calls."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("layout", ["time-first", "batch-first", "unbatched"])
def test_is_the_loop_by_hand(kind, layout):
    is_batch_first = layout == "batch-first"
    module = made(kind, batch_first=is_batch_first)
    shape = {"time-first": (T, B, I), "batch-first": (B, T, I), "unbatched": (T, I)}[layout]
    x = torch.randn(shape, dtype=torch.float64)
    resets = torch.rand(shape[:-1]) < 0.2
    lengths = torch.tensor(12) if layout == "unbatched" else LENGTHS
    for rows in ({}, {"lengths": lengths}, {"resets": resets}, {"lengths": lengths, "resets": resets}):
        expected = learned(module, walk(module, x, time=int(is_batch_first), **rows))
        assert_equal(learned(module, fastrnn.truncated(module, x, STEPS, **rows)), expected)
        chunks = x.split(STEPS, dim=int(is_batch_first))
        assert_equal(learned(module, fastrnn.truncated(module, iter(chunks), None, **rows)), expected)


@each_kind
def test_values_are_those_of_one_call(kind):
    """Truncation is of gradients alone; with rows that end, and episodes that begin after the end, too."""
    module, x = made(kind), torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.3
    for rows in ({}, {"lengths": LENGTHS, "resets": resets}):
        expected = module(x, **rows)
        chunks = list(fastrnn.truncated(module, x, STEPS, **rows))
        assert_same((torch.cat([chunk.output for chunk in chunks]), chunks[-1].state), expected)


@pytest.mark.parametrize("steps", [1, 4, 7])  # of a chunk: fewer than of the delay, and no multiple of it
@pytest.mark.parametrize(
    "module", [Skip(GRU(I + H, H), steps=4), Dilated(LSTM(I, H), steps=4), fastrnn.DiagonalSSM(I, H)], ids=type
)
def test_values_of_layers_with_delays(module, steps):
    module, x = module.double(), torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.1
    output, _ = module(x, lengths=LENGTHS, resets=resets)
    chunks = fastrnn.truncated(module, x, steps, lengths=LENGTHS, resets=resets)
    assert_same(torch.cat([chunk.output for chunk in chunks]), output)


def test_given_state_has_gradients_of_the_first_chunk():
    module, x = LSTM(I, H).double(), torch.randn(T, B, I, dtype=torch.float64)
    hx = tuple(torch.randn(1, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(module(x[:STEPS], hx)[0].sum(), hx)
    chunks = fastrnn.truncated(module, x, STEPS, hx)
    assert_equal(torch.autograd.grad(sum(chunk.output.sum() for chunk in chunks), hx), expected)


def test_each_chunk_sees_the_parameters_of_its_time():
    module, x = GRU(I, H).double(), torch.randn(T, B, I, dtype=torch.float64)
    twin = GRU(I, H).double()
    twin.load_state_dict(module.state_dict())

    def train(module, chunks):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for output, *_ in chunks:
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
        return list(module.parameters())

    assert_equal(train(module, fastrnn.truncated(module, x, STEPS)), train(twin, walk(twin, x)))


class Model(torch.nn.Module):
    """A module of one's own, over codes `[T]`."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent, self.output = (
            torch.nn.Embedding(7, I),
            torch.nn.LSTM(I, H),
            torch.nn.Linear(H, 7),
        )

    def forward(self, codes, hx=None):
        output, hx = self.recurrent(self.embedding(codes), hx)
        return self.output(output), hx


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_module_of_one_s_own(wrapped):
    module, codes = Model(), torch.randint(7, (T,))
    given = torch.nn.DataParallel(module) if wrapped else module
    assert_equal(learned(module, fastrnn.truncated(given, codes, STEPS)), learned(module, walk(module, codes)))


def test_layout_is_seen_through_a_wrapper():
    module, x = GRU(I, H, batch_first=True), torch.randn(B, T, I)
    chunks = fastrnn.truncated(torch.nn.DataParallel(module), x, STEPS)
    assert_equal([chunk.output for chunk in chunks], [output for output, *_ in walk(module, x, time=1)])


def test_evaluation_and_modes():
    module, x = GRU(I, H), torch.randn(T, B, I)
    chunks = fastrnn.truncated(module, x, STEPS)
    with torch.no_grad():
        assert not next(chunks).output.requires_grad
    chunk = next(chunks)
    assert chunk.output.requires_grad
    assert chunk.state.requires_grad
    assert (chunk.start, chunk.stop) == (5, 10)


def test_nothing_of_a_chunk_is_kept():
    """Where the caller keeps nothing, a chunk is gone when the next one is computed."""
    yielded = []

    def inputs():
        for _ in range(4):
            assert all(output() is None for output in yielded)
            yield torch.randn(STEPS, B, I)

    chunks = fastrnn.truncated(LSTM(I, H), inputs(), None)
    for _ in range(4):
        yielded.append(weakref.ref(next(chunks).output))


WALK = r"""
import pathlib, re, torch, fastrnn
torch.set_num_threads(1)
gru = fastrnn.GRU(4, 8)

def peak(T, steps=2000):
    chunks = (torch.randn(steps, 1, 4) for _ in range(T // steps))
    for output, state, start, stop in fastrnn.truncated(gru, chunks, None):
        output.square().mean().backward()
    assert stop == T
    return int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

before = peak(100_000)
print(peak(1_000_000) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_million_steps():
    """The outputs alone are 32 MB, and what a backward pass reads several times that; an allocator's slack is less
    than 4 MB."""
    command = [sys.executable, "-c", WALK]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4000


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (LSTM(I, H, bidirectional=True), "got LSTM"),
        (Stack(GRU(I, H), GRU(H, H, bidirectional=True)), "got layers.1, GRU"),
        (torch.nn.GRU(I, H, bidirectional=True), "got GRU"),
        (Recurrent("mgu", I, H, bidirectional=True), "got Recurrent"),
    ],
)
def test_two_directions(module, where):
    with pytest.raises(ValueError, match=rf"expected layers of one direction, {where}\(bidirectional=True\)"):
        fastrnn.truncated(module, torch.randn(T, B, I), STEPS)


X = torch.randn(T, B, I)


@pytest.mark.parametrize(
    ("error", "text", "args", "rows"),
    [
        (TypeError, "got a PackedSequence; pad", (pack_sequence([X[:, 0]]), None), {}),
        (TypeError, "steps: expected None, since input is an iterable of chunks, got 5", ([X], 5), {}),
        (TypeError, "steps: expected an int, got NoneType", (X, None), {}),
        (TypeError, "steps: expected an int, got bool", (X, True), {}),
        (ValueError, "steps: expected at least 1, got 0", (X, 0), {}),
        (TypeError, "lengths: expected a tensor, got list", (X, 5), {"lengths": [1] * B}),
        (TypeError, "resets: expected a tensor, got list", (X, 5), {"resets": [True]}),
        (ValueError, r"lengths: expected values in \[0, 23\], got 24", (X, 5), {"lengths": LENGTHS + 1}),
        (ValueError, r"lengths: expected values in \[0, 23\], got -1", (X, 5), {"lengths": LENGTHS - 1}),
        (ValueError, "resets: expected 23 steps, got shape", (X, 5), {"resets": torch.ones(T + 1, B) > 0}),
    ],
)
def test_errors_come_with_the_call(error, text, args, rows):
    with pytest.raises(error, match=text):
        fastrnn.truncated(GRU(I, H), *args, **rows)


def test_errors_of_chunks():
    with pytest.raises(TypeError, match="input: expected an iterable of tensors, got one of str"):
        next(fastrnn.truncated(GRU(I, H), ["x"], None))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        next(fastrnn.truncated(GRU(I, H), X[:0], 5))
    with pytest.raises(TypeError, match=r"pass lengths.long\(\)"):
        next(fastrnn.truncated(GRU(I, H), X, 5, lengths=LENGTHS.int()))
    assert tensors(next(fastrnn.truncated(GRU(I, H), X[:0], 5, lengths=LENGTHS * 0)).state)
