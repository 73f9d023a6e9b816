"""resemblyzer's VoiceEncoder, three LSTM layers with the weights that it ships: the same before and after `convert`."""

import copy

import pytest
import torch

resemblyzer = pytest.importorskip("resemblyzer")

import numpy as np  # noqa: E402
from twins import assert_same  # noqa: E402

import fastrnn  # noqa: E402

# float32 roundings in another order, over 160 steps and three layers: the embeddings, of length 1, are compared within
# twins.TOLERANCE.


@pytest.fixture(scope="module")
def encoders():
    """A converted one and torch.nn's."""
    theirs = resemblyzer.VoiceEncoder("cpu", verbose=False)
    assert theirs.linear.weight.std() > 0
    ours = fastrnn.convert(copy.deepcopy(theirs))
    assert (type(theirs.lstm), type(ours.lstm)) == (torch.nn.LSTM, fastrnn.LSTM)
    return ours, theirs


def voice(pitch: float, seconds: float = 3.0) -> np.ndarray:
    """A buzz whose pitch and loudness change, as a voice's do."""
    t = np.arange(int(seconds * resemblyzer.sampling_rate)) / resemblyzer.sampling_rate
    phase = 2 * np.pi * pitch * (t + 0.05 * np.sin(2 * np.pi * t))
    buzz = sum(np.sin(k * phase) / k for k in range(1, 12))
    return (0.1 * buzz * (0.6 + 0.4 * np.sin(7 * t))).astype(np.float32)


def test_utterances(encoders):
    ours, theirs = ([torch.from_numpy(e.embed_utterance(voice(pitch))) for pitch in (100, 220)] for e in encoders)
    assert_same(ours, theirs, torch.float32)
    assert not torch.allclose(*theirs, atol=0.1)  # it tells them apart


def test_partial_utterances(encoders):
    """Windows of 1.6 s, as one batch."""
    found = []
    for encoder in encoders:
        embedding, partials, _ = encoder.embed_utterance(voice(150), return_partials=True, rate=4)
        found.append([torch.from_numpy(embedding), torch.from_numpy(partials)])
    assert len(found[0][1]) > 4
    assert_same(*found, torch.float32)


def test_speaker(encoders):
    ours, theirs = (torch.from_numpy(e.embed_speaker([voice(120), voice(140)])) for e in encoders)
    assert_same(ours, theirs, torch.float32)


def test_gradients(encoders):
    mels = torch.rand(4, 40, 40)
    found = []
    for encoder in encoders:
        loss = (encoder(mels) @ torch.linspace(-1, 1, 256)).sum()
        names, parameters = zip(*[(n, p) for n, p in encoder.named_parameters() if n[:4] == "lstm"], strict=True)
        found.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    assert_same(*found, torch.float32)
