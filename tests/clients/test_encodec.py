"""encodec's audio codec, with LSTMs in its encoder and its decoder: the same before and after `convert`."""

import sys
import types

import pytest
import torch


def importorskip_encodec():
    """encodec imports torchaudio, to read and to resample files, which is not needed here; and on a torch without CUDA
    the torchaudio of PyPI cannot be imported."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        try:
            return pytest.importorskip("encodec")
        finally:
            del sys.modules["torchaudio"]
    return pytest.importorskip("encodec")


encodec = importorskip_encodec()

from encodec.modules import SLSTM  # noqa: E402
from twins import assert_same, results  # noqa: E402

import fastrnn  # noqa: E402

# All comparisons are within twins.TOLERANCE: both sides add the same products, in another order.
MODELS = {
    "24khz": (encodec.EncodecModel.encodec_model_24khz, 1),
    "48khz": (encodec.EncodecModel.encodec_model_48khz, 2),
}
each_model = pytest.mark.parametrize("name", MODELS)


def twins_of(name: str, dtype=torch.float32) -> list[torch.nn.Module]:
    """Ours and torch.nn's, with the same random weights, and codebooks in which the codes of noise vary."""
    make, _ = MODELS[name]
    ours, theirs = make(pretrained=False), make(pretrained=False)
    with torch.no_grad():
        latents = theirs.encoder(sound(name, 0.3)).movedim(1, -1).flatten(0, 1)  # [steps, 128]
    for i, layer in enumerate(theirs.quantizer.vq.layers):
        codebook = layer._codebook
        codebook.embed.normal_().mul_(latents.std(0)).add_(latents.mean(0) if i == 0 else 0)
        codebook.inited.fill_(1)
    ours.load_state_dict(theirs.state_dict())
    fastrnn.convert(ours)
    for model, namespace in ((ours, fastrnn), (theirs, torch.nn)):
        layers = [type(module) for module in model.modules() if isinstance(module, torch.nn.LSTM)]
        assert layers == [namespace.LSTM] * 2
        model.to(dtype).set_target_bandwidth(6.0)
    return [ours, theirs]


def sound(name: str, seconds: float, dtype=torch.float32) -> torch.Tensor:
    _, channels = MODELS[name]
    return 0.3 * torch.randn(2, channels, int(seconds * 1000) * int(name.removesuffix("khz")), dtype=dtype)


@each_model
def test_codes_and_decoded_sound(name):
    """The codes are the same integers. At 48 kHz these are two segments, the last of them short."""
    models, x = twins_of(name), sound(name, 1.2)
    with torch.no_grad():
        ours, theirs = (model.encode(x) for model in models)
        decoded = [model.decode(frames) for model, frames in zip(models, (ours, theirs), strict=True)]
    assert len(theirs) == (2 if name == "48khz" else 1)
    assert len(theirs[0][0].unique()) > 100
    assert all(torch.equal(codes, expected) for (codes, _), (expected, _) in zip(ours, theirs, strict=True))
    assert_same(*decoded, torch.float32)


@each_model
def test_gradients(name):
    """Of the encoder and the decoder, as in training, without the codebooks between them. In float64: the gradients of
    convolutions in front of a normalisation are small differences of large numbers."""
    x = sound(name, 0.1, torch.float64).requires_grad_()
    models = twins_of(name, torch.float64)
    assert_same(*(results(torch.nn.Sequential(model.encoder, model.decoder), x) for model in models))


def test_state_dict():
    ours, theirs = (model.state_dict() for model in twins_of("24khz"))
    assert list(ours) == list(theirs)
    assert_same(dict(ours), dict(theirs), torch.float32)


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "plain"])
def test_block(skip):
    """It gives its layer a permuted input."""
    theirs, ours = SLSTM(8, skip=skip), fastrnn.convert(SLSTM(8, skip=skip))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 8, 20, requires_grad=True)
    assert_same(results(ours, x), results(theirs, x), torch.float32)
