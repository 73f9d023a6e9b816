"""Files for ONNX: what both exporters make of our layers, and modules made of their nodes."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import fastrnn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

T, B, I, H = 5, 4, 3, 6
BUILT_IN = [name for name, cell in fastrnn.cells.CELLS.items() if name == cell.equation.__name__]
LENGTHS, RESETS = torch.tensor([5, 3, 0, 1]), torch.rand(T, B) < 0.4

# Name, options, and the attributes of the node besides hidden_size.
NODES = [
    ("RNN", {}, {"direction": b"forward", "activations": [b"Tanh"]}),
    ("RNN", {"nonlinearity": "relu", "bias": False}, {"direction": b"forward", "activations": [b"Relu"]}),
    (
        "RNN",
        {"nonlinearity": "sigmoid", "bidirectional": True},
        {"direction": b"bidirectional", "activations": [b"Sigmoid", b"Sigmoid"]},
    ),
    ("LSTM", {"bias": False}, {"direction": b"forward"}),
    ("LSTM", {"bidirectional": True}, {"direction": b"bidirectional"}),
    ("LSTM", {"peephole": True, "bidirectional": True}, {"direction": b"bidirectional"}),
    ("GRU", {}, {"direction": b"forward", "linear_before_reset": 1}),
    ("GRU", {"bidirectional": True}, {"direction": b"bidirectional", "linear_before_reset": 1}),
    ("GRU", {"reset_after": False, "bidirectional": True}, {"direction": b"bidirectional", "linear_before_reset": 0}),
]
each_node = pytest.mark.parametrize(
    ("name", "options", "attributes"), NODES, ids=["-".join([name, *options]) for name, options, _ in NODES]
)


def export(model, args=(), kwargs=None, **options):
    """Of a module, in evaluation mode, or of an exported program."""
    model = model.eval() if isinstance(model, nn.Module) else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own future
        return torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False, **options)


def run(file, *args, **kwargs):
    """What ONNX Runtime computes, of a file's bytes or of what the exporter has returned."""
    file = file if isinstance(file, bytes) else file.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = [value.numpy() for value in tree_leaves((args, kwargs))]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, given, strict=True)))]


def assert_same(found, module, *args, rtol=1e-5, atol=1e-6, **kwargs):
    with torch.no_grad():
        expected = tree_leaves(module(*args, **kwargs))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def operators(program) -> list[str]:
    return [node.op_type for node in program.model_proto.graph.node]


def attributes_of(node) -> dict:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def first_states(module, batch=B):
    """A random `hx` of a layer."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size)
    return (h, torch.randn(rows, batch, module.hidden_size)) if isinstance(module, nn.LSTM) else h


# ---- one node for a layer


@each_node
def test_a_layer_is_one_node_whose_weights_are_in_the_file(name, options, attributes):
    """Also large ones, which the exporter's own optimizer leaves as they are."""
    for units in (H, 160):
        module, x = getattr(fastrnn, name)(I, units, **options), torch.randn(T, B, I)
        program = export(module, (x,))
        after = ["Transpose", "Reshape"] if module.bidirectional else ["Squeeze"]
        assert operators(program) == [name, *after]
        graph = program.model_proto.graph
        onnx.checker.check_model(program.model_proto, full_check=True)
        found = attributes_of(graph.node[0])
        assert {name: found[name] for name in attributes} == attributes
        assert found["hidden_size"] == units
        weights = [given for given in graph.node[0].input[1:] if given]
        assert len(weights) == 2 + module.bias + bool(options.get("peephole"))
        assert {*weights} <= {tensor.name for tensor in graph.initializer}
        assert_same(run(program, x), module, x)


