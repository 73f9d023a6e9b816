"""`convert` and `revert`: what is replaced, what is left and why, and that nothing else of a model changes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from twins import CELLS, LAYERS, arguments, assert_same, make, results

import fastrnn
from fastrnn import convert, revert

each_case = pytest.mark.parametrize("case", LAYERS | CELLS)


class Model(nn.Module):
    """Recurrent modules at several depths, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 5), nn.ModuleDict({"rnn": nn.RNN(5, 7, nonlinearity="relu")}))
        self.lstm = nn.LSTM(7, 4, num_layers=2, bidirectional=True, dropout=0.3, proj_size=2)
        self.gru = nn.GRU(4, 4)
        self.again = self.gru
        self.cells = nn.ModuleList([nn.RNNCell(4, 4), nn.LSTMCell(4, 4), nn.GRUCell(4, 4)])

    def forward(self, x):
        y, _ = self.encoder[1]["rnn"](self.encoder[0](x))
        y, _ = self.lstm(y)
        y, _ = self.again(self.gru(y)[0])
        h = self.cells[0](y[-1])
        h, _ = self.cells[1](h)
        return self.cells[2](h)


SWAPPED = {
    "encoder.1.rnn": "RNN",
    "lstm": "LSTM",
    "gru": "GRU",
    "cells.0": "RNNCell",
    "cells.1": "LSTMCell",
    "cells.2": "GRUCell",
}


class Subclass(nn.LSTM):
    """A user's class with code of its own."""


class OurSubclass(fastrnn.GRU):
    """A user's class with code of its own."""


def make_pair_of_types(namespace):
    return {name: getattr(namespace, kind) for name, kind in SWAPPED.items()}


def types(model):
    return {name: type(module) for name, module in model.named_modules() if name in SWAPPED}


# ---- what is replaced


def test_nested_model():
    """Every recurrent module at any depth, and only those; a shared one is reported once and stays shared."""
    model = Model()
    others = {name: type(m) for name, m in model.named_modules() if name not in SWAPPED}
    found = convert(model)
    assert types(model) == make_pair_of_types(fastrnn)
    assert found.replaced == [(n, getattr(nn, kind), getattr(fastrnn, kind)) for n, kind in SWAPPED.items()]
    assert found.left == []
    assert model.again is model.gru
    assert {name: type(m) for name, m in model.named_modules() if name not in SWAPPED} == others
    found = revert(model)
    assert types(model) == make_pair_of_types(nn)
    assert found.replaced == [(n, getattr(fastrnn, kind), getattr(nn, kind)) for n, kind in SWAPPED.items()]
    assert found.left == []


@each_case
def test_the_model_itself(case):
    """A recurrent module alone; same object, same outputs and gradients before, between and after."""
    module = make(nn, case, 5, 7)
    args = arguments(module)
    before = results(module, *args)
    found = convert(module)
    assert [name for name, _, _ in found.replaced] == [""]
    assert type(module) is getattr(fastrnn, type(module).__name__)
    assert_same(results(module, *args), before)
    revert(module)
    assert type(module) is getattr(nn, type(module).__name__)
    assert_same(results(module, *args), before)


def test_outputs_and_gradients_stay():
    model, x = Model().double(), torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for change in (lambda m: None, convert, revert):
        change(model)
        torch.manual_seed(1)  # dropout
        found.append(results(model, x))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_second_time_finds_nothing():
    model = Model()
    assert revert(model).replaced == []
    convert(model)
    again = convert(model)
    assert (again.replaced, again.left) == ([], [])
    assert types(model) == make_pair_of_types(fastrnn)


# ---- what stays


