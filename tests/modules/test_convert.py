"""`convert` and `revert`: what is replaced, what is left and why, and that nothing else of a model changes."""

import copy
import logging
import pickle
import subprocess
import sys
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


@pytest.fixture
def said(caplog):
    """A function that calls `convert` or `revert`, which must return the model, and gives what was logged."""

    def run(change, model, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastrnn"):
            assert change(model, **options) is model
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    return run


def make_pair_of_types(namespace):
    return {name: getattr(namespace, kind) for name, kind in SWAPPED.items()}


def types(model):
    return {name: type(module) for name, module in model.named_modules() if name in SWAPPED}


# ---- what is replaced


def test_nested_model(said):
    """Every recurrent module at any depth, and only those; a shared one is reported once and stays shared."""
    model = Model()
    others = {name: type(m) for name, m in model.named_modules() if name not in SWAPPED}
    lines = said(convert, model)
    assert types(model) == make_pair_of_types(fastrnn)
    assert lines == [f"INFO {name}: torch.nn.{kind} -> fastrnn.{kind}" for name, kind in SWAPPED.items()]
    assert model.again is model.gru
    assert {name: type(m) for name, m in model.named_modules() if name not in SWAPPED} == others
    lines = said(revert, model)
    assert types(model) == make_pair_of_types(nn)
    assert lines == [f"INFO {name}: fastrnn.{kind} -> torch.nn.{kind}" for name, kind in SWAPPED.items()]


@each_case
def test_the_model_itself(case, said):
    """A recurrent module alone; same object, same outputs and gradients before, between and after."""
    module = make(nn, case, 5, 7)
    args = arguments(module)
    before = results(module, *args)
    name = type(module).__name__
    assert said(convert, module) == [f"INFO (the model itself): torch.nn.{name} -> fastrnn.{name}"]
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


def test_second_time_finds_nothing(said):
    model = Model()
    assert said(revert, model) == []
    convert(model)
    assert said(convert, model) == []
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
    assert type(convert(module)) is fastrnn.LSTM
    assert_same(results(module, *args), before)


def test_new_options_work_after_convert():
    module = make(nn, "GRU", 5, 7)
    convert(module)
    x, hx = arguments(module)
    output, _ = module(x, hx, lengths=torch.tensor([4, 2]))
    assert not output[2:, 1].any()
    assert module.reset_after is True


# ---- options


def test_options_of_layers():
    model = convert(Model(), weights="bf16", recompute=True)
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    assert [(m.weights, m.recompute) for m in layers] == [("bf16", True)] * 3
    assert not any("weights" in vars(cell) for cell in model.cells)
    assert [(m.weights, m.recompute) for m in convert(Model()).modules() if isinstance(m, nn.RNNBase)] == [
        (None, False)
    ] * 3


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weights": "int3"}, ValueError, "weights: expected None, 'bf16' or 'int8', got 'int3'"),
        ({"recompute": 1}, TypeError, "recompute should be of type bool, got: int"),
        ({"subclasses": "yes"}, TypeError, "subclasses should be of type bool, got: str"),
    ],
)
def test_bad_options(options, error, text):
    model = Model()
    with pytest.raises(error, match=text):
        convert(model, **options)
    assert types(model) == make_pair_of_types(nn)


# ---- subclasses


class Documented(nn.LSTM):
    """Has attributes and methods of its own, and lets torch.nn compute."""

    def __init__(self, size, note):
        super().__init__(size, size)
        self.note = note

    def reset_parameters(self):
        for p in self.parameters():
            nn.init.uniform_(p, -0.2, 0.2)

    def describe(self):
        return f"{self.note}: {self.hidden_size}"