@each_node
def test_lengths_states_and_other_sizes(name, options, attributes):
    """A row of length 0 keeps its state, where the runtime alone would put 0."""
    module = getattr(fastrnn, name)(I, H, **options)
    x, hx = torch.randn(T, B, I), first_states(module)
    steps, rows = Dim("T"), Dim("B")
    states = [{1: rows}] * len(tree_leaves(hx))
    shapes = {"input": {0: steps, 1: rows}, "hx": tuple(states) if name == "LSTM" else states[0], "lengths": {0: rows}}
    program = export(module, (x, hx), {"lengths": LENGTHS}, dynamic_shapes=shapes)
    found = operators(program)
    assert found.count(name) == 1
    assert len(found) < 10
    for T_, B_ in ((T, B), (8, 2), (1, 1)):
        x, hx = torch.randn(T_, B_, I), first_states(module, B_)
        lengths = LENGTHS if B_ == B else torch.randint(0, T_ + 1, (B_,))
        assert_same(run(program, x, hx, lengths=lengths), module, x, hx, lengths=lengths)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("LSTM", {"num_layers": 2, "batch_first": True, "dropout": 0.5}, 2),
        ("GRU", {"num_layers": 3, "bidirectional": True}, 3),
        ("RNN", {"num_layers": 2, "nonlinearity": "relu"}, 2),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
def test_stacks(name, options, expected):
    module, x = getattr(fastrnn, name)(I, H, **options), torch.randn(T, T, I)
    hx = first_states(module, T)
    program = export(module, (x, hx))
    assert operators(program).count(name) == expected
    assert "Dropout" not in operators(program)
    assert_same(run(program, x, hx), module, x, hx)


def test_unbatched():
    module, x, length = fastrnn.GRU(I, H, bidirectional=True), torch.randn(T, I), torch.tensor(3)
    program = export(module, (x,), {"lengths": length})
    assert operators(program).count("GRU") == 1
    assert_same(run(program, x, lengths=length), module, x, lengths=length)


@pytest.mark.parametrize(
    ("name", "options"),
    [("RNNCell", {}), ("LSTMCell", {}), ("GRUCell", {}), ("GRUCell", {"reset_after": False})],
    ids=["RNN", "LSTM", "GRU", "GRU-reset-before"],
)
def test_single_steps(name, options):
    module, x, h = getattr(fastrnn, name)(I, H, **options), torch.randn(B, I), torch.randn(B, H)
    hx = (h, torch.randn(B, H)) if name == "LSTMCell" else h
    program = export(module, (x, hx))
    assert operators(program).count(name.removesuffix("Cell")) == 1
    assert_same(run(program, x, hx), module, x, hx)


def test_packed_sequences_say_what_to_do():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I), torch.tensor([5, 3, 2, 1]))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(I, H)

        def forward(self, x):
            return self.layer(packed._replace(data=packed.data + x))[1]

    with pytest.raises(torch.onnx.OnnxExporterError, match=r"GRU: input: expected a tensor, got a Packed.*lengths="):
        export(Model(), (torch.zeros(1),))


class Shared(nn.Module):
    """A layer that is used twice, one with a weight that is an argument, and one with a computed weight."""

    def __init__(self):
        super().__init__()
        self.twice, self.given = fastrnn.GRU(I, H), fastrnn.RNN(H, H)
        self.computed = nn.utils.parametrizations.weight_norm(fastrnn.LSTM(H, H), "weight_hh_l0")

    def forward(self, x, weight):
        y = self.twice(x)[0] + self.twice(x.flip(0))[0]
        y = torch.func.functional_call(self.given, {"weight_ih_l0": weight}, (y,))[0]
        return self.computed(y)[0]


def test_weights_that_are_shared_given_or_computed():
    model, args = Shared(), (torch.randn(T, B, I), torch.randn(H, H))
    program = export(model, args)
    assert [operators(program).count(name) for name in ("GRU", "RNN", "LSTM")] == [2, 1, 1]
    assert_same(run(program, *args), model, *args)


# ---- what has no node: a Scan


