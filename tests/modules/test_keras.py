"""Layers of Keras, from memory and from files, and fastrnn's made of them; and the other way round."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import zipfile

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras
import pytest
import torch
from keras import layers
from twins import assert_same

import fastrnn

B, T, I, H = 3, 5, 4, 6
LAYERS = {
    "SimpleRNN-tanh": (layers.SimpleRNN, {}),
    "SimpleRNN-relu": (layers.SimpleRNN, {"activation": "relu"}),
    "SimpleRNN-sigmoid": (layers.SimpleRNN, {"activation": "sigmoid"}),
    "LSTM": (layers.LSTM, {}),
    "GRU": (layers.GRU, {}),
    "GRU-reset-before": (layers.GRU, {"reset_after": False}),
}
CELLS = {layers.SimpleRNN: layers.SimpleRNNCell, layers.LSTM: layers.LSTMCell, layers.GRU: layers.GRUCell}
WRAPPED = ("plain", "bidirectional", "cell", "stacked")
RETURNED = {"return_sequences": True, "return_state": True}
MODULES = {
    "RNN-tanh": (fastrnn.RNN, {}),
    "RNN-relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "RNN-sigmoid": (fastrnn.RNN, {"nonlinearity": "sigmoid"}),
    "LSTM": (fastrnn.LSTM, {}),
    "GRU": (fastrnn.GRU, {}),
    "GRU-reset-before": (fastrnn.GRU, {"reset_after": False}),
}
LENGTHS = torch.tensor([T, 2, 4])
MASK = torch.arange(T) < LENGTHS[:, None]

# Keras' own, of its way to NumPy and of the lambda that is refused here.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:.*`lambda`:UserWarning")

each_case = pytest.mark.parametrize("case", LAYERS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
each_wrapped = pytest.mark.parametrize("wrapped", WRAPPED)


def make(case: str, wrapped: str = "plain", bias: bool = True, **options):
    """A built layer with random weights, biases too."""
    kind, fixed = LAYERS[case]
    fixed = fixed | {"use_bias": bias}
    if wrapped in ("plain", "bidirectional"):
        layer = kind(H, **fixed, **RETURNED, **options)
        layer = layers.Bidirectional(layer) if wrapped == "bidirectional" else layer
    else:
        cells = [CELLS[kind](H, **fixed) for _ in range(3 if wrapped == "stacked" else 1)]
        layer = layers.RNN(cells if wrapped == "stacked" else cells[0], **RETURNED, **options)
    return randomized(layer)


def randomized(layer):
    layer.build((None, None, I))
    for weight in layer.weights:
        weight.assign(torch.randn(weight.shape) / 2)
    return layer


def states_of(module, found) -> list[torch.Tensor]:
    """fastrnn's states, each `[L*D, B, H]`, of Keras' states in its order."""
    flat = keras.tree.flatten(found)
    carried = 2 if isinstance(module, torch.nn.LSTM) else 1
    return [torch.stack(list(flat[index::carried])) for index in range(carried)]


def initial(module, layer):
    """A random state in fastrnn's form and in Keras'."""
    L = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(L, B, H) for _ in range(2 if isinstance(module, torch.nn.LSTM) else 1)]
    theirs = [[state[row] for state in states] for row in range(L)]
    if not (isinstance(layer, layers.RNN) and hasattr(layer.cell, "cells")):
        theirs = [state for row in theirs for state in row]
    return (tuple(states) if len(states) > 1 else states[0]), theirs


def outputs_of(module, *args, **kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    y, states = module(*args, **kwargs)
    return y, list(states) if isinstance(states, tuple) else [states]


@torch.no_grad()
def check_same_function(module, layer):
    """Without a state, with one, and of rows that end early."""
    x = torch.randn(B, T, module.input_size)
    hx, initial_state = initial(module, layer)
    for ours, theirs in (({}, {}), ({"hx": hx}, {"initial_state": initial_state})):
        y, *states = layer(x, **theirs)
        assert_same(outputs_of(module, x, **ours), (y, states_of(module, states)), torch.float32)
    y, *states = layer(x, mask=MASK)
    found, own = outputs_of(module, x, lengths=MASK.sum(1))
    assert_same(own, states_of(module, states), torch.float32)
    assert_same(found[MASK], y[MASK], torch.float32)
    assert not found[~MASK].any()


# ---- from Keras


@each_case
@each_wrapped
@each_bias
def test_same_function(case, wrapped, bias):
    layer = make(case, wrapped, bias)
    module = fastrnn.from_keras(layer)
    assert type(module) is getattr(fastrnn, case.split("-")[0].removeprefix("Simple"))
    assert module.batch_first
    assert module.bias is bias
    assert module.bidirectional is (wrapped == "bidirectional")
    assert module.num_layers == (3 if wrapped == "stacked" else 1)
    check_same_function(module, layer)


@each_case
@each_wrapped
@each_bias
def test_file(case, wrapped, bias, tmp_path):
    """The same parameters as of the layer in memory."""
    layer = make(case, wrapped, bias)
    keras.Sequential([keras.Input((None, I)), layer]).save(tmp_path / "model.keras")
    found, expected = fastrnn.from_keras(tmp_path / "model.keras"), fastrnn.from_keras(layer)
    assert repr(found) == repr(expected)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


@pytest.mark.parametrize("zero", [False, True])
def test_outputs_where_rows_have_ended(zero):
    """Keras repeats the last one unless it is told to give zeros; in two directions it does always."""
    layer = make("LSTM", zero_output_for_mask=zero)
    x = torch.randn(B, T, I)
    with torch.no_grad():
        y = layer(x, mask=MASK)[0]
        assert torch.equal(y[1, 2:], torch.zeros(3, H) if zero else y[1, 1].expand(3, H))
        assert not make("LSTM", "bidirectional")(x, mask=MASK)[0][~MASK].any()


@each_wrapped
def test_gradients_of_what_was_read(wrapped):
    """It is a layer to train further, and independent of what it was made of."""
    layer = make("GRU", wrapped)
    before = [weight.numpy().copy() for weight in layer.weights]
    module = fastrnn.from_keras(layer)
    module(torch.randn(B, T, I))[0].sum().backward()
    assert all(p.is_leaf and p.is_contiguous() and p.grad is not None for p in module.parameters())
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert all((weight.numpy() == old).all() for weight, old in zip(layer.weights, before, strict=True))


def test_returned_without_sequences():
    """The last state of each direction."""
    layer = randomized(layers.Bidirectional(layers.GRU(H)))
    x = torch.randn(B, T, I)
    with torch.no_grad():
        _, h_n = fastrnn.from_keras(layer)(x)
        assert_same(torch.cat([h_n[0], h_n[1]], dim=-1), layer(x), torch.float32)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(dtype, tmp_path):
    layer = make("LSTM", dtype=dtype, recurrent_initializer="zeros")
    module = fastrnn.from_keras(layer)
    assert module.weight_hh_l0.dtype == getattr(torch, dtype)
    assert torch.equal(module.weight_hh_l0, layer.cell.recurrent_kernel.value.T)
    keras.Sequential([keras.Input((None, I)), layer]).save(tmp_path / "model.keras")
    found = fastrnn.from_keras(str(tmp_path / "model.keras"))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), module.parameters(), strict=True))


def test_not_trainable():
    layer = make("GRU")
    layer.trainable = False
    assert not any(p.requires_grad for p in fastrnn.from_keras(layer).parameters())


# ---- several layers


def model():
    x = keras.Input((None, I))
    y = layers.LSTM(H, return_sequences=True, name="first")(x)
    y = layers.Dense(I, name="dense")(y)
    inner = keras.Sequential([keras.Input((None, I)), layers.LSTM(2, return_sequences=True, name="deep")], name="inner")
    y = layers.LSTM(H, return_sequences=True, name="second")(inner(y))
    y = layers.Bidirectional(layers.RNN([layers.GRUCell(3)], return_sequences=True), name="both")(y)
    return keras.Model(x, y)


NAMES = ["first", "inner/deep", "second", "both"]


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "file"])
def test_models(stored, tmp_path):
    source = built = model()
    if stored:
        source = tmp_path / "model.keras"
        built.save(source)
    found = fastrnn.from_keras(source)
    assert list(found) == NAMES
    x = torch.randn(B, T, I)
    with torch.no_grad():
        y = built.get_layer("dense")(found["first"](x)[0])
        y = found["both"](found["second"](found["inner/deep"](y)[0])[0])[0]
        assert_same(y, built(x), torch.float32)
    one = fastrnn.from_keras(source, name="inner/deep")
    assert torch.equal(one.weight_hh_l0, found["inner/deep"].weight_hh_l0)
    with pytest.raises(ValueError, match=r"name: expected one of first, inner/deep, second, both, got 'third'"):
        fastrnn.from_keras(source, name="third")


def test_a_name_that_two_have():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other = make("GRU", name="x"), make("GRU", name="x")

    with pytest.raises(ValueError, match="expected layers with names of their own, got several that are called x"):
        fastrnn.from_keras(Twice())


# ---- what is refused


class Subclass(layers.LSTM):
    """A user's class."""


