"""Two thousand malformed calls, in child processes: each is an error or a result, never a crash or a hang."""

import multiprocessing
import os
import random

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C, ops

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

CALLS = 500  # of each kind
TIMEOUT = 120  # seconds, for all calls of a kind together: they take a few
NAMES = ["RNN", "LSTM", "GRU"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64]


class Maker:
    """Random values, most of them nearly right."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def pick(self, *values):
        return self.random.choice(values)

    def often(self, value, other):
        return value if self.random.random() < 0.95 else other()

    def tensor(self, *shape, dtype=torch.float32):
        """Now and then of another shape, dtype, layout or device, or no tensor at all."""
        shape = [max(0, size + self.often(0, lambda: self.pick(-1, 1, -9, 3))) for size in shape]
        shape = self.often(shape, lambda: self.pick(shape[1:], [1, *shape], shape[::-1], []))
        dtype = self.often(dtype, lambda: self.pick(*DTYPES))
        tensor = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(-3, 9, shape).to(dtype)
        return self.often(tensor, lambda: self.strange(tensor))

    def strange(self, tensor):
        kind = self.pick("none", "number", "list", "meta", "strided", "expanded", "sparse", "grad", "neg")
        if kind in ("none", "number", "list"):
            return {"none": None, "number": 3, "list": [1, 2]}[kind]
        if kind == "meta":
            return tensor.to("meta")
        if kind == "strided":
            return torch.stack([tensor, tensor], -1)[..., 0]
        if kind == "expanded":
            return tensor.flatten()[:1].expand(tensor.shape) if tensor.numel() else tensor
        if kind == "sparse":
            return tensor.to_sparse() if tensor.dim() else tensor
        if kind == "neg":
            return torch._neg_view(tensor) if tensor.is_floating_point() else tensor
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    def integers(self, *shape, low, high):
        values = torch.randint(low, high + 1, shape) if low <= high else torch.zeros(shape, dtype=torch.int64)
        values = self.often(values, lambda: values * self.pick(-1, 2, 2**40, -(2**62)))
        return self.often(values, lambda: self.pick(values.int(), values.float(), values[None], values[1:], None))


def packed_sequence(make):
    """Fields that contradict each other; the constructor, which looks at some, is gone round."""
    m = make
    T, B = m.pick(1, 2, 5), m.pick(1, 3)
    sizes = sorted((m.random.randint(1, B) for _ in range(T)), reverse=True)
    batch_sizes = m.often(torch.tensor(sizes), lambda: m.integers(T, low=-1, high=B + 1))
    data = m.tensor(sum(sizes), 3)
    order = torch.randperm(sizes[0])
    order = m.often(order, lambda: m.integers(sizes[0], low=0, high=sizes[0]))
    inverse = m.often(order, lambda: torch.randperm(sizes[0]))
    if isinstance(inverse, torch.Tensor) and inverse is order and order.dim() == 1:
        inverse = order.argsort()
    indices = m.pick((None, None), (order, inverse), (order, None), (None, inverse))
    packed = tuple.__new__(PackedSequence, (data, batch_sizes, *indices))
    module = getattr(fastrnn, m.pick(*NAMES))(3, 4, m.pick(1, 2), bidirectional=m.pick(True, False))
    state = m.pick(None, m.tensor(module.num_layers * (2 if module.bidirectional else 1), sizes[0], 4))
    return lambda: module(packed, (state, state) if isinstance(module, fastrnn.LSTM) and state is not None else state)


def module_call(make):
    m = make
    T, B, D = m.pick(0, 1, 5), m.pick(0, 1, 3), m.pick(1, 2)
    options = {"bidirectional": D == 2, "batch_first": m.pick(True, False), "recompute": m.pick(True, False)}
    options["weights"] = m.pick(None, None, "bf16")
    module = getattr(fastrnn, m.pick(*NAMES))(3, 4, **options)
    x = m.tensor(B, T, 3) if module.batch_first else m.tensor(T, B, 3)
    h, c = m.tensor(D, B, 4), m.tensor(D, B, 4)
    state = m.pick(None, h, (h, c), (h,), [h, c])
    lengths = m.pick(None, m.integers(B, low=0, high=T))
    resets = m.pick(None, m.tensor(T, B, dtype=torch.bool))
    return lambda: module(x, state, lengths=lengths, resets=resets)


def cell_call(make):
    m = make
    name = m.pick("RNNCell", "LSTMCell", "GRUCell")
    module = getattr(fastrnn, name)(3, 4)
    x, h, c = m.tensor(2, 3), m.tensor(2, 4), m.tensor(2, 4)
    layer = fastrnn.GRU(3, 4, weights=m.pick(None, "bf16"))
    step = layer.stream(2, copy=m.pick(True, False))
    rows = m.pick(None, m.tensor(2, dtype=torch.bool))
    return m.pick(lambda: module(x, m.pick(None, h, (h, c), (c,))), lambda: step(x), lambda: step.reset(rows))


def raw_call(make):
    """Of an op, with up to two arguments replaced."""
    m = make
    cell = m.pick(*_C.cells())
    G, D, T, B = _C.cells()[cell]["gates"], m.pick(1, 2), m.pick(0, 1, 4), m.pick(1, 3)
    shapes = [[G * 4, 3], [G * 4, 4], [G * 4], [G * 4]]
    inputs = [torch.randn(T, B, 3), torch.randn(D, B, 4), torch.randn(D, B, 4)]
    inputs += [[torch.randn(shape) for _ in range(D) for shape in shapes], D, None, None, None]
    forward = ops.torch.ops.fastrnn.layer_forward
    y, h_n, c_n, saved, saved_c = forward(*inputs, cell, True)
    grads = [torch.ones_like(y), torch.ones_like(h_n), torch.ones_like(c_n) if len(c_n) else None]
    wanted = [m.pick(True, False) for _ in range(3 + len(inputs[3]))]
    values = torch.zeros(D, T, B, _C.cells()[cell]["grads"], 4)
    of_steps = m.pick([], [torch.ones_like(saved_c), m.pick(True, False), m.pick(None, values)])
    packed = torch.zeros(m.pick(0, 64, 1000), dtype=torch.uint8)
    rows = m.pick([None, None], [torch.tensor([T] * B), torch.zeros(T, B, dtype=torch.bool)])
    op, arguments = m.pick(
        (forward, [*inputs, cell, True, False]),
        (ops.torch.ops.fastrnn.layer_backward, [*grads, *inputs, cell, y, saved, saved_c, wanted, *of_steps]),
        (ops.torch.ops.fastrnn.packed_forward, [*inputs, cell, m.pick(None, "bf16", "int8", "int4"), packed]),
        (ops.torch.ops.fastrnn.explain, [inputs[0], cell, 4, 4, D, False, True]),
        (
            _C.eager_forward,
            [
                cell,
                m.pick(None, "bf16", "int8", "int4", True),
                False,
                m.pick({}, {0: packed}),
                m.pick(0, 1, 2),
                *inputs[:3],
                m.pick(tuple(inputs[3]), tuple(inputs[3]) * 2),
                D,
                m.pick(0.0, 0.5, -1, float("nan")),
                *rows,
            ],
        ),
    )
    for _ in range(m.pick(0, 1, 1, 2)):
        at = m.random.randrange(len(arguments))
        arguments[at] = other_argument(m, arguments[at])
    return lambda: op(*arguments)


def other_argument(m, value):
    if isinstance(value, list | tuple) and value:
        changed = list(value)
        at = m.random.randrange(len(changed))
        changed[at] = other_argument(m, changed[at])
        return type(value)(m.pick(changed, changed[:-1], changed + changed[:1], changed[::-1], []))
    if isinstance(value, torch.Tensor):
        return m.tensor(*value.shape, dtype=m.pick(value.dtype, *DTYPES))
    if isinstance(value, bool):
        return m.pick(not value, None, 2)
    if isinstance(value, int):
        return m.pick(0, -1, 3, 2**31, -(2**63), 2**62, None)
    if isinstance(value, str):
        return m.pick("", "tree", *_C.cells())
    return m.pick(m.tensor(4, 2), m.integers(3, low=0, high=4), m.tensor(4, 3, dtype=torch.bool), [], 1)


def use(make, counts, progress):
    for seed in range(CALLS):
        progress.value = seed
        try:
            results = make(Maker(seed))()
        except Exception:
            counts[0] += 1
        else:
            counts[1] += 1
            for tensor in tree_leaves(results):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    tensor.sum()  # every element is there to be read


@pytest.mark.parametrize("make", [packed_sequence, module_call, cell_call, raw_call], ids=lambda f: f.__name__)
def test_malformed(make):
    context = multiprocessing.get_context("fork")
    counts, progress = context.Array("i", 2), context.Value("i", -1)
    child = context.Process(target=use, args=(make, counts, progress), daemon=True)
    child.start()
    child.join(TIMEOUT)
    hangs = child.is_alive()
    child.kill()
    assert not hangs, f"call {progress.value} hangs"
    assert child.exitcode == 0, f"call {progress.value} ends the process: {child.exitcode}"
    refused, computed = counts
    assert refused + computed == CALLS
    assert min(refused, computed) > CALLS / 20  # both kinds are there, or nothing is tested
