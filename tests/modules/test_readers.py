"""Code that looks at modules instead of calling them: type checks, fx, TorchScript, quantisation, pickle."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from twins import CELLS, LAYERS, arguments, assert_same, make, results

import fastrnn

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
each_name = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize("case", LAYERS | CELLS)


def built(name):
    return getattr(fastrnn, name)(3, 4)


def example(module, *, requires_grad=False):
    shape = (5, 2, 3) if isinstance(module, nn.RNNBase) else (2, 3)
    return torch.randn(shape, requires_grad=requires_grad)


# ---- type checks


@each_name
def test_is_an_instance_of_the_class_that_it_replaces(name):
    theirs = getattr(nn, name)
    for module in (built(name), fastrnn.convert(theirs(3, 4)), copy.deepcopy(built(name))):
        assert isinstance(module, theirs)
        assert type(module) is getattr(fastrnn, name)
        others = [getattr(nn, other) for other in NAMES if other != name]
        assert not isinstance(module, tuple(others))
    assert issubclass(getattr(fastrnn, name), theirs)


def test_structural_matching():
    def kind(module):
        match module:
            case nn.LSTM(hidden_size=size):
                return "lstm", size
            case nn.GRU() | nn.GRUCell():
                return "gru", None
        return None

    assert [kind(built(name)) for name in ("LSTM", "GRU", "GRUCell", "RNN")] == [
        ("lstm", 4),
        ("gru", None),
        ("gru", None),
        None,
    ]


def test_initialisation_that_asks_for_the_class():
    def init(module):
        if isinstance(module, (nn.LSTM, nn.GRUCell)):
            for p in module.parameters():
                nn.init.constant_(p, 0.25)

    model = nn.ModuleList([fastrnn.LSTM(3, 4), fastrnn.GRUCell(3, 4), fastrnn.GRU(3, 4)])
    model.apply(init)
    assert all((p == 0.25).all() for module in model[:2] for p in module.parameters())
    assert not any((p == 0.25).all() for p in model[2].parameters())


@each_name
def test_signatures_are_those_of_torch_nn(name):
    ours = inspect.signature(getattr(fastrnn, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    if "args" in theirs:  # torch.nn's layers have their arguments in an overload
        theirs = dict.fromkeys(
            ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
            + (["proj_size"] if name == "LSTM" else [])
            + ["device", "dtype"]
        )
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p for p in positional if p != "nonlinearity"] == [p for p in theirs if p != "nonlinearity"]
    assert ("nonlinearity" in positional) == name.startswith("RNN")


def test_constructor_takes_arguments_in_torch_nns_order():
    for name, args in (
        ("RNN", (3, 4, 2, "relu", False, True, 0.25, True)),
        ("LSTM", (3, 4, 2, False, True, 0.25, True, 2)),
        ("GRU", (3, 4, 2, False, True, 0.25, True)),
        ("RNNCell", (3, 4, False, "relu")),
        ("GRUCell", (3, 4, False)),
    ):
        assert repr(getattr(fastrnn, name)(*args)) == repr(getattr(nn, name)(*args))


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("weights", "int3", ValueError, "weights: expected None, 'bf16' or 'int8', got 'int3'"),
        ("recompute", 1, TypeError, "recompute should be of type bool, got: int"),
        ("reset_after", None, TypeError, "reset_after should be of type bool, got: NoneType"),
    ],
)
def test_an_option_that_is_assigned_is_checked(name, value, error, text):
    module = fastrnn.GRU(3, 4)
    before = getattr(module, name)
    with pytest.raises(error, match=text):
        setattr(module, name, value)
    assert getattr(module, name) == before


def test_an_option_that_is_assigned_is_used():
    module, x = fastrnn.LSTM(8, 256), torch.randn(4, 2, 8)
    fresh = fastrnn.LSTM(8, 256, weights="bf16")
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        exact = module(x)[0]
        module.weights = "bf16"
        assert torch.equal(module(x)[0], fresh(x)[0])
        module.weights = None
        assert torch.equal(module(x)[0], exact)


# ---- Dynamo


@pytest.mark.parametrize("first", ["fastrnn", "torch._dynamo"])
def test_dynamo_may_be_imported_before_or_after(first):
    """And is not imported by us, which takes a second. In a process of its own, where the order can be told."""
    code = (
        f"import sys, torch, {first}\n"
        "assert ('torch._dynamo' in sys.modules) != ('fastrnn' in sys.modules)\n"
        "import fastrnn\n"
        "print(torch.compile(fastrnn.LSTM(3, 4), fullgraph=True, backend='eager')(torch.randn(5, 2, 3))[0].shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.Size([5, 2, 4])" in run.stdout, run.stderr


class Derived(fastrnn.GRU):
    """A user's class with code of its own."""

    def forward(self, input, hx=None):
        return super().forward(input.tanh(), hx)