class OwnCell(layers.Layer):
    state_size = output_size = H

    def call(self, inputs, states):
        return inputs, states


def tanh(value):
    """Not what its name says."""
    return 2 * value


def mixed_directions(**options):
    return layers.Bidirectional(
        layers.GRU(H, return_sequences=True),
        backward_layer=layers.GRU(**{"units": H, "return_sequences": True, "go_backwards": True} | options),
    )


REFUSED = {
    "activation": (
        lambda: layers.LSTM(H, activation="relu", name="x"),
        "x: activation: expected 'tanh', got 'relu'",
    ),
    "activation of SimpleRNN": (
        lambda: layers.SimpleRNN(H, activation="gelu", name="x"),
        "x: activation: expected 'tanh' or 'relu' or 'sigmoid', got 'gelu'",
    ),
    "activation of one's own": (
        lambda: layers.GRU(H, activation=lambda v: v, name="x"),
        "x: activation: expected 'tanh', got 'a lambda'",
    ),
    "a function called like another": (
        lambda: layers.GRU(H, activation=tanh, name="x"),
        rf"activation: expected one of Keras', got {__name__}\.tanh",
    ),
    "recurrent_activation": (
        lambda: layers.GRU(H, recurrent_activation="hard_sigmoid", name="x"),
        "x: recurrent_activation: expected 'sigmoid', got 'hard_sigmoid'",
    ),
    "go_backwards": (
        lambda: layers.GRU(H, go_backwards=True, name="x"),
        "x: go_backwards: expected False, got True",
    ),
    "go_backwards in Bidirectional": (
        lambda: layers.Bidirectional(layers.GRU(H, go_backwards=True), backward_layer=layers.GRU(H), name="x"),
        "x: go_backwards: expected False, got True",
    ),
    "merge_mode": (
        lambda: layers.Bidirectional(layers.GRU(H), merge_mode="sum", name="x"),
        "x: merge_mode: expected 'concat', got 'sum'",
    ),
    "no merge_mode": (
        lambda: layers.Bidirectional(layers.GRU(H), merge_mode=None, name="x"),
        "x: merge_mode: expected 'concat', got None",
    ),
    "units": (
        lambda: mixed_directions(units=2),
        "units: expected 6 in all cells and directions, got 2",
    ),
    "reset_after": (
        lambda: mixed_directions(reset_after=False),
        "reset_after: expected True in all cells and directions, got False",
    ),
    "units of cells": (
        lambda: layers.RNN([layers.GRUCell(H), layers.GRUCell(2)], name="x"),
        "x: units: expected 6 in all cells and directions, got 2",
    ),
    "kinds of cells": (
        lambda: layers.RNN([layers.GRUCell(H), layers.LSTMCell(H)], name="x"),
        "x: kind: expected 'GRU' in all cells and directions, got 'LSTM'",
    ),
    "cell": (
        lambda: layers.RNN(OwnCell(), name="x"),
        "x: cell: expected SimpleRNNCell, LSTMCell, GRUCell or a list of one of them, got '.*OwnCell'",
    ),
    "two stacks": (
        lambda: layers.Bidirectional(layers.RNN([layers.GRUCell(H), layers.GRUCell(H)]), name="x"),
        "x: layer: expected one cell in each direction, got '2 stacked cells'",
    ),
    "two subclasses": (
        lambda: layers.Bidirectional(Subclass(H), name="x"),
        "x: layer: expected SimpleRNN, LSTM, GRU or RNN, got '.*Subclass'",
    ),
    "dtype": (
        lambda: layers.GRU(H, dtype=keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"), name="x"),
        "x: dtype: expected one of float32, float64, float16, bfloat16, got 'QuantizedDTypePolicy'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    make, text = REFUSED[what]
    with keras.saving.custom_object_scope({"Subclass": Subclass, "OwnCell": OwnCell}):
        layer = make()
        layer.build((None, None, I))
        with pytest.raises(NotImplementedError, match=text):
            fastrnn.from_keras(layer)


@pytest.mark.parametrize("wrap", [lambda layer: layer, layers.Bidirectional], ids=["plain", "bidirectional"])
def test_not_built(wrap):
    layer = wrap(layers.GRU(H))
    with pytest.raises(ValueError, match=f"{layer.name}: expected a layer that is built, got one without weights; "):
        fastrnn.from_keras(layer)


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (lambda: 3, TypeError, "source: expected a layer or model of Keras, or a path, got int"),
        (lambda: torch.nn.LSTM(3, 4), TypeError, "source: expected a layer or model of Keras, or a path, got LSTM"),
        (lambda: layers.Dense(3), TypeError, "source: expected one of SimpleRNN, LSTM, .*, or a model, got Dense"),
        (lambda: Subclass(3), TypeError, r"source: expected one of .*, or a model, got .*\.Subclass"),
        (lambda: layers.LSTMCell(3), TypeError, "source: expected one of .*, or a model, got LSTMCell"),
        (lambda: keras.Sequential([layers.Dense(3)]), ValueError, "source: expected a Sequential or functional model"),
        (lambda: "/nowhere.keras", FileNotFoundError, "nowhere.keras"),
        (lambda: __file__, ValueError, "source: expected a .keras file of Keras 3, .*, got .*: File is not a zip file"),
    ],
)
def test_bad_source(source, error, text):
    with pytest.raises(error, match=text):
        fastrnn.from_keras(source())


def test_bad_name():
    with pytest.raises(TypeError, match="name: expected a str or None, got int"):
        fastrnn.from_keras(make("GRU"), name=0)


def rewritten(path, change):
    """A copy of a file, with another config."""
    other = path.with_name("other.keras")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        config = json.loads(old.read("config.json"))
        change(config["config"]["layers"])
        new.writestr("config.json", json.dumps(config))
        new.writestr("model.weights.h5", old.read("model.weights.h5"))
    return other


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda entries: entries[1]["config"].update(units=7),
            r"expected a weight of shape \(None, 28\), got \(4, 24\)",
        ),
        (lambda entries: entries[1]["config"].update(use_bias=False), "first: expected 2 weights, got 3"),
        (lambda entries: entries[1]["config"].update(name="last"), "the weights of last in layers/lstm, got .* first"),
    ],
)
def test_files_that_contradict_themselves(change, text, tmp_path):
    model().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=text):
        fastrnn.from_keras(rewritten(tmp_path / "model.keras", change))


