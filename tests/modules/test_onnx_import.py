"""Modules made of the nodes of ONNX's files."""

import onnx
import onnx.reference
import pytest
import torch
from onnx_files import B, H, I, T, assert_same, each_node, export, export_older, run
from torch import nn

import fastrnn

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def weights_of(kind, D=1, *, peephole=False, dtype=torch.float32) -> dict:
    """Random weights, in ONNX's shapes."""
    G = GATES[kind]
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H)} | ({"P": (D, 3 * H)} if peephole else {})
    return {name: (torch.randn(shape) / 2).to(dtype) for name, shape in shapes.items()}


def proto(name, tensor):
    if tensor.dtype != torch.bfloat16:
        return onnx.numpy_helper.from_array(tensor.numpy(), name)
    raw = tensor.view(torch.int16).numpy().tobytes()
    return onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, tensor.shape, raw, raw=True)


def node_of(kind, weights, *, name="", given=(), **attributes):
    """A node with states or lengths if they are `given`, by their names in the graph."""
    inputs = ["X", "W", "R", "B", *(place if place in given else "" for place in ("sequence_lens", "initial_h"))]
    inputs += ["initial_c" if "initial_c" in given else "", "P"] if "P" in weights else []
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    return onnx.helper.make_node(kind, inputs, outputs, name=name, **attributes)


def model_of(nodes, weights, *, more=(), opset=22):
    """A model whose output is all that its last node computes."""
    kind = onnx.TensorProto.FLOAT if weights["W"].dtype == torch.float32 else onnx.TensorProto.DOUBLE
    x = onnx.helper.make_tensor_value_info("X", kind, None)
    outputs = [onnx.helper.make_tensor_value_info(name, kind, None) for name in nodes[-1].output]
    initializers = [proto(name, tensor) for name, tensor in weights.items()] + [*more]
    graph = onnx.helper.make_graph(nodes, "graph", [x], outputs, initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def as_modules_do(y, *states):
    """A node's Y [T, D, B, H] as [T, B, D*H]."""
    return [y.permute(0, 2, 1, 3).flatten(2), *states]


@pytest.mark.parametrize("D", [1, 2], ids=["forward", "bidirectional"])
@pytest.mark.parametrize(
    ("kind", "attributes", "options"),
    [
        ("RNN", {}, {"nonlinearity": "tanh"}),
        ("RNN", {"activations": ["Relu"]}, {"nonlinearity": "relu"}),
        ("RNN", {"activations": ["Sigmoid"]}, {"nonlinearity": "sigmoid"}),
        ("LSTM", {"activations": ["Sigmoid", "Tanh", "Tanh"], "input_forget": 0}, {"peephole": False}),
        ("LSTM", {"peephole": True}, {"peephole": True}),
        ("GRU", {}, {"reset_after": False}),
        ("GRU", {"linear_before_reset": 1}, {"reset_after": True}),
    ],
    ids=["RNN", "relu", "sigmoid", "LSTM", "peephole", "GRU-reset-before", "GRU"],
)
def test_from_onnx(kind, attributes, options, D):
    attributes = dict(attributes)
    weights = weights_of(kind, D, peephole=attributes.pop("peephole", False))
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * D
    attributes |= {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    node = node_of(kind, weights, **attributes)
    model, x = model_of([node], weights), torch.randn(T, B, I)
    module = fastrnn.from_onnx(model)
    assert type(module) is getattr(fastrnn, kind)
    expected = {"bidirectional": D == 2, "batch_first": False, "input_size": I, "hidden_size": H, "bias": True}
    assert {name: getattr(module, name) for name in expected | options} == expected | options
    assert_same(as_modules_do(*run(model.SerializeToString(), x)), module, x)
    alone = fastrnn.from_onnx(node, initializers=model.graph.initializer)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, alone.get_parameter(name))


def test_from_onnx_trains():
    weights = weights_of("GRU")
    module = fastrnn.from_onnx(model_of([node_of("GRU", weights, hidden_size=H)], weights))
    module(torch.randn(T, B, I))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_from_onnx_of_other_types(dtype):
    weights = weights_of("LSTM", dtype=dtype)
    module = fastrnn.from_onnx(
        node_of("LSTM", weights, hidden_size=H), initializers={name: proto(name, w) for name, w in weights.items()}
    )
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert torch.equal(module.weight_hh_l0[:H], weights["R"][0, :H])
    assert torch.equal(module.weight_hh_l0[H : 2 * H], weights["R"][0, 2 * H : 3 * H])


def test_from_onnx_with_the_batch_first():
    weights = weights_of("RNN")
    node = node_of("RNN", weights, hidden_size=H, layout=1)
    model, x = model_of([node], weights), torch.randn(B, T, I)
    module = fastrnn.from_onnx(model)
    assert module.batch_first
    y, h = map(torch.from_numpy, onnx.reference.ReferenceEvaluator(model).run(None, {"X": x.numpy()}))
    assert_same([y.flatten(2), h.transpose(0, 1)], module, x)


@each_node
def test_from_onnx_undoes_the_export(name, options, attributes, tmp_path):
    """Through a file whose weights are beside it."""
    module, x = getattr(fastrnn, name)(I, H, **options), torch.randn(T, B, I)
    export(module, (x,)).save(tmp_path / "model.onnx", external_data=True)
    found = fastrnn.from_onnx(tmp_path / "model.onnx")
    assert repr(found) == repr(module)
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in found.state_dict().items())