@pytest.mark.parametrize("name", BUILT_IN)
def test_cells_and_resets_are_scans(name):
    module, x = fastrnn.Recurrent(name, I, H, bidirectional=True), torch.randn(T, B, I)
    rows = {"lengths": LENGTHS, "resets": RESETS}
    program = export(module, (x,), rows)
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert operators(program).count("Scan") == 2
    assert_same(run(program, x, **rows), module, x, **rows)


@pytest.mark.parametrize("rows", [{}, {"lengths": LENGTHS}, {"resets": RESETS}], ids=["plain", "lengths", "resets"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}), ("RNN", {"leak": 0.3, "bias": False})],
    ids=["projection", "leak"],
)
def test_options_without_an_operator_of_their_own(name, options, rows):
    module, x = getattr(fastrnn, name)(I, H, **options), torch.randn(T, B, I)
    hx = first_states(module)
    program = export(module, (x, hx), rows)
    assert operators(program).count("Scan") == module.num_layers * (2 if module.bidirectional else 1)
    assert not {"LSTM", "RNN"} & {*operators(program)}
    assert_same(run(program, x, hx, **rows), module, x, hx, **rows)


def test_a_scan_takes_other_sizes():
    module = fastrnn.LSTM(I, H, proj_size=2, bidirectional=True, batch_first=True)
    steps, rows = Dim("T"), Dim("B")
    shapes = {"input": {0: rows, 1: steps}, "lengths": {0: rows}, "resets": {0: rows, 1: steps}}
    program = export(
        module, (torch.randn(B, T, I),), {"lengths": LENGTHS, "resets": RESETS.T.clone()}, dynamic_shapes=shapes
    )
    for T_, B_ in ((8, 2), (1, 3)):
        x, resets = torch.randn(B_, T_, I), torch.rand(B_, T_) < 0.4
        given = {"lengths": torch.randint(0, T_ + 1, (B_,)), "resets": resets}
        assert_same(run(program, x, **given), module, x, **given)


@fastrnn.cell(gates="f n", states="h", unit_weights="rate", masks="m k")
def masked(x, u, h, rate, m, k, *, scale=2.5):
    f = torch.sigmoid(x.f + u.f(h) + rate)
    return m * ((1 - f) * h + f * torch.tanh(x.n + u.n(f * h))) + (1 - m) * h * k * scale


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fastrnn.Recurrent(masked, I, H, num_layers=2, bidirectional=True, scale=0.5)

    def forward(self, x, m, k):
        return self.layer(x, masks={"m": m, "k": k})


@pytest.mark.parametrize("steps", [(), (T,)], ids=["shared", "of-each-step"])
def test_a_cell_of_ones_own_with_masks(steps):
    model = Masked()
    args = torch.randn(T, B, I), torch.rand(4, *steps, B, H), torch.rand(4, B, H)
    assert_same(run(export(model, args), *args), model, *args)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastrnn.Stack(fastrnn.GRU(I, H), fastrnn.LSTM(H, H), residual=True),
        lambda: fastrnn.Skip(fastrnn.GRU(I + H, H), steps=2),
        lambda: fastrnn.Dilated(fastrnn.GRU(I, H), steps=2),
        lambda: fastrnn.LMU(I, H, 4, 5.0),
        lambda: fastrnn.DiagonalSSM(I, H),
        lambda: fastrnn.RecurrentCell("mgu", I, H),
    ],
    ids=["Stack", "Skip", "Dilated", "LMU", "DiagonalSSM", "RecurrentCell"],
)
def test_modules_that_are_built_of_layers(make):
    module = make()
    x = torch.randn(B, I) if isinstance(module, fastrnn.RecurrentCell) else torch.randn(T, B, I)
    assert_same(run(export(module, (x,)), x), module, x)