class OwnForward(nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class OwnCheck(Documented):
    def check_forward_args(self, *args):
        return super().check_forward_args(*args)


class OwnCall(nn.RNNCell):
    def __call__(self, *args):
        return super().__call__(*args)


def test_subclasses_that_override_nothing_are_replaced_if_asked(said):
    module = Documented(3, "mine").double()
    args = arguments(module)
    before = results(module, *args)
    assert said(convert, module, subclasses=True, recompute=True) == [
        f"INFO (the model itself): {__name__}.Documented -> fastrnn's {__name__}.Documented"
    ]
    assert isinstance(module, Documented)
    assert isinstance(module, fastrnn.LSTM)
    assert module.describe() == "mine: 3"
    assert repr(module) == "Documented(3, 3, recompute=True)"
    assert_same(results(module, *args), before)
    assert module(args[0], lengths=torch.tensor([4, 2]))[0].shape == (4, 2, 3)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert_same(results(twin, *args), before)
    assert said(convert, module, subclasses=True) == []
    revert(module)
    assert type(module) is Documented
    assert_same(results(module, *args), before)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: OwnForward(3, 4), "forward"),
        (lambda: OwnCheck(3, ""), "check_forward_args"),
        (lambda: OwnCall(3, 4), "__call__"),
    ],
    ids=["forward", "check", "call"],
)
def test_subclasses_that_override_what_computes_are_left(make, name, said):
    module = make()
    kind = type(module)
    assert said(convert, module, subclasses=True) == [
        f"WARNING (the model itself): left as {__name__}.{kind.__name__}: the subclass has its own {name}"
    ]
    assert type(module) is kind


def test_subclasses_are_left(said):
    model = nn.ModuleDict({"theirs": Subclass(3, 4), "plain": nn.GRU(3, 4)})
    assert said(convert, model) == [
        f"WARNING theirs: left as {__name__}.Subclass: a subclass may have code of its own; "
        "convert(model, subclasses=True) looks",
        "INFO plain: torch.nn.GRU -> fastrnn.GRU",
    ]
    assert type(model["theirs"]) is Subclass
    model = nn.ModuleDict({"ours": OurSubclass(3, 4), "plain": fastrnn.GRU(3, 4)})
    assert said(convert, model) == []
    assert said(revert, model) == [
        f"WARNING ours: left as {__name__}.OurSubclass: a subclass may have code of its own",
        "INFO plain: fastrnn.GRU -> torch.nn.GRU",
    ]
    assert type(model["ours"]) is OurSubclass
    assert type(model["plain"]) is nn.GRU


@pytest.mark.parametrize("name", ["weights", "recompute", "_cell", "_state", "stream"])
@pytest.mark.parametrize(
    "value", [None, 5, nn.Parameter(torch.ones(2)), nn.Linear(2, 2)], ids=lambda v: type(v).__name__
)
def test_attributes_that_ours_would_hide_are_left_alone(name, value, said):
    """On a plain module, too: a user's attribute is the user's."""
    model = nn.Sequential(nn.LSTM(3, 4), nn.GRU(3, 4))
    setattr(model[0], name, value)
    state = list(model.state_dict())
    assert said(convert, model) == [
        "WARNING 0: left as torch.nn.LSTM: it has attributes that a layer of fastrnn has for itself: " + name,
        "INFO 1: torch.nn.GRU -> fastrnn.GRU",
    ]
    assert getattr(model[0], name) is value
    assert list(model.state_dict()) == state


def test_a_patched_forward_is_left_alone(said):
    module = nn.LSTM(3, 4)
    module.forward = forward = lambda x: nn.LSTM.forward(module, 2 * x)
    (line,) = said(convert, module)
    assert line.startswith("WARNING (the model itself): left as torch.nn.LSTM: it has attributes ")
    assert module.forward is forward


class Tagged(nn.LSTM):
    """Cannot be derived from without a tag."""

    def __init_subclass__(cls, *, tag):
        super().__init_subclass__()


class Creature(Tagged, tag=1):
    pass


