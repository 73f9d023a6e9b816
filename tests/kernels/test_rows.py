"""`lengths` and `resets` of the modules, against torch.nn run on every episode of every row alone."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map
from twins import LAYERS, assert_same, initial_state, make, noise, results, twins

import fastrnn

T, B = 6, 6
LENGTHS = torch.tensor([6, 0, 3, 1, 5, 6])
# By row: none, all, at the start, just before and at a length, somewhere, at the end.
RESETS = torch.tensor(
    [
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 0, 1, 1, 1],
    ],
    dtype=torch.bool,
)
ROWS = {
    "lengths": {"lengths": LENGTHS},
    "resets": {"resets": RESETS},
    "both": {"lengths": LENGTHS, "resets": RESETS},
    "zero-lengths": {"lengths": torch.zeros(B, dtype=torch.int64), "resets": RESETS},
}
OPTIONS = {"one-way": {}, "two-way": {"bidirectional": True}, "stacked": {"bidirectional": True, "num_layers": 2}}
CASES = [*LAYERS, "GRU-reset-before"]

each_layer = pytest.mark.parametrize("case", CASES)
each_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
each_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])


class Alone:
    """Runs `module` on each episode alone: what lengths and resets mean, for a module that knows neither."""

    def __init__(self, module):
        self.module = module
        self.D = 2 if module.bidirectional else 1
        self.named_parameters = module.named_parameters

    def __call__(self, x, hx, lengths=None, resets=None):
        states = hx if isinstance(hx, tuple) else (hx,)
        resets = torch.zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets
        outputs, finals = [], []
        for b in range(x.shape[1]):
            n = len(x) if lengths is None else int(lengths[b])
            output, final = self.row(x[:n, b : b + 1], [s[:, b : b + 1] for s in states], resets[:n, b].tolist())
            outputs.append(torch.cat([output, output.new_zeros(len(x) - n, *output.shape[1:])]))
            finals.append(final)
        finals = tuple(torch.cat(parts, 1) for parts in zip(*finals, strict=True))
        return torch.cat(outputs, 1), finals if isinstance(hx, tuple) else finals[0]

    def row(self, x, states, resets):
        """One row, `x [n, 1, I]`. The state enters the first episode from its front and the last one from its end."""
        if not len(x):
            return x.new_zeros(0, 1, self.D * states[0].shape[2]), states
        reverse = (torch.arange(len(states[0])) % self.D == 1)[:, None, None]
        starts = [0, *(t for t in range(1, len(x)) if resets[t])]
        outputs, finals = [], []
        for start, end in zip(starts, [*starts[1:], len(x)], strict=True):
            kept = torch.where(reverse, end == len(x), start == 0 and not resets[0])
            given = [torch.where(kept, state, 0) for state in states]
            output, final = self.module(x[start:end], tuple(given) if len(given) == 2 else given[0])
            outputs.append(output)
            finals.append(final if isinstance(final, tuple) else (final,))
        return torch.cat(outputs), [
            torch.where(reverse, first, last) for first, last in zip(finals[0], finals[-1], strict=True)
        ]


def pair(case, **options):
    """Our module, and the truth. torch.nn has no reset-before GRU: there it is our own module without the options."""
    if case == "GRU-reset-before":
        module = fastrnn.GRU(5, 7, reset_after=False, dtype=torch.float64, **options)
        return module, Alone(module)
    ours, theirs = twins(case, 5, 7, **options)
    return ours, Alone(theirs)


@each_layer
@each_rows
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows(case, rows, options):
    """Outputs, final states and every gradient."""
    ours, truth = pair(case, **options)
    args = (noise(T, B, 5), initial_state(ours, B))
    assert_same(results(ours, *args, **rows), results(truth, *args, **rows))


@each_layer
@each_rows
def test_batch_first(case, rows):
    """Input and resets are `[B, T]`; nothing else changes."""
    time_first = pair(case, bidirectional=True)[0]
    ours = pair(case, bidirectional=True, batch_first=True)[0]
    ours.load_state_dict(time_first.state_dict())
    x, hx = noise(T, B, 5), initial_state(ours, B)
    given = {name: value.t() if name == "resets" else value for name, value in rows.items()}
    output, state = ours(x.transpose(0, 1), hx, **given)
    assert_same((output.transpose(0, 1), state), time_first(x, hx, **rows))


@each_layer
@each_rows
@pytest.mark.parametrize("row", [2, 4])
def test_unbatched(case, rows, row):
    """A 0-d length and `[T]` resets, with `batch_first` or without."""
    ours, truth = pair(case, bidirectional=True)
    x, hx = noise(T, 5), initial_state(ours)
    given = {name: value[..., row] for name, value in rows.items()}
    batched = {name: value[..., row : row + 1] for name, value in rows.items()}
    states = tuple(s[:, None] for s in hx) if isinstance(hx, tuple) else hx[:, None]
    output, state = truth(x[:, None], states, **batched)
    expected = (output[:, 0], tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0])
    assert_same(ours(x, hx, **given), expected)
    ours.batch_first = True
    assert_same(ours(x, hx, **given), expected)


@each_layer
@each_rows
@each_direction
def test_missing_state_is_zero(case, rows, bidirectional):
    ours, _ = pair(case, bidirectional=bidirectional)
    x, hx = noise(T, B, 5), tree_map(torch.zeros_like, initial_state(ours, B))
    assert_same(results(ours, x, **rows), results(ours, x, hx, **rows))


@each_layer
@each_direction
def test_options_that_change_nothing(case, bidirectional):
    """Full lengths, no reset at all, and resets past the end: the same bits as without."""
    ours, _ = pair(case, bidirectional=bidirectional)
    x, hx = noise(T, B, 5), initial_state(ours, B)
    plain = results(ours, x, hx)
    full, none = torch.full((B,), T), torch.zeros(T, B, dtype=torch.bool)
    for rows in ({"lengths": full}, {"resets": none}, {"lengths": full, "resets": none}):
        torch.testing.assert_close(results(ours, x, hx, **rows), plain, rtol=0, atol=0)
    past = torch.arange(T)[:, None] >= LENGTHS
    expected = results(ours, x, hx, lengths=LENGTHS)
    torch.testing.assert_close(results(ours, x, hx, lengths=LENGTHS, resets=past), expected, rtol=0, atol=0)


@each_layer
@each_direction
def test_no_steps_at_all(case, bidirectional):
    """T = 0 with lengths: the state comes back, and its gradient is the final state's."""
    ours, _ = pair(case, bidirectional=bidirectional, num_layers=2)
    hx = initial_state(ours, B)
    zeros = torch.zeros(B, dtype=torch.int64)
    resets = torch.zeros(0, B, dtype=torch.bool)
    for rows in ({"lengths": zeros}, {"lengths": zeros, "resets": resets}):
        output, state = ours(x := noise(0, B, 5), hx, **rows)
        assert output.shape == (0, B, (ours.proj_size or 7) * (2 if bidirectional else 1))
        assert_same(state, hx)
        leaves = tree_leaves((state, hx))
        grads = torch.autograd.grad(sum(s.sum() for s in leaves[: len(leaves) // 2]), [x, *leaves[len(leaves) // 2 :]])
        assert grads[0].shape == (0, B, 5)
        assert all((grad == 1).all() for grad in grads[1:])
    unbatched, _ = ours(noise(0, 5), lengths=torch.tensor(0))
    assert unbatched.shape == output.shape[::2]


@each_layer
@each_direction
def test_padding_is_never_read(case, bidirectional):
    """NaN in the input and in the gradient past a row's length reaches no output and no gradient."""
    ours, _ = pair(case, bidirectional=bidirectional, num_layers=2)
    padding = (torch.arange(T)[:, None] >= LENGTHS)[:, :, None]
    x, hx = torch.randn(T, B, 5, dtype=torch.float64), initial_state(ours, B)
    found = []
    for filler in (0.0, float("nan")):
        filled = torch.where(padding, filler, x).requires_grad_()
        output, state = ours(filled, hx, lengths=LENGTHS, resets=RESETS)
        leaves = tree_leaves((filled, hx, list(ours.parameters())))
        incoming = torch.where(padding, filler, 1.0).expand_as(output).to(output.dtype)
        found.append((output, state, torch.autograd.grad(output, leaves, incoming)))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert not torch.where(padding, found[1][0], 0).any()
    assert not torch.where(padding, found[1][2][0], 0).any()


@each_layer
@each_direction
def test_nothing_crosses_a_reset(case, bidirectional):
    """NaN in an episode does not reach the other one: not its outputs, nor the gradient of its input."""
    ours, truth = pair(case, bidirectional=bidirectional)
    resets = torch.zeros(T, 2, dtype=torch.bool)
    resets[3] = True
    x, hx = noise(T, 2, 5), initial_state(ours, 2)
    with torch.no_grad():
        x[1, 0] = x[4, 1] = float("nan")
    sound = torch.arange(T)[:, None] < 3
    sound = torch.cat([~sound, sound], 1)
    for name in ("output 0", "gradient of argument 0"):
        found, expected = (results(module, x, hx, resets=resets)[name][sound] for module in (ours, truth))
        assert not expected.isnan().any()
        assert_same(found, expected)


@each_direction
def test_nan_state_is_dropped_by_a_reset(bidirectional):
    """A reset at the first step drops the forward state for good, whatever is in it."""
    ours, _ = pair("LSTM", bidirectional=bidirectional)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0] = True
    hx = initial_state(ours, B)
    zero, bad = (tuple(torch.cat([torch.full_like(s[:1], v), s[1:]]) for s in hx) for v in (0.0, float("nan")))
    x = noise(T, B, 5)
    assert_same(ours(x, bad, resets=resets), ours(x, zero))


@each_rows
def test_dense_or_not(rows):
    """Strided and broadcast lengths and resets."""
    ours, _ = pair("LSTM", bidirectional=True)
    x, hx = noise(T, B, 5), initial_state(ours, B)
    strided = {name: torch.stack([value] * 2, -1)[..., 0] for name, value in rows.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    torch.testing.assert_close(ours(x, hx, **strided), ours(x, hx, **rows), rtol=0, atol=0)


def test_broadcast_resets():
    ours, truth = pair("GRU")
    resets = torch.tensor([False, False, True, False, True, False])[:, None].expand(T, B)
    args = (noise(T, B, 5), initial_state(ours, B))
    assert_same(results(ours, *args, resets=resets), results(truth, *args, resets=resets))


@each_layer
def test_float32_and_sizes_beyond_one_tile(case):
    """Rows end and begin anew inside tiles and inside each thread's share."""
    options = {"bidirectional": True, "dtype": torch.float32}
    if case == "GRU-reset-before":
        ours = fastrnn.GRU(37, 65, reset_after=False, **options)
        truth = Alone(ours)
    else:
        ours, theirs = twins(case, 37, 65, **options)
        truth = Alone(theirs)
    x = noise(5, 13, 37, dtype=torch.float32)
    hx = tree_map(lambda t: t.detach().float().requires_grad_(), initial_state(ours, 13))
    rows = {"lengths": torch.randint(0, 6, (13,)), "resets": torch.rand(5, 13) < 0.3}
    assert_same(results(ours, x, hx, **rows), results(truth, x, hx, **rows), torch.float32)


def test_they_may_be_positional():
    """ONNX's older exporter passes all that the signature names."""
    module, x, resets = make(fastrnn, "GRU", 5, 7), noise(T, B, 5), torch.rand(T, B) < 0.3
    assert_same(module(x, None, LENGTHS, resets), module(x, lengths=LENGTHS, resets=resets))