def test_from_onnx_of_the_older_exporter():
    module, x = nn.LSTM(I, H, num_layers=2, bidirectional=True), torch.randn(T, B, I)
    layers = fastrnn.from_onnx(onnx.load_from_string(export_older(module, x)))
    assert [repr(layer) for layer in layers] == ["LSTM(3, 6, bidirectional=True)", "LSTM(12, 6, bidirectional=True)"]
    with torch.no_grad():
        torch.testing.assert_close(layers[1](layers[0](x)[0])[0], module(x)[0], rtol=1e-5, atol=1e-6)


def test_from_onnx_takes_a_node_by_its_name_and_weights_of_constants():
    weights = weights_of("GRU")
    constants = [onnx.helper.make_node("Constant", [], [name], value=proto(name, w)) for name, w in weights.items()]
    nodes = [node_of("GRU", weights, name=name, hidden_size=H, linear_before_reset=i) for i, name in enumerate("ab")]
    nodes[0].output[:] = ["other", ""]
    model = model_of([*constants, *nodes], weights)
    del model.graph.initializer[:]
    assert [layer.reset_after for layer in fastrnn.from_onnx(model)] == [False, True]
    assert fastrnn.from_onnx(model, "b").reset_after
    assert not fastrnn.from_onnx(model, name="a").reset_after
    with pytest.raises(ValueError, match="name: expected that of one recurrent node, among 'a', 'b', got 'c'"):
        fastrnn.from_onnx(model, "c")


@pytest.mark.parametrize(
    ("kind", "attributes", "error", "text"),
    [
        ("LSTM", {"direction": "reverse"}, NotImplementedError, "direction: expected 'forward' or .* got 'reverse'"),
        ("LSTM", {"direction": "backward"}, ValueError, "direction: expected 'forward' or .* got 'backward'"),
        ("RNN", {"clip": 3.0}, NotImplementedError, r"clip: expected none.* got 3\.0"),
        ("LSTM", {"input_forget": 1}, NotImplementedError, "input_forget: expected 0, got 1"),
        ("LSTM", {"input_forget": 2}, ValueError, "input_forget: expected 0 or 1, got 2"),
        ("RNN", {"input_forget": 0}, ValueError, "input_forget: expected an attribute among .* got input_forget=0"),
        ("GRU", {"linear_before_reset": 2}, ValueError, "linear_before_reset: expected 0 or 1, got 2"),
        ("GRU", {"layout": 7}, ValueError, "layout: expected 0 or 1, got 7"),
        (
            "RNN",
            {"activations": ["Softsign"]},
            NotImplementedError,
            r"activations: .* got \['Softsign'",
        ),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, NotImplementedError, r"activations: .* got \['HardSigmoid'"),
        ("GRU", {"activations": ["Tanh"]}, ValueError, r"activations: expected 2 for each direction, got \['Tanh'\]"),
        ("RNN", {"activation_alpha": [0.5]}, NotImplementedError, r"activation_alpha: expected none.* got \[0\.5\]"),
        ("RNN", {"activation_beta": [0.5]}, NotImplementedError, r"activation_beta: expected none.* got \[0\.5\]"),
        ("RNN", {"color": "red"}, ValueError, "color: expected an attribute among .* got color='red'"),
        ("RNN", {"hidden_size": 7}, ValueError, r"W: expected shape \(1, 7, 3\), as hidden_size is 7, got \(1, 6, 3\)"),
    ],
)
def test_from_onnx_refuses_by_name(kind, attributes, error, text):
    weights = weights_of(kind)
    node = node_of(kind, weights, name="it", **{"hidden_size": H, **attributes})
    with pytest.raises(error, match=f"{kind} 'it': {text}"):
        fastrnn.from_onnx(node, initializers={name: proto(name, w) for name, w in weights.items()})