@pytest.mark.filterwarnings("ignore:.*backward hook.*:UserWarning")
@pytest.mark.parametrize(
    "make_module",
    [
        lambda: fastrnn.LSTM(3, 4),
        lambda: fastrnn.convert(nn.Sequential(nn.GRU(3, 4))),
        lambda: Derived(3, 4),
        lambda: parametrizations.weight_norm(fastrnn.RNN(3, 4), "weight_hh_l0"),
        lambda: fastrnn.convert(type("Mine", (nn.LSTM,), {})(3, 4), subclasses=True),
    ],
    ids=["built", "converted", "derived", "parametrized", "converted-subclass"],
)
def test_compiles_in_one_graph_without_the_flag(make_module):
    torch._dynamo.reset()
    module, x = make_module(), torch.randn(5, 2, 3, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, x), results(module, x)
    assert any("gradient" in name for name in expected)
    assert_same([*found.values()], [*expected.values()], torch.float32)
    assert not torch._dynamo.config.allow_rnn


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_dynamo_treats_torch_nns_own_layers_as_before(name):
    torch._dynamo.reset()
    model = nn.ModuleList([fastrnn.GRU(3, 4), getattr(nn, name)(4, 4)])
    x = torch.randn(5, 2, 3)

    def call(x):
        return model[1](model[0](x)[0])[0]

    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(call, fullgraph=True, backend="eager")(x)
    assert torch.equal(torch.compile(call, backend="eager")(x), call(x))


# ---- fx


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.cell, self.head = fastrnn.LSTM(3, 4), fastrnn.GRUCell(4, 4), nn.Linear(4, 2)

    def forward(self, x, h, c, lengths):
        y, (h, _) = self.layer(x, (h, c), lengths=lengths)
        return self.head(self.cell(y[-1], hx=h[0]).relu())


def test_fx_takes_them_as_leaves():
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["layer", "cell", "head"]
    traced.graph.lint()
    args = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.tensor([5, 3])
    assert torch.equal(traced(*args), model(*args))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(*args), model(*args))


@each_name
def test_fx_of_a_converted_model(name):
    model = nn.Sequential(getattr(nn, name)(3, 4))
    before = str(torch.fx.symbolic_trace(model).graph)
    assert str(torch.fx.symbolic_trace(fastrnn.convert(model)).graph) == before


def test_fx_with_hooks_says_what_to_do():
    model = nn.Sequential(fastrnn.GRU(3, 4))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"GRU: torch.fx.symbolic_trace .* hooks .*Tracer\.is_leaf_module"):
        torch.fx.symbolic_trace(model)


class DerivedCell(fastrnn.GRUCell):
    """As `Derived`, a cell."""

    def forward(self, input, hx=None):
        return super().forward(input.tanh(), hx)


def test_fx_computes_no_forward_twice():
    """That of a subclass, or of an instance: the module that the graph calls has it, too."""
    patched = fastrnn.GRU(3, 4)
    patched.forward = lambda x: fastrnn.GRU.forward(patched, x.tanh())
    for module in (Derived(3, 4), DerivedCell(3, 4), patched):
        with pytest.raises(NotImplementedError, match=r"would run its own forward twice.*Tracer\.is_leaf_module"):
            torch.fx.symbolic_trace(nn.Sequential(module))