def test_weights_that_lie_in_another_file(tmp_path):
    """HDF5 can refer to any file; a model is not to read one that it does not bring."""
    keras.Sequential([keras.Input((None, I)), make("LSTM")]).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config, weights = archive.read("config.json"), io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights, "a") as file:
        del file["layers/lstm/cell/vars/0"]
        file.create_dataset("layers/lstm/cell/vars/0", (I, 4 * H), "float32", external=str(tmp_path / "model.keras"))
    with zipfile.ZipFile(tmp_path / "other.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", weights.getvalue())
    with pytest.raises(ValueError, match="expected weights that lie in the file, got /layers/lstm/cell/vars/0, which"):
        fastrnn.from_keras(tmp_path / "other.keras")


def test_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("other.json", "{}")
    with pytest.raises(ValueError, match=r"expected a .keras file of Keras 3, .* no item named 'config.json'"):
        fastrnn.from_keras(tmp_path / "a.keras")


def test_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'needs h5py for files: pip install "fastrnn\[keras\]"'):
        fastrnn.from_keras("model.keras")


def test_a_file_is_read_without_keras(tmp_path):
    """And neither Keras nor h5py is imported with fastrnn."""
    model().save(tmp_path / "model.keras")
    code = (
        "import sys, fastrnn\nassert not {'keras', 'h5py'} & set(sys.modules)\n"
        f"assert len(fastrnn.from_keras({str(tmp_path / 'model.keras')!r})) == 4\nassert 'keras' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what is left out, and said


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout": 0.2}, "x: dropout=0.2 of training is left out; inference is the same"),
        ({"recurrent_dropout": 0.5}, "x: recurrent_dropout=0.5 of training is left out; inference is the same"),
        ({"kernel_constraint": "non_neg"}, "x: kernel_constraint=.* of training is left out; inference is the same"),
        ({"activity_regularizer": "l2"}, "x: activity_regularizer=.* of training is left out; inference is the same"),
        ({"stateful": True}, "x: stateful=True is left out: pass the state of the call before as hx"),
        ({"dtype": "mixed_bfloat16"}, "x: dtype='mixed_bfloat16': its weights are float32; torch.autocast computes"),
    ],
)
def test_what_is_left_out(options, text, caplog):
    layer = layers.GRU(H, name="x", **options)
    layer.build((B, None, I))
    with caplog.at_level(logging.INFO, "fastrnn"):
        module = fastrnn.from_keras(layer)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.match(text, record.getMessage())
    assert module.weight_ih_l0.dtype == torch.float32