def test_from_onnx_refuses_activations_that_differ_between_directions():
    weights = weights_of("RNN", 2)
    node = node_of("RNN", weights, hidden_size=H, direction="bidirectional", activations=["Tanh", "Relu"])
    with pytest.raises(NotImplementedError, match=r"the same in both directions, got \['Tanh', 'Relu'\]"):
        fastrnn.from_onnx(node, initializers={name: proto(name, w) for name, w in weights.items()})


def test_from_onnx_says_what_is_wrong_with_weights():
    weights = weights_of("GRU")
    node = node_of("GRU", weights, name="it", hidden_size=H)
    protos = {name: proto(name, w) for name, w in weights.items()}
    for name, tensor, error, text in (
        ("B", weights["B"][:, 1:], ValueError, r"B: expected shape \(1, 36\), as hidden_size is 6, got \(1, 35\)"),
        ("R", weights["R"][0], ValueError, r"R: expected 3 dimensions, got shape \(18, 6\)"),
        ("R", weights["R"].double(), ValueError, r"R: expected dtype torch\.float32 as W, got torch\.float64"),
        ("W", weights["W"].to(torch.int8), NotImplementedError, "W: expected FLOAT, DOUBLE, .* got INT8"),
    ):
        with pytest.raises(error, match=f"GRU 'it': {text}"):
            fastrnn.from_onnx(node, initializers=protos | {name: proto(name, tensor)})
    del protos["R"]
    with pytest.raises(ValueError, match="GRU 'it': R: expected an initializer or the output of a Constant, got 'R'"):
        fastrnn.from_onnx(node, initializers=protos)
    computed = onnx.helper.make_node("Neg", ["W"], ["R"])
    with pytest.raises(ValueError, match=r"R: expected an initializer .* got the output 'R' of Neg"):
        fastrnn.from_onnx(model_of([computed, node], {"W": weights["W"], "B": weights["B"]}))


def test_from_onnx_refuses_states_and_lengths_that_are_constants():
    weights = weights_of("GRU")
    zeros, lengths = torch.zeros(1, B, H), torch.tensor([5, 3, 0, 1], dtype=torch.int32)
    node = node_of("GRU", weights, given=("initial_h",), hidden_size=H)
    fastrnn.from_onnx(model_of([node], weights, more=[proto("initial_h", zeros)]))
    with pytest.raises(NotImplementedError, match="initial_h: expected a value that each call gives as hx"):
        fastrnn.from_onnx(model_of([node], weights, more=[proto("initial_h", zeros + 1)]))
    node = node_of("GRU", weights, given=("sequence_lens",), hidden_size=H)
    with pytest.raises(NotImplementedError, match="sequence_lens: expected a value that each call gives as lengths="):
        fastrnn.from_onnx(model_of([node], weights, more=[proto("sequence_lens", lengths)]))


def test_from_onnx_of_something_else():
    with pytest.raises(TypeError, match="source: expected a path, a ModelProto or a NodeProto, got int"):
        fastrnn.from_onnx(3)
    node = onnx.helper.make_node("Neg", ["X"], ["Y"], name="n")
    with pytest.raises(ValueError, match="source: expected an RNN, LSTM or GRU node, got Neg"):
        fastrnn.from_onnx(node)
    with pytest.raises(ValueError, match="name: expected that of the node, 'n', or None, got 'm'"):
        fastrnn.from_onnx(node, "m")
    with pytest.raises(ValueError, match="expected a model with RNN, LSTM or GRU nodes in its main graph, got none"):
        fastrnn.from_onnx(model_of([node], {"W": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError):
        fastrnn.from_onnx("no/such/file.onnx")
