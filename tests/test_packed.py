"""PackedSequence against torch.nn, sorted or not."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
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
