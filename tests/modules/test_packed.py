"""PackedSequence against torch.nn, sorted or not."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves
from twins import LAYERS, assert_same, initial_state, results, twins

import fastrnn

LENGTHS = {"sorted": [5, 3, 3, 1], "unsorted": [3, 5, 1, 3]}

each_layer = pytest.mark.parametrize("case", LAYERS)
each_order = pytest.mark.parametrize("order", LENGTHS)


def pack(order: str, size: int = 5) -> PackedSequence:
    """A batch of four sequences whose packed data asks for a gradient."""
    packed = pack_padded_sequence(
        torch.randn(5, 4, size, dtype=torch.float64), LENGTHS[order], enforce_sorted=order == "sorted"
    )
    packed.data.requires_grad_()
    return packed


@each_layer
@each_order
@pytest.mark.parametrize("with_hx", [False, True], ids=["no-hx", "hx"])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}], ids=["plain", "all"]
)
def test_packed(case, order, with_hx, options):
    """Outputs, states in the caller's order, and every gradient."""
    ours, theirs = twins(case, 5, 7, **options)
    args = (pack(order), initial_state(ours, 4)) if with_hx else (pack(order),)
    assert_same(results(ours, *args), results(theirs, *args))


@each_order
def test_output_is_packed_as_the_input(order):
    """The same sizes and indices, so that it can be padded, or fed to the next module."""
    ours, theirs = twins("LSTM", 5, 5)
    packed = pack(order)
    output, expected = ours(packed)[0], theirs(packed)[0]
    assert type(output) is PackedSequence
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert output.sorted_indices is packed.sorted_indices
    assert output.unsorted_indices is packed.unsorted_indices
    assert_same(pad_packed_sequence(output), pad_packed_sequence(expected))
    assert_same(ours(output), theirs(expected))


@each_layer
@each_order
def test_packed_is_lengths(case, order):
    """A packed batch and a padded one with lengths are two ways to write the same thing."""
    module = twins(case, 5, 7, bidirectional=True, num_layers=2)[0]
    packed = pack(order)
    padded, lengths = pad_packed_sequence(packed)
    output, state = module(packed, initial := initial_state(module, 4))
    assert_same((pad_packed_sequence(output)[0], state), module(padded, initial, lengths=lengths))


def test_single_row_and_single_step():
    ours, theirs = twins("GRU", 5, 7, bidirectional=True)
    for shape, lengths in (((4, 1, 5), [4]), ((1, 3, 5), [1, 1, 1])):
        packed = pack_padded_sequence(torch.randn(*shape, dtype=torch.float64), lengths)
        assert_same(results(ours, packed), results(theirs, packed))


@each_order
def test_dropout_with_packed(order):
    """torch.nn draws its mask for the packed elements alone: the same seed drops the same ones."""
    ours, theirs = twins("LSTM", 5, 7, num_layers=2, dropout=0.5)
    packed = pack(order)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        found.append(results(module, packed))
    assert_same(*found)


@pytest.mark.parametrize(
    "option", [{"lengths": torch.tensor([1])}, {"resets": torch.zeros(1, 1, dtype=torch.bool)}], ids=str
)
def test_no_lengths_or_resets_with_packed(option):
    with pytest.raises(ValueError, match=r"lengths, resets: .* PackedSequence"):
        fastrnn.LSTM(5, 7, dtype=torch.float64)(pack("sorted"), **option)


# ---- built by hand


def by_hand(data=None, batch_sizes=(3, 2), sorted_indices=None, unsorted_indices=None):
    """A PackedSequence whose constructor, which looks at some of its fields, was gone round."""
    data = torch.randn(5, 5) if data is None else data
    batch_sizes = torch.tensor(batch_sizes) if isinstance(batch_sizes, (tuple, list)) else batch_sizes
    return tuple.__new__(PackedSequence, (data, batch_sizes, sorted_indices, unsorted_indices))


