"""Opacus: what it says of a converted layer, and what it makes of it."""

import copy
import gc
import logging
import pickle

import pytest
import torch

opacus = pytest.importorskip("opacus")

from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.layers import DPGRU, DPLSTM, DPRNN  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from twins import assert_same, results  # noqa: E402

import fastrnn  # noqa: E402
from fastrnn.members import MemberGradients  # noqa: E402

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


def make_private(model: torch.nn.Module, max_grad_norm: float = 1e6, **options):
    """The model, an optimiser and the data, privately; without noise, and nothing clipped, so that it is plain SGD."""
    return opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer_of(model),
        data_loader=batches(),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        **options,
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
def test_converted_is_valid(layer):
    """torch.nn's layer is refused, and replaced by one of Opacus' own; ours is taken as it is."""
    with pytest.raises(UnsupportedModuleError, match="replacement"):
        make_private(Classifier(layer))
    model = fastrnn.convert(Classifier(layer))
    assert ModuleValidator.validate(model, strict=True) == []
    assert type(ModuleValidator.fix(model).rnn) is getattr(fastrnn, layer)


@each_layer
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_converted_learns_as_opacus_own(layer, mode):
    """With clipping that matters, and no noise: the same losses, and the same parameters in the end."""
    model = Classifier(layer)
    fixed, converted = ModuleValidator.fix(copy.deepcopy(model)), fastrnn.convert(model)
    theirs = make_private(fixed, max_grad_norm=0.1)
    ours = make_private(converted, max_grad_norm=0.1, grad_sample_mode=mode)
    assert_same(losses(*ours), losses(*theirs), torch.float32)
    assert all(p.grad.norm() > 0 for p in converted.parameters())
    fixed = fastrnn.convert(theirs[0].to_standard_module().eval())  # for torch.nn's names
    assert_same(dict(converted.state_dict()), dict(fixed.state_dict()), torch.float32)


# ---- gradients by row, against a backward pass for each row alone, in float64: 1e-15 of the largest numbers

T, B, I, H = 5, 4, 3, 4
LAYERS = {
    "LSTM": lambda **o: fastrnn.LSTM(I, H, 2, bidirectional=True, **o),
    "GRU": lambda **o: fastrnn.convert(torch.nn.GRU(I, H, 2, **o)),
    "GRU-reset-before": lambda **o: fastrnn.GRU(I, H, reset_after=False, bias=False, **o),
    "RNN": lambda **o: fastrnn.RNN(I, H, 2, leak=torch.nn.Parameter(torch.full((H,), 0.3)), **o),
    "SLSTM": lambda **o: fastrnn.SLSTM(I, H, **o),
    "LayerNormLSTM": lambda **o: fastrnn.LayerNormLSTM(I, H, 2, bidirectional=True, **o),
    "LayerNormGRU": lambda **o: fastrnn.LayerNormGRU(I, H, **o),
}


class Reads(torch.nn.Module):
    """Something before the layer, something of all that it puts out after it: a loss for each row."""

    def __init__(self, layer, kind):
        super().__init__()
        self.before, self.layer, self.kind = torch.nn.Linear(I, I), layer, kind
        self.after = torch.nn.Linear(H * (2 if layer.bidirectional else 1), 1)

    def forward(self, x, lengths, hx):
        """x [B, T, I]"""
        x = self.before(x)
        x = x if self.layer.batch_first else x.transpose(0, 1)
        options = {"lengths": lengths} if "lengths" in self.kind else {}
        if "packed" in self.kind:
            x = pack_padded_sequence(x, lengths, batch_first=self.layer.batch_first, enforce_sorted=False)
        output, state = self.layer(x, hx, **options) if "hx" in self.kind else self.layer(input=x, **options)
        if "packed" in self.kind:
            output, _ = pad_packed_sequence(output, batch_first=self.layer.batch_first)
        output = output if self.layer.batch_first else output.transpose(0, 1)
        states = sum(s.square().sum((0, 2)) for s in (state if isinstance(state, tuple) else (state,)))
        return self.after(output.sum(1))[:, 0] + states


KINDS = ["plain", "hx", "lengths", "lengths hx", "packed", "packed hx"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("is_batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_row(layer, is_batch_first, kind):
    """In the order of the rows, of the loss's mean and of its sum; and their norms by ghost clipping."""
    model = Reads(LAYERS[layer](batch_first=is_batch_first), kind).double()
    x, lengths = torch.randn(B, T, I, dtype=torch.float64), torch.tensor([2, 5, 1, 4])
    names = fastrnn.cells.CELLS[model.layer._cell].states
    rows = model.layer.num_layers * (2 if model.layer.bidirectional else 1)
    hx = [torch.rand(rows, B, H, dtype=torch.float64) + 0.1 for _ in names]

    def call(module, b):
        states = tuple(s[:, b] for s in hx)
        return module(x[b], lengths[b], states if len(states) > 1 else states[0])

    every = list(model.parameters())
    exact = [torch.autograd.grad(call(model, slice(b, b + 1)).sum(), every) for b in range(B)]
    exact = [torch.stack(column) for column in zip(*exact, strict=True)]
    for reduction in ("mean", "sum"):
        private = GradSampleModule(model, loss_reduction=reduction)
        getattr(call(private, slice(None)), reduction)().backward()
        for p, expected in zip(every, exact, strict=True):
            torch.testing.assert_close(p.grad_sample, expected, rtol=1e-10, atol=1e-11)
        private.to_standard_module()
    ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
    call(ghost, slice(None)).mean().backward()
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in exact]).norm(dim=0)
    torch.testing.assert_close(ghost.get_norm_sample(), norms, rtol=1e-9, atol=1e-10)
    ghost.to_standard_module()
    assert not model.layer._forward_hooks
    assert not model.layer._forward_pre_hooks
    assert not hasattr(every[2], "grad_sample")