def test_parameters_and_buffers_are_the_same_objects():
    model = Model()
    model.lstm.register_buffer("count", torch.zeros(1))
    before, state = dict(model.named_parameters()), model.state_dict()
    convert(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()["lstm.count"].data_ptr() == state["lstm.count"].data_ptr()


def test_attributes_stay():
    """Options, mode, what a user has set, and what does not ask for a gradient."""
    model = Model().eval()
    model.lstm.bias_hh_l0.requires_grad_(False)
    model.gru.note = "mine"
    text = repr(model)
    convert(model)
    assert repr(model) == text
    assert not model.lstm.training
    assert not model.lstm.bias_hh_l0.requires_grad
    assert model.gru.note == "mine"


def test_hooks_stay():
    model, seen = Model(), []
    model.lstm.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.lstm.register_forward_hook(lambda *_: seen.append("after"))
    model.lstm.register_full_backward_hook(lambda *_: seen.append("backward"))
    convert(model)
    model(torch.randn(6, 3, 5)).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_optimiser_goes_on():
    """Momentum of before the swap, and steps after it, are those of a model that was never swapped."""
    plain = Model().double().eval()
    swapped = copy.deepcopy(plain)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    for model, change in ((plain, lambda m: None), (swapped, convert)):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            if step == 2:
                change(model)
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
    assert_same(swapped.state_dict(), plain.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_converted_model_can_be_copied_and_reverted(copied):
    model = Model().double().eval()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    expected = model(x)
    convert(model)
    twin = copied(model)
    assert types(twin) == make_pair_of_types(fastrnn)
    assert_same(twin(x), expected)
    revert(twin)
    assert types(model) == make_pair_of_types(fastrnn)
    assert_same(copied(twin)(x), expected)


def test_weight_norm_hook_goes_on():
    """The deprecated weight_norm is a hook: the class is torch.nn's own, and the hook runs on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = nn.utils.weight_norm(make(nn, "LSTM", 5, 7), "weight_hh_l0")
    args = arguments(module)
    before = results(module, *args)
    assert len(convert(module).replaced) == 1
    assert_same(results(module, *args), before)


def test_new_options_work_after_convert():
    module = make(nn, "GRU", 5, 7)
    convert(module)
    x, hx = arguments(module)
    output, _ = module(x, hx, lengths=torch.tensor([4, 2]))
    assert not output[2:, 1].any()
    assert module.reset_after is True


# ---- what is left


def test_subclasses_are_left():
    model = nn.ModuleDict({"theirs": Subclass(3, 4), "plain": nn.GRU(3, 4)})
    found = convert(model)
    assert type(model["theirs"]) is Subclass
    assert found.left == [("theirs", Subclass, "a subclass may have code of its own")]
    assert [name for name, _, _ in found.replaced] == ["plain"]
    model = nn.ModuleDict({"ours": OurSubclass(3, 4), "plain": fastrnn.GRU(3, 4)})
    found = revert(model)
    assert type(model["ours"]) is OurSubclass
    assert found.left == [("ours", OurSubclass, "a subclass may have code of its own")]
    assert type(model["plain"]) is nn.GRU


def test_parametrized_modules_are_left():
    module = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    kind, (found, reverted) = type(module), (convert(module), revert(module))
    assert type(module) is kind
    assert [(name, left) for name, left, _ in found.left] == [("", kind)]
    assert "parametrized" in found.left[0][2]
    assert (reverted.replaced, found.replaced) == ([], [])
    ours = parametrizations.weight_norm(fastrnn.LSTM(3, 4), "weight_hh_l0")
    assert "parametrized" in revert(ours).left[0][2]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_left():
    model = nn.ModuleList([torch.jit.script(nn.LSTM(3, 4)), torch.jit.script(nn.Linear(3, 4)), nn.LSTM(3, 4)])
    found = convert(model)
    assert [name for name, _, _ in found.left] == ["0"]
    assert "scripted" in found.left[0][2]
    assert [name for name, _, _ in found.replaced] == ["2"]


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_revert_leaves_what_torch_nn_lacks(name):
    module = getattr(fastrnn, name)(3, 4, reset_after=False)
    found = revert(module)
    assert type(module) is getattr(fastrnn, name)
    assert found.replaced == []
    assert found.left == [("", type(module), "torch.nn has no reset_after=False")]


# ---- what is printed


def test_printed():
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": Subclass(3, 4), "c": nn.GRUCell(3, 4)})
    found = convert(model)
    assert str(found).splitlines() == [
        "a: torch.nn.LSTM -> fastrnn.LSTM",
        "c: torch.nn.GRUCell -> fastrnn.GRUCell",
        f"b: left as {__name__}.Subclass: a subclass may have code of its own",
    ]
    assert repr(found) == str(found)
    assert str(convert(nn.RNN(3, 4))) == "(the model itself): torch.nn.RNN -> fastrnn.RNN"
    assert str(revert(fastrnn.RNN(3, 4))) == "(the model itself): fastrnn.RNN -> torch.nn.RNN"
    assert str(convert(nn.Linear(3, 4))) == "no recurrent modules"


@pytest.mark.parametrize("change", [convert, revert])
@pytest.mark.parametrize("value", [None, nn.LSTM, [nn.LSTM(3, 4)]], ids=["None", "class", "list"])
def test_not_a_module(change, value):
    with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {type(value).__name__}"):
        change(value)


def test_same_bits_as_one_built_directly():
    """A converted module is one of ours in every way."""
    theirs = nn.LSTM(5, 7, bidirectional=True)
    ours = fastrnn.LSTM(5, 7, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    convert(theirs)
    x = torch.randn(4, 2, 5)
    for found, expected in zip(tree_leaves(theirs(x)), tree_leaves(ours(x)), strict=True):
        assert torch.equal(found, expected)