ORDER = torch.tensor([1, 2, 0])
MALFORMED = {
    "zero-between": (
        by_hand(batch_sizes=(3, 0, 2)),
        RuntimeError,
        r"batch_sizes: expected sizes that never grow.*\[0, 2\]",
    ),
    "zero-first": (by_hand(batch_sizes=(0, 3, 2)), RuntimeError, "batch_sizes: expected sizes that never grow"),
    "growing": (by_hand(batch_sizes=(2, 3)), RuntimeError, r"batch_sizes: expected sizes that never grow.*\[2, 3\]"),
    "negative": (by_hand(batch_sizes=(3, 3, -1)), RuntimeError, r"batch_sizes: .*none negative, got \[-1\]"),
    "all-zero": (by_hand(torch.randn(0, 5), (0, 0)), RuntimeError, "batch_sizes: expected a first step with rows"),
    "no-steps": (
        by_hand(batch_sizes=torch.zeros(0).long()),
        RuntimeError,
        "batch_sizes: expected a first step with rows",
    ),
    "few-data": (
        by_hand(batch_sizes=(3, 3)),
        RuntimeError,
        "batch_sizes: expected a sum of 5, the rows of data, got 6",
    ),
    "much-data": (
        by_hand(batch_sizes=(3, 1)),
        RuntimeError,
        "batch_sizes: expected a sum of 5, the rows of data, got 4",
    ),
    "huge": (by_hand(batch_sizes=(2**62, 2**62)), RuntimeError, "batch_sizes: expected a sum of 5"),
    "int32": (by_hand(batch_sizes=torch.tensor([3, 2]).int()), RuntimeError, "batch_sizes: expected dtype torch.int64"),
    "2D": (
        by_hand(batch_sizes=torch.tensor([[3, 2]])),
        RuntimeError,
        "batch_sizes: expected 1 dimension, on the CPU, got 2",
    ),
    "0D": (by_hand(batch_sizes=torch.tensor(5)), RuntimeError, "batch_sizes: expected 1 dimension, on the CPU, got 0"),
    "device": (by_hand(batch_sizes=torch.tensor([3, 2]).to("meta")), RuntimeError, "batch_sizes: .*CPU, got 1 on meta"),
    "no-sizes": (by_hand(batch_sizes=None), TypeError, "batch_sizes: expected a tensor, got NoneType"),
    "no-data": (by_hand("data"), TypeError, "data: expected a tensor, got str"),
    "data-1D": (by_hand(torch.randn(5)), RuntimeError, "input must have 2 dimensions, got 1"),
    "data-3D": (by_hand(torch.randn(5, 5, 1)), RuntimeError, "input must have 2 dimensions, got 3"),
    "few-indices": (
        by_hand(sorted_indices=ORDER[:2]),
        RuntimeError,
        r"sorted_indices: expected shape \(3,\).* got \(2,\)",
    ),
    "many-indices": (by_hand(sorted_indices=torch.arange(4)), RuntimeError, r"sorted_indices: expected shape \(3,\)"),
    "range": (
        by_hand(unsorted_indices=ORDER + 1),
        RuntimeError,
        r"unsorted_indices: expected each of 0 to 2.*\[2, 3, 1\]",
    ),
    "negative-index": (by_hand(sorted_indices=ORDER - 1), RuntimeError, "sorted_indices: expected each of 0 to 2 once"),
    "twice": (by_hand(sorted_indices=ORDER.clamp(max=1)), RuntimeError, "sorted_indices: expected each of 0 to 2 once"),
    "index-dtype": (by_hand(sorted_indices=ORDER.int()), RuntimeError, "sorted_indices: expected dtype torch.int64"),
    "index-device": (
        by_hand(sorted_indices=ORDER.to("meta")),
        RuntimeError,
        "sorted_indices: expected device cpu as data",
    ),
    "index-list": (by_hand(unsorted_indices=[1, 2, 0]), TypeError, "unsorted_indices: expected a tensor, got list"),
    "no-inverse": (
        by_hand(sorted_indices=ORDER, unsorted_indices=ORDER),
        RuntimeError,
        r"unsorted_indices: expected \[2, 0, 1\], as sorted_indices says, got \[1, 2, 0\]",
    ),
}


