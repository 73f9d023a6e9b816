"""Opacus: what it says of a converted layer, and what it makes of it."""

import copy

import pytest
import torch

opacus = pytest.importorskip("opacus")

from opacus.layers import DPGRU, DPLSTM  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from twins import assert_same  # noqa: E402

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


@each_layer
def test_convert_leaves_theirs(layer):
    fixed = ModuleValidator.fix(Classifier(layer))
    assert type(fastrnn.convert(fixed).rnn) is PRIVATE[layer]