def test_nothing_is_said_of_other_options(caplog):
    for wrapped in WRAPPED:
        fastrnn.from_keras(make("LSTM", wrapped, unroll=True, go_backwards=False))
    assert not caplog.records


# ---- to Keras


def twin(case: str, **options):
    kind, fixed = MODULES[case]
    return kind(I, H, **fixed, **options)


@pytest.mark.parametrize("case", MODULES)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 3}], ids=["plain", "bidirectional", "layers"]
)
@each_bias
def test_to_keras(case, options, bias):
    module = twin(case, **options, bias=bias, batch_first=True)
    layer = fastrnn.to_keras(module)
    assert layer.built
    check_same_function(module, layer)
    back = fastrnn.from_keras(layer)
    assert repr(back) == repr(module)
    sums = {} if not bias or case == "GRU" else {name: back.get_parameter(name) for name in biases(back)}
    for name, expected in module.state_dict().items():
        if name not in sums:
            assert torch.equal(back.state_dict()[name], expected)
        elif "bias_ih" in name:
            assert torch.equal(sums[name], expected + module.get_parameter(name.replace("ih", "hh")))
        else:
            assert not sums[name].any()


def biases(module) -> list[str]:
    return [name for name, _ in module.named_parameters() if name.startswith("bias")]


def test_to_keras_of_torch_nn_and_time_first():
    """A layer of Keras has the batch first; that of torch.nn is as good as ours."""
    module = torch.nn.GRU(I, H)
    layer = fastrnn.to_keras(module)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        assert_same(layer(x.transpose(0, 1))[0].transpose(0, 1), module(x)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_keras_in_other_dtypes(dtype):
    module = twin("GRU", dtype=dtype, bidirectional=True)
    layer = fastrnn.to_keras(module)
    assert layer.forward_layer.cell.kernel.value.dtype == dtype
    back = fastrnn.from_keras(layer)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), module.parameters(), strict=True))


