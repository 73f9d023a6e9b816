"""What computes each thing that a layer can do: docs/capabilities.md is made here, and checked.

FASTRNN_WRITE_CAPABILITIES=1 python -m pytest tests/modules/test_capabilities.py
"""

import os
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import reference

T, B, I, H = 3, 2, 4, 5
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "capabilities.md"
LAYERS = {
    "LSTM": lambda **o: fastrnn.LSTM(I, H, **o),
    "LSTM, projection": lambda **o: fastrnn.LSTM(I, H, proj_size=3, **o),
    "LSTM, peephole": lambda **o: fastrnn.LSTM(I, H, peephole=True, **o),
    "GRU": lambda **o: fastrnn.GRU(I, H, **o),
    "GRU, reset before": lambda **o: fastrnn.GRU(I, H, reset_after=False, **o),
    "RNN": lambda **o: fastrnn.RNN(I, H, **o),
    "RNN, leak": lambda **o: fastrnn.RNN(I, H, leak=0.3, **o),
    "Recurrent, SLSTM, MGU, ...": lambda **o: fastrnn.MGU(I, H, **o),
    "LayerNormLSTM, LayerNormGRU": lambda **o: fastrnn.LayerNormLSTM(I, H, **o),
    "SRU, MinGRU, ...": lambda **o: fastrnn.SRU(I, H, **o),
}


def training(layer, x, *args, **options):
    layer(x, *args, **options)[0].sum().backward()


def second(layer, x):
    (g,) = torch.autograd.grad(layer(x.requires_grad_())[0].sum(), x, create_graph=True)
    g.square().sum().backward()


def per_sample(layer, x):
    def loss(parameters, row):
        return functional_call(layer, parameters, (row[:, None],))[0].sum()

    vmap(grad(loss), in_dims=(None, 1))(dict(layer.named_parameters()), x)


def inference(layer, x):
    with torch.no_grad():
        layer(x)


def stream(layer, x):
    layer.stream(B)(x[0])


def compiled(layer, x):
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0].sum().backward()


CAPABILITIES = {
    "inference": inference,
    "training": training,
    "recompute=True": training,
    "lengths=, resets=": lambda m, x: training(
        m, x, lengths=torch.tensor([3, 1]), resets=torch.zeros(T, B, dtype=torch.bool)
    ),
    "packed sequence": lambda m, x: m(pack_padded_sequence(x, torch.tensor([3, 1])))[0].data.sum().backward(),
    "bfloat16": lambda m, x: training(m.bfloat16(), x.bfloat16()),
    "return_states=True": lambda m, x: m(x, return_states=True)[2][0].gates.popitem()[1].sum().backward(),
    "autocast": lambda m, x: training(torch.autocast("cpu", torch.bfloat16)(m), x),
    "stream()": stream,
    'weights="int8"': inference,
    "torch.compile": compiled,
    "vmap": lambda m, x: vmap(lambda row: m(row[:, None])[0], in_dims=1)(x),
    "per-sample gradients": per_sample,
    "per_sample_norms": lambda m, x: fastrnn.per_sample_norms(m, x, torch.ones_like(m(x)[0])),
    "jvp, forward mode": lambda m, x: jvp(lambda x: m(x)[0], (x,), (x,)),
    "second derivatives": second,
    "Regularized": lambda m, x: training(fastrnn.Regularized(m, zoneout=0.1), x),
}
TEXT = """\
# What computes what

Of each layer and use, on the CPU: *fused* runs through kernels alone, *reference* through the equation in torch's
operations, step by step (right, but slow), *refused* is an error that says why. `tests/modules/test_capabilities.py`
makes this table, and fails where it is wrong.

{}

Tangents of tangents (`jvp` of `jvp`) go through the reference. `Regularized` refuses rounded weights.

On a GPU what is fused here is fused, too, but for derivatives of derivatives: tangents and second derivatives go
through the reference there, and so do the gradients of `Regularized` with recurrent dropout; `stream()` and rounded
weights are refused. The cells that torch.nn does not have need an nvcc there, and are computed by the reference without
one, as they are here without a C++ compiler.
"""
OPTIONS = {"recompute=True": {"recompute": True}, 'weights="int8"': {"weights": "int8"}}


class Ops(TorchDispatchMode):
    """Whether an op of a layer has been called."""

    called = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called = self.called or function.namespace == "fastrnn"
        return function(*args, **(kwargs or {}))


def found_for(capability: str, layer: str, monkeypatch) -> str:
    """fused, reference or refused."""
    through_reference = []
    plain = reference.layer_with_states
    monkeypatch.setattr(
        reference, "layer_with_states", lambda *args, **kwargs: through_reference.append(1) or plain(*args, **kwargs)
    )
    x = torch.randn(T, B, I)
    try:
        module = LAYERS[layer](**OPTIONS.get(capability, {}))
        if capability in ("stream()", "torch.compile"):  # no op of its own, or none that a mode would let it call
            CAPABILITIES[capability](module, x)
            return "reference" if through_reference else "fused"
        with Ops() as ops:
            CAPABILITIES[capability](module, x)
    except (NotImplementedError, ValueError):
        return "refused"
    assert ops.called or through_reference
    return "reference" if through_reference else "fused"


def table(monkeypatch) -> str:
    head = ["", *LAYERS]
    rows = [
        [f"`{capability}`" if "=" in capability or capability[0].isupper() else capability]
        + [found_for(capability, layer, monkeypatch) for layer in LAYERS]
        for capability in CAPABILITIES
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.filterwarnings("ignore")
def test_document_says_what_is(monkeypatch):
    text = TEXT.format(table(monkeypatch))
    if os.environ.get("FASTRNN_WRITE_CAPABILITIES"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text
