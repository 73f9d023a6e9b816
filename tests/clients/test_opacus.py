"""Opacus: what it says of a converted layer, and what it makes of it."""

import copy
import logging
import pickle

import pytest
import torch

opacus = pytest.importorskip("opacus")

from opacus.layers import DPGRU, DPLSTM, DPRNN  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from twins import assert_same, results  # noqa: E402

import fastrnn  # noqa: E402

# All comparisons are in float32 within twins.TOLERANCE: both sides add the same products, in another order.
PRIVATE = {"LSTM": DPLSTM, "GRU": DPGRU}
each_layer = pytest.mark.parametrize("layer", PRIVATE)


class Classifier(torch.nn.Module):
    """Looks at the last step."""

    def __init__(self, layer: str):
        super().__init__()
        self.rnn = getattr(torch.nn, layer)(4, 8, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def batches() -> DataLoader:
    """Always the same two."""
    x = torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, torch.arange(16) % 2), batch_size=8)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def make_private(model: torch.nn.Module):
    """The model, an optimiser and the data, privately; without noise, and nothing clipped, so that it is plain SGD."""
    return opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer_of(model),
        data_loader=batches(),
        noise_multiplier=0.0,
        max_grad_norm=1e6,
        poisson_sampling=False,
    )


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader) -> list[torch.Tensor]:
    """Of two epochs."""
    found = []
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return found


@each_layer
def test_validator_finds_it(layer):
    model = Classifier(layer)
    expected = [str(error) for error in ModuleValidator.validate(model)]
    assert [str(error) for error in ModuleValidator.validate(fastrnn.convert(model))] == expected


@each_layer
def test_fix_replaces_it(layer):
    model = fastrnn.convert(Classifier(layer))
    fixed = ModuleValidator.fix(model)
    assert type(fixed.rnn) is PRIVATE[layer]
    x = torch.randn(3, 5, 4)
    assert_same(fixed(x), model(x), torch.float32)


@each_layer
def test_converted_is_refused_as_torch_nns(layer):
    for model in (Classifier(layer), fastrnn.convert(Classifier(layer))):
        with pytest.raises(UnsupportedModuleError, match="replacement"):
            make_private(model)


@each_layer
def test_reverted_is_fixed(layer):
    """Opacus' own layer, made of what was converted and reverted, computes and learns what the converted one does."""
    converted = fastrnn.convert(Classifier(layer))
    fixed = ModuleValidator.fix_and_validate(fastrnn.revert(copy.deepcopy(converted)))
    assert type(fixed.rnn) is PRIVATE[layer]
    private, optimizer, data = make_private(fixed)
    ours, theirs = losses(converted, optimizer_of(converted), batches()), losses(private, optimizer, data)
    assert theirs[-1] < theirs[0] - 1e-3
    assert_same(ours, theirs, torch.float32)


# ---- Opacus' own layers

CASES = {
    "RNN-tanh": (DPRNN, {}),
    "RNN-relu": (DPRNN, {"nonlinearity": "relu"}),
    "LSTM": (DPLSTM, {}),
    "GRU": (DPGRU, {}),
}
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 2, "batch_first": True},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False},
}


@pytest.fixture
def said(caplog):
    """A function that converts a model, and gives what was logged."""

    def run(model):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastrnn"):
            assert fastrnn.convert(model) is model
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", OPTIONS)
def test_theirs_in_eval_mode(case, options, said):
    """The same object with the same parameters, results of tensors and of packed sequences, gradients, and state."""
    kind, fixed = CASES[case]
    module = kind(3, 4, **fixed, **OPTIONS[options]).eval()
    module.note, hook = "mine", module.register_forward_hook(lambda *_: seen.append(1))
    module.register_buffer("count", torch.ones(1))
    seen, parameters, state = [], set(module.parameters()), dict(module.state_dict())
    x = torch.randn(5, 3, 3)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    before, before_packed = results(module, x), module(packed)
    name = kind.__name__.removeprefix("DP")
    assert said(module) == [f"INFO (the model itself): opacus.layers.dp_rnn.{kind.__name__} -> fastrnn.{name}"]
    assert type(module) is getattr(fastrnn, name)
    assert set(module.parameters()) == parameters
    assert_same(dict(module.state_dict()), state, torch.float32)
    assert repr(module) == repr(getattr(fastrnn, name)(3, 4, **fixed, **OPTIONS[options]))
    assert_same(results(module, x), before, torch.float32)
    output, states = module(packed)
    assert_same((output.data, states), (before_packed[0].data, before_packed[1]), torch.float32)
    assert (module.note, module.training, len(seen)) == ("mine", False, 4)
    hook.remove()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fastrnn.revert(copy.deepcopy(module))):
        assert_same(twin(x), module(x), torch.float32)
    module.load_state_dict(state)


@each_layer
def test_after_private_training(layer, said):
    """The model that was trained, out of Opacus' wrapper."""
    private, optimizer, data = make_private(ModuleValidator.fix(Classifier(layer)))
    losses(private, optimizer, data)
    assert said(private.eval()) == [
        f"WARNING _module.rnn: left as opacus.layers.dp_rnn.DP{layer}: its cells have hooks; "
        "to_standard_module() of a GradSampleModule removes Opacus' own"
    ]
    x = torch.randn(3, 5, 4)
    expected = private(x)
    model = private.to_standard_module()
    said(model)
    assert type(model.rnn) is getattr(fastrnn, layer)
    assert_same(model(x), expected, torch.float32)


class Own(DPLSTM):
    """A user's class."""


def pruned():
    module = DPGRU(3, 4)
    module.l0.ih.forward = module.l0.ih.forward
    return module


def patched():
    module = DPGRU(3, 4)
    module.forward = module.forward
    return module


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DPLSTM(3, 4).train(), "it is for private training, which ours are not; convert(model.eval()) takes "),
        (lambda: DPGRU(3, 4, num_layers=2, dropout=0.5), "its dropout is one of states, which ours have not; for "),
        (lambda: Own(3, 4), "a subclass of one of Opacus' layers may have code of its own"),
        (pruned, "its cells are not Opacus' own"),
        (patched, "it has a forward of its own"),
    ],
    ids=["training", "dropout", "subclass", "cells", "forward"],
)
def test_convert_leaves_theirs(make, text, said):
    module = make()
    if "training" not in text:
        module.eval()
    kind = type(module)
    (line,) = said(module)
    assert line.startswith("WARNING (the model itself): left as ")
    assert text in line
    assert type(module) is kind


def test_dropout_of_states_can_be_switched_off(said):
    module = DPGRU(3, 4, num_layers=2, dropout=0.5).eval()
    x = torch.randn(5, 3, 3)
    expected = module(x)
    module.dropout = 0
    said(module)
    assert type(module) is fastrnn.GRU
    assert not list(module.children())
    assert_same(module(x), expected, torch.float32)