def test_to_keras_keeps_what_is_not_trained():
    assert fastrnn.to_keras(twin("LSTM")).trainable
    assert not fastrnn.to_keras(twin("LSTM").requires_grad_(False)).trainable


def test_to_keras_can_be_saved(tmp_path):
    layer = fastrnn.to_keras(twin("LSTM", num_layers=2))
    keras.Sequential([keras.Input((None, I)), layer]).save(tmp_path / "model.keras")
    x = torch.randn(B, T, I)
    with torch.no_grad():
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert_same(fastrnn.from_keras(tmp_path / "model.keras")(x)[0], loaded(x)[0], torch.float32)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: fastrnn.GRU(I, H, num_layers=2, bidirectional=True),
            "num_layers: expected 1, got 2: Keras has no bidirectional layer of several layers",
        ),
        (lambda: fastrnn.LSTM(I, H, proj_size=2), "proj_size: expected 0, got 2: Keras has no projection"),
        (lambda: fastrnn.LSTM(I, H, peephole=True), "peephole: expected False, got True: Keras has no peep"),
        (lambda: fastrnn.RNN(I, H, leak=0.3), "leak: expected None, got 0.3: Keras has no leak"),
        (
            lambda: fastrnn.GRU(I, H, weights="int8"),
            "weights: expected None, got 'int8': Keras has no round",
        ),
    ],
    ids=["layers", "proj_size", "peephole", "leak", "weights"],
)
def test_to_keras_refuses(make, text):
    with pytest.raises(NotImplementedError, match=text):
        fastrnn.to_keras(make())


class OwnModule(fastrnn.LSTM):
    """A user's class."""


@pytest.mark.parametrize("make", [lambda: OwnModule(I, H), lambda: torch.nn.Linear(I, H), lambda: fastrnn.MGU(I, H)])
def test_to_keras_of_something_else(make):
    text = r"module: expected fastrnn.RNN, LSTM or GRU, or torch.nn's, got .*\.(OwnModule|Linear|MGU)"
    with pytest.raises(TypeError, match=text):
        fastrnn.to_keras(make())


def test_to_keras_leaves_dropout_out(caplog):
    fastrnn.to_keras(twin("GRU", num_layers=2, dropout=0.3))
    assert [r.getMessage() for r in caplog.records] == ["dropout=0.3 of training is left out; inference is the same"]