# ---- TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each_name
def test_scripting_says_what_to_do(name):
    for module in (built(name), nn.Sequential(nn.Linear(3, 3), built(name))):
        with pytest.raises(NotImplementedError, match=rf"fastrnn.{name}: torch.jit.script .* fastrnn.revert\(copy"):
            torch.jit.script(module)
        torch.jit.script(fastrnn.revert(copy.deepcopy(module)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each_name
@pytest.mark.parametrize("records", [True, False], ids=["grad", "no-grad"])
def test_a_trace_can_be_saved_and_reads_the_weights(name, records):
    """Also where the parameters ask for gradients, which backward through the trace refuses to give."""
    module = built(name)
    with torch.set_grad_enabled(records):
        traced = torch.jit.trace(module, example(module))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        x = example(module)
        for found, expected in zip(tree_leaves(loaded(x)), tree_leaves(module(x)), strict=True):
            assert torch.equal(found, expected)
        if records:
            with pytest.raises(RuntimeError, match=r"derivative for fastrnn::.* is not implemented"):
                tree_leaves(loaded(x))[0].sum().backward()


# ---- quantisation


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@each_name
def test_quantisation_says_that_it_leaves_them(name):
    model = nn.Sequential(built(name))
    with pytest.warns(UserWarning, match=r"leaves fastrnn's layers in floating point.*weights='bf16'.*revert\(model\)"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {getattr(nn, name)})
    assert type(quantized[0]) is getattr(fastrnn, name)
    if name != "RNN":
        reverted = torch.ao.quantization.quantize_dynamic(fastrnn.revert(model), {getattr(nn, name)})
        assert "quantized" in type(reverted[0]).__module__


# ---- nested tensors


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
@each_name
def test_nested_tensors_say_what_to_do(name):
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
        with pytest.raises(NotImplementedError, match=f"{name}: input: expected a dense tensor.* lengths="):
            built(name)(x)


# ---- pickle


def used(module):
    with torch.no_grad():
        module(example(module))
    tree_leaves(module(example(module)))[0].sum().backward()
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        module(example(module))
    return module


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


@each_name
def test_use_changes_no_byte_of_a_pickle(name):
    module = built(name)
    before = pickle.dumps(module), saved(module)
    assert (pickle.dumps(used(module)), saved(module)) == before
    assert vars(pickle.loads(before[0])).keys() == vars(built(name)).keys()


@each_name
def test_loads_with_weights_only_after_use(name):
    """Nothing but the class itself has to be allowed."""
    module = used(built(name))
    with torch.serialization.safe_globals([type(module)]):
        loaded = torch.load(io.BytesIO(saved(module)), weights_only=True)
    x = example(module)
    assert all(map(torch.equal, tree_leaves(loaded(x)), tree_leaves(module(x))))


@each_case
def test_copies_compute_the_same(case):
    module = make(fastrnn, case, 5, 7)
    args = arguments(module)
    expected = results(module, *args)
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert_same(results(twin, *args), expected)


# ---- counters of FLOPs


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("GRU", {}), ("RNN", {}), ("LSTM", {"proj_size": 3}), ("GRU", {"bidirectional": True, "num_layers": 2})],
    ids=["GRU", "RNN", "LSTM", "stack"],
)
def test_as_many_flops_as_torch_nn(name, options, has_state):
    """Forward, and with the gradients of all inputs or of the parameters alone. (A plain LSTM of torch.nn counts 0.)"""
    ours = getattr(fastrnn, name)(5, 7, **options)
    rows = ours.num_layers * (2 if ours.bidirectional else 1)

    def count(module, requires_grad):
        x, h = torch.randn(6, 3, 5), torch.randn(rows, 3, ours.proj_size or 7)
        x.requires_grad_(requires_grad), h.requires_grad_(requires_grad)
        state = None if not has_state else (h, torch.randn(rows, 3, 7)) if name == "LSTM" else h
        with FlopCounterMode(display=False) as counter:
            y, _ = module(x, state)
            forward = counter.get_total_flops()
            y.sum().backward()
        with FlopCounterMode(display=False) as inference, torch.no_grad():
            module(x, state)
        return forward, counter.get_total_flops(), inference.get_total_flops()

    theirs = fastrnn.revert(copy.deepcopy(ours))
    for requires_grad in (False, True):
        assert count(ours, requires_grad) == count(theirs, requires_grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "gates", "recurrent"), [("MinGRU", 2, 0), ("IndRNN", 1, 0), ("MGU", 2, 2)])
def test_flops_of_other_cells(name, gates, recurrent, bias):
    """Products alone: not unit weights, and no gradient of a first state that was not given."""
    T, B, I, H = 6, 3, 5, 7
    layer, x = getattr(fastrnn, name)(I, H, bias=bias), torch.randn(T, B, I, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x)
        assert counter.get_total_flops() == 2 * B * H * T * (gates * I + recurrent * H)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * B * H * (3 * T * gates * I + (3 * T - 1) * recurrent * H)