# ---- the exporter's options, and other types


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"peephole": True}], ids=["Scan", "LSTM"])
@pytest.mark.parametrize("how", [{"optimize": False}, {"opset_version": 18}, {"opset_version": 23}], ids=str)
def test_options_of_the_exporter(how, options):
    module, x = fastrnn.LSTM(I, H, bidirectional=True, **options), torch.randn(T, B, I)
    program = export(module, (x,), **how)
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert_same(run(program, x), module, x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program(strict):
    module, x = fastrnn.GRU(I, H).eval(), torch.randn(T, B, I)
    program = export(torch.export.export(module, (x,), strict=strict))
    assert operators(program) == ["GRU", "Squeeze"]
    assert_same(run(program, x), module, x)


@pytest.mark.parametrize("records", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_are_written_as_they_are(weights, records):
    module, x = fastrnn.LSTM(I, H, weights=weights), torch.randn(T, B, I)
    with torch.set_grad_enabled(records):
        program = export(module, (x,))
    assert operators(program) == ["LSTM", "Squeeze"]
    module.weights = None
    assert_same(run(program, x), module, x)


def test_an_exported_program_of_rounded_weights():
    module, x = fastrnn.GRU(I, H, weights="int8").eval(), torch.randn(T, B, I)
    with torch.no_grad():
        program = export(torch.export.export(module, (x,)))
    module.weights = None
    assert_same(run(program, x), module, x)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}], ids=["LSTM", "Scan"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_16_bit_types(dtype, tolerance, options):
    """bfloat16, which runtimes lack, is computed in float32."""
    module, x = fastrnn.LSTM(I, H, dtype=dtype, **options), torch.randn(T, B, I, dtype=dtype)
    program = export(module, (x,))
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert_same([*program(x)], module, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_float64(name):
    """ONNX Runtime has no kernels for it; ONNX's own evaluator has."""
    module, x = getattr(fastrnn, name)(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    evaluator = onnx.reference.ReferenceEvaluator(export(module, (x,)).model_proto)
    found = [torch.from_numpy(y) for y in evaluator.run(None, {"input": x.numpy()})]
    assert_same(found, module, x, rtol=1e-11, atol=1e-12)


def run_alone(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fastrnn_imports_nothing_of_onnx():
    found = run_alone("import sys, fastrnn\nprint([name for name in sys.modules if name.split('.')[0][:4] == 'onnx'])")
    assert found.strip() == "[]"


def test_the_exporter_may_be_used_before_fastrnn_is_imported():
    code = (
        "import torch\n"
        "def operators(model):\n"
        "    program = torch.onnx.export(model, (torch.randn(5, 2, 3),), dynamo=True, verbose=False)\n"
        "    return [node.op_type for node in program.model_proto.graph.node]\n"
        "before = operators(torch.nn.Linear(3, 4))\n"
        "import fastrnn\n"
        "print(before == operators(torch.nn.Linear(3, 4)), operators(fastrnn.LSTM(3, 4).eval()))\n"
    )
    assert run_alone(code).strip() == "True ['LSTM', 'Squeeze']"


# ---- the older exporter


def export_older(module, x) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (x,), file, dynamo=False, verbose=False)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("LSTM", {"num_layers": 2, "bidirectional": True}), ("GRUCell", {})],
    ids=["LSTM", "GRU", "RNN", "LSTM-all", "GRUCell"],
)
def test_the_older_exporter(name, options):
    """It gets torch.nn's operations."""
    module = getattr(fastrnn, name)(I, H, **options)
    x = torch.randn(B, I) if name == "GRUCell" else torch.randn(T, B, I)
    assert_same(run(export_older(module, x), x), module, x)


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_the_older_exporter_refuses_what_torch_nn_lacks(name):
    module = getattr(fastrnn, name)(I, H, reset_after=False)
    x = torch.randn(B, I) if name == "GRUCell" else torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match=f"{name}: reset_after=False: expected what torch.nn.*dynamo=True"):
        export_older(module, x)


# ---- from_onnx

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
