"""asteroid's dual-path recurrent networks: the same before and after `convert`."""

import copy

import pytest
import torch

masknn = pytest.importorskip("asteroid.masknn")

from asteroid.masknn.recurrent import LSTMMasker, StackedResidualBiRNN, StackedResidualRNN  # noqa: E402
from asteroid.models import DPRNNTasNet  # noqa: E402
from twins import assert_same, results  # noqa: E402

import fastrnn  # noqa: E402

# All comparisons are in float32 within twins.TOLERANCE: both sides add the same products, in another order.
SIZES = {"bn_chan": 8, "hid_size": 16, "chunk_size": 10, "n_repeats": 2}


def converted(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of which every recurrent layer is fastrnn's."""
    twin = fastrnn.convert(copy.deepcopy(model))
    layers = [layer for layer in twin.modules() if isinstance(layer, torch.nn.RNNBase)]
    assert layers
    assert all(type(layer) is getattr(fastrnn, layer.mode.partition("_")[0]) for layer in layers)
    return twin


def assert_unchanged(model: torch.nn.Module, *shape: int) -> None:
    """The outputs and all gradients of a copy that is converted are those of `model`."""
    x = torch.randn(shape, requires_grad=True)
    found = []
    for twin in (converted(model), model):
        torch.manual_seed(1)  # of dropout
        found.append(results(twin, x))
    assert_same(*found, torch.float32)


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("use_mulcat", [False, True], ids=["single", "mulcat"])
def test_dual_path(rnn_type, use_mulcat):
    """It calls flatten_parameters, and gives its layers transposed chunks."""
    assert_unchanged(masknn.DPRNN(6, 2, **SIZES, rnn_type=rnn_type, use_mulcat=use_mulcat), 2, 6, 45)


def test_causal_dual_path_of_two_layers():
    assert_unchanged(masknn.DPRNN(6, 2, **SIZES, norm_type="cLN", bidirectional=False, num_layers=2), 2, 6, 45)


@pytest.mark.parametrize("kind", [StackedResidualRNN, StackedResidualBiRNN])
@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_residual_stack(kind, rnn_type):
    bidirectional = kind is StackedResidualBiRNN
    assert_unchanged(kind(rnn_type, 6, n_layers=3, bidirectional=bidirectional), 2, 9, 6)


def test_masker():
    assert_unchanged(LSTMMasker(6, 2, hid_size=8, n_layers=2), 2, 6, 20)


def test_separation_of_waveforms():
    model = DPRNNTasNet(n_src=2, n_filters=16, kernel_size=16, **SIZES)
    assert_unchanged(model, 2, 1, 800)
    waves = torch.randn(1, 1, 800)
    assert_same(converted(model).eval().separate(waves), model.eval().separate(waves), torch.float32)


def test_saved_and_loaded():
    """What `serialize` gives is that of a model that was never converted."""
    model = DPRNNTasNet(n_src=2, n_filters=16, kernel_size=16, **SIZES)
    loaded = DPRNNTasNet.from_pretrained(converted(model).serialize())
    assert not any(isinstance(layer, fastrnn.LSTM) for layer in loaded.modules())
    waves = torch.randn(1, 1, 800)
    assert_same(loaded(waves).detach(), model.eval()(waves).detach(), torch.float32)