def test_a_class_that_cannot_be_derived_from_is_left(said):
    model = nn.Sequential(nn.GRU(3, 3), Creature(3, 3), nn.GRU(3, 3))
    lines = said(convert, model, subclasses=True)
    assert lines[1].startswith(f"WARNING 1: left as {__name__}.Creature: the subclass cannot be derived from: ")
    assert [type(module) for module in model] == [fastrnn.GRU, Creature, fastrnn.GRU]


def test_revert_forgets_the_options():
    """So that nothing of ours is left in a module of torch.nn's, and it can be converted again."""
    for name in ("LSTM", "GRUCell"):
        module, plain = getattr(fastrnn, name)(3, 4), getattr(nn, name)(3, 4)
        with torch.no_grad():
            module(torch.randn(2, 3) if "Cell" in name else torch.randn(2, 2, 3))
        assert vars(revert(module)).keys() == vars(plain).keys()
        assert type(convert(module)) is getattr(fastrnn, name)


# ---- what else is left


def test_parametrized_modules_are_left(said):
    """And the line says what can be done, whichever way one goes."""
    theirs = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    kind = type(theirs)
    (line,) = said(convert, theirs, subclasses=True)
    assert line.endswith("a parametrized module has a class of its own; convert it before it is parametrized")
    assert said(revert, theirs) == []
    assert type(theirs) is kind
    ours = parametrizations.weight_norm(fastrnn.LSTM(3, 4), "weight_hh_l0")
    (line,) = said(revert, ours)
    assert line.endswith("a parametrized module has a class of its own; remove its parametrizations first")
    assert said(convert, ours) == []
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(revert(ours)) is nn.LSTM


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_left(said):
    model = nn.ModuleList([torch.jit.script(nn.LSTM(3, 4)), torch.jit.script(nn.Linear(3, 4)), nn.LSTM(3, 4)])
    left, replaced = said(convert, model)
    assert left.startswith("WARNING 0: left as torch.jit")
    assert left.endswith("a scripted module holds compiled code; convert it before it is scripted")
    assert replaced == "INFO 2: torch.nn.LSTM -> fastrnn.LSTM"


class OwnLayer(nn.RNNBase):
    """Like those of torch.nn, but none of them."""

    def __init__(self, *sizes):
        super().__init__("GRU", *sizes)


def test_layers_of_their_own_are_left(said):
    """With what to do about torchrl's, which `make_python_based` puts in place of torch.nn's."""
    of_torchrl = type("GRU", (OwnLayer,), {"__module__": "torchrl.modules.tensordict_module.rnn"})
    for kind, path, why in (
        (OwnLayer, f"{__name__}.OwnLayer", "it has code of its own on torch.nn's base class"),
        (
            of_torchrl,
            "torchrl.modules.tensordict_module.rnn.GRU",
            "torchrl's own takes a mask; make_cudnn_based() of its LSTMModule or GRUModule, and convert then",
        ),
    ):
        module = kind(3, 4)
        assert said(convert, module, subclasses=True) == [f"WARNING (the model itself): left as {path}: {why}"]
        assert type(module) is kind


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_revert_leaves_what_torch_nn_lacks(name, said):
    module = getattr(fastrnn, name)(3, 4, reset_after=False)
    assert said(revert, module) == [
        f"WARNING (the model itself): left as fastrnn.{name}: torch.nn has no reset_after=False"
    ]
    assert type(module) is getattr(fastrnn, name)


def test_what_is_left_is_seen_without_any_setting():
    """Python prints warnings of a logger that nobody has configured; here, in a process of its own."""
    code = (
        "import torch, fastrnn\nclass Mine(torch.nn.GRU): pass\n"
        "fastrnn.convert(torch.nn.Sequential(Mine(3, 4), torch.nn.GRU(4, 4)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    assert [line for line in lines if "GRU" in line or "Mine" in line] == [
        "0: left as __main__.Mine: a subclass may have code of its own; convert(model, subclasses=True) looks"
    ]


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