@pytest.mark.parametrize("with_hx", [False, True], ids=["no-hx", "hx"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(("packed", "error", "text"), MALFORMED.values(), ids=MALFORMED)
def test_fields_that_contradict_each_other(packed, error, text, name, with_hx):
    """torch.nn's helpers believe them, and write past the end of their memory."""
    h = torch.zeros(1, 3, 7) if with_hx else None
    with pytest.raises(error, match=text):
        getattr(fastrnn, name)(5, 7)(packed, (h, h) if name == "LSTM" and with_hx else h)


@each_layer
def test_steps_without_rows_may_follow(case):
    """torch.nn takes such sizes."""
    ours, theirs = twins(case, 5, 7)
    packed = by_hand(torch.randn(5, 5, dtype=torch.float64), (3, 2, 0, 0))
    assert_same(results(ours, packed), results(theirs, packed))


@each_layer
def test_one_of_the_two_indices(case):
    ours, theirs = twins(case, 5, 7)
    for indices in ((ORDER, None), (None, ORDER)):
        packed = by_hand(torch.randn(5, 5, dtype=torch.float64), (3, 2), *indices)
        found, expected = ours(packed, initial_state(ours, 3)), theirs(packed)
        assert found[0].data.shape == expected[0].data.shape
        assert_same(ours(packed)[1], expected[1])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_states_of_another_batch(rows):
    packed = pack_padded_sequence(torch.randn(4, 3, 5), [2, 4, 3], enforce_sorted=False)
    for module, state in ((fastrnn.GRU(5, 7), torch.zeros(1, rows, 7)), (fastrnn.GRU(5, 7, 2), torch.zeros(1, 3, 7))):
        expected = rf"Expected hidden size \({module.num_layers}, 3, 7\)|Expected hidden size \(1, 3, 7\)"
        with pytest.raises(RuntimeError, match=expected):
            module(packed, state)


@pytest.mark.parametrize("order", LENGTHS)
def test_states_of_another_kind(order):
    packed = pack_padded_sequence(torch.randn(5, 4, 5), LENGTHS[order], enforce_sorted=order == "sorted")
    h = torch.zeros(1, 4, 7)
    for state in ((h, None), (None, h), (h, "c")):
        with pytest.raises(TypeError, match=r"hx: expected tensors, got .*(NoneType|str)"):
            fastrnn.LSTM(5, 7)(packed, state)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 4, 7\), got \[4, 7\]"):
        fastrnn.GRU(5, 7)(packed, h[0])


# ---- compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("inside", ["call", "pack", "pack-and-pad"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compiled_by_graph_breaks(name, inside, backend):
    """As torch.nn's layers: packed and padded inside or outside of the compiled part, in training too."""
    torch._dynamo.reset()
    module, lengths = getattr(fastrnn, name)(5, 7), torch.tensor([2, 4, 3])

    def pack(x):
        return pack_padded_sequence(x.sin(), lengths, enforce_sorted=False)

    def call(packed):
        y, state = module(packed)
        return y.data * 2, state

    compiled = {
        "call": call,
        "pack": lambda x: call(pack(x)),
        "pack-and-pad": lambda x: pad_packed_sequence(module(pack(x))[0])[0] * 2,
    }[inside]
    x = torch.randn(4, 3, 5, requires_grad=True)
    found = []
    for function in (torch.compile(compiled, backend=backend), compiled):
        outputs = tree_leaves(function(pack(x) if inside == "call" else x))
        loss = sum(t.sum() for t in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])])
    assert_same(*found, torch.float32)