def test_dropout_between_layers_and_two_passes():
    """The gradients are of the dropout that was drawn; a second batch is put beside the first."""
    model = fastrnn.GRU(I, H, 2, dropout=0.5, batch_first=True)
    private = GradSampleModule(model, loss_reduction="sum")
    for b in (B, 2):
        private(torch.randn(b, T, I))[0].sum().backward()
    for p in model.parameters():
        assert [len(g) for g in p.grad_sample] == [B, 2]
        torch.testing.assert_close(sum(g.sum(0) for g in p.grad_sample), p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [fastrnn.GRU, fastrnn.LayerNormLSTM])
def test_nothing_is_kept_when_the_loss_is_gone(make):
    private = GradSampleModule(make(I, H))
    for _ in range(3):
        private(torch.randn(T, B, I))[0].sum().backward()
        private.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(isinstance(o, MemberGradients) for o in gc.get_objects())


def test_two_backward_passes_of_one_call():
    """Of which Opacus' own layers say that a list is empty."""
    y = GradSampleModule(fastrnn.GRU(I, H))(torch.randn(T, B, I))[0].sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients by row: expected one backward pass through each call"):
        y.backward()


def test_a_layer_that_is_used_twice():
    model = fastrnn.GRU(I, I).double()
    private = GradSampleModule(model, loss_reduction="sum", batch_first=False)
    x = torch.randn(T, B, I, dtype=torch.float64)
    private(private(x)[0])[0].sum().backward()
    for p in model.parameters():
        assert len(p.grad_sample) == B
        torch.testing.assert_close(p.grad_sample.sum(0), p.grad, rtol=1e-10, atol=1e-11)


def test_not_while_evaluated_or_frozen():
    model = torch.nn.Sequential(fastrnn.GRU(I, H))
    model[0].weight_ih_l0.requires_grad_(False)
    private = GradSampleModule(model)
    private.eval()(torch.randn(T, B, I))
    with torch.no_grad():
        private.train()(torch.randn(T, B, I))
    assert all(p._forward_counter == 0 for p in model.parameters() if p.requires_grad)
    private(torch.randn(T, B, I))[0].sum().backward()
    assert len(model[0].weight_hh_l0.grad_sample) == B
    assert not hasattr(model[0].weight_ih_l0, "grad_sample")
    with pytest.raises(RuntimeError, match="input_size"):
        private(torch.randn(T, B, I + 1))
    assert not fastrnn.autograd.is_recorded()


@each_layer
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_poisson_sampling(layer, mode):
    """Batches of any size, empty ones too, in a training as Opacus' own layer has it, and then one with noise."""
    x, start = torch.randn(64, T, 4), Classifier(layer)
    labels = (x[:, -1, 0] > 0).long()

    def train(model, noise):
        torch.manual_seed(1)
        engine, criterion = opacus.PrivacyEngine(), torch.nn.CrossEntropyLoss()
        model, optimizer, *others, data = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(x, labels), batch_size=2),
            noise_multiplier=noise,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
        criterion, sizes = others[0] if others else criterion, []
        for batch, target in data:
            optimizer.zero_grad()
            criterion(model(batch), target).backward()
            optimizer.step()
            sizes.append(len(batch))
        assert 0 in sizes
        return F.cross_entropy(model.eval()(x), labels), engine

    theirs, _ = train(ModuleValidator.fix(start), 0.0)
    ours, _ = train(fastrnn.convert(copy.deepcopy(start)), 0.0)
    assert_same(ours, theirs, torch.float32)
    noisy, engine = train(fastrnn.convert(start), 1.0)
    assert abs(noisy - ours) > 1e-3
    assert engine.get_epsilon(1e-5) > 0


def test_refused():
    for module, error, text in (
        (fastrnn.LSTM(I, H, proj_size=2), NotImplementedError, "layer: expected one without proj_size"),
        (fastrnn.GRU(I, H, weights="int8"), ValueError, "layer: expected one without weights='int8'"),
        (fastrnn.Regularized(fastrnn.GRU(I, H), zoneout=0.1), NotImplementedError, r"fastrnn\.Regularized has no"),
        (fastrnn.LearnedState(fastrnn.GRU(I, H)), NotImplementedError, r"fastrnn\.LearnedState has no gradients"),
    ):
        with pytest.raises(error, match=text):
            GradSampleModule(module)
    errors = ModuleValidator.validate(fastrnn.LSTM(I, H, proj_size=2))
    assert [str(error) for error in errors] == ["fastrnn.LSTM: layer: expected one without proj_size, got a projection"]


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
def test_theirs(case, options, said):
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
def test_theirs_before_private_training(layer):
    """What Opacus has put into a model learns the same as one of ours."""
    model = ModuleValidator.fix(Classifier(layer))
    converted = fastrnn.convert(copy.deepcopy(model))
    assert type(converted.rnn) is getattr(fastrnn, layer)
    assert_same(losses(*make_private(converted)), losses(*make_private(model)), torch.float32)


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
        (lambda: DPGRU(3, 4, num_layers=2, dropout=0.5), "its dropout is one of states, which ours have not; for "),
        (lambda: Own(3, 4), "a subclass of one of Opacus' layers may have code of its own"),
        (pruned, "its cells are not Opacus' own"),
        (patched, "it has a forward of its own"),
    ],
    ids=["dropout", "subclass", "cells", "forward"],
)
def test_convert_leaves_theirs(make, text, said):
    module = make()
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
